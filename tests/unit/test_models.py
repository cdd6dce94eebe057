"""The one door for models: what it loads is what plain transformers loads, to the bit; nothing whole is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from broken_models import edit_config, edit_weights, make_micro
from families import CONFIGS, _config, save_tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from longext.checkpoint import checks, load, weights
from longext.checkpoint.load import build_model_config, load_causal_lm, load_config
from longext.checkpoint.source import read_config
from longext.checkpoint.weights import read_shards
from longext.errors import CheckpointError

_MLP = {"intermediate_size": 48}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
_FOUR_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
MORE = {
    "bamba": lambda: _config("Bamba", **_MLP, **_MAMBA, num_key_value_heads=1, attn_layer_indices=[1]),
    "deepseek_v3": lambda: _config("DeepseekV3", **_MLP, **_MLA, **_EXPERTS, **_GROUPS),
    "qwen3_moe": lambda: _config("Qwen3Moe", **_MLP, num_key_value_heads=1, **_FOUR_EXPERTS),
    "tied": lambda: _config("Llama", **_MLP, tie_word_embeddings=True),
}
ALL = {**CONFIGS, **MORE}
IDS = torch.arange(3, 43)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ALL)
def test_what_the_door_loads_is_what_transformers_loads(tmp_path, name):
    save_tiny_model(ALL[name](), tmp_path)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    for config in (None, build_model_config(read_config(tmp_path))):
        assert torch.equal(logits(load_causal_lm(tmp_path, config=config, dtype=torch.float32)), theirs)


def test_a_sharded_checkpoint(tmp_path):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**_MLP, "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2})
    )
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load_causal_lm(tmp_path)), logits(model))


def _llama4():
    text = {**_MLP, "intermediate_size_mlp": 32, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 8, "patch_size": 4, "vision_output_dim": 32}
    ends = {"projector_input_dim": 32, "projector_output_dim": 32}
    return transformers.Llama4Config(text_config={**text, **heads}, vision_config={**vision, **sizes, **ends})


def test_the_text_model_of_a_multimodal_checkpoint(tmp_path):
    """transformers loads Llama 4's text model alone: its pictures' weights are left over by design, a layer is not."""
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(_llama4()).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Llama4ForCausalLM"
    assert torch.equal(logits(load_causal_lm(tmp_path)), logits(theirs))
    edit_weights(tmp_path, lambda s: {**s, **{k.replace("layers.1.", "layers.2."): v for k, v in s.items()}})
    with pytest.raises(CheckpointError, match=r"holds 'language_model.model.layers.2.*num_hidden_layers is 2"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        {"model.layers.0.self_attn.attention.masked_bias": torch.ones(1)},
        {"mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4)},
        {"vision_tower.encoder.layers.3.mlp.weight": torch.ones(4, 4)},
        {"model.layers.2.mlp.up_proj.weight": torch.ones(4, 4), "model.layers.2.eh_proj.weight": torch.ones(4, 4)},
    ],
)
def test_what_is_left_out_by_design_is_not_refused(tmp_path, extra):
    make_micro(tmp_path)
    whole = logits(load_causal_lm(tmp_path))
    edit_weights(tmp_path, lambda s: {**s, **extra})
    edit_config(tmp_path, num_nextn_predict_layers=1)  # layer 2: DeepSeek's and GLM's way to store such heads
    assert torch.equal(logits(load_causal_lm(tmp_path)), whole)


@pytest.mark.parametrize("name", ["without model.", "model. twice"])
def test_prefixes_that_transformers_understands(tmp_path, name):
    make_micro(tmp_path)
    whole = logits(load_causal_lm(tmp_path))
    twice = name == "model. twice"
    edit_weights(tmp_path, lambda s: {f"model.{k}" if twice else k.removeprefix("model."): v for k, v in s.items()})
    assert torch.equal(logits(load_causal_lm(tmp_path)), whole)


def test_an_expert_that_is_missing_is_named(tmp_path):
    """Experts are stored one by one and computed as one tensor: transformers only logs which does not fit."""
    save_tiny_model(CONFIGS["mixtral"](), tmp_path)
    part = "layers.1.block_sparse_moe.experts.1.w1."
    edit_weights(tmp_path, lambda s: {k: v for k, v in s.items() if part not in k})
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.1\.mlp\.experts\.gate_up_proj': Sizes of tensors must match"
    ):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), KeyboardInterrupt()])
def test_memory_and_interrupts_pass_through(error):
    with pytest.raises(type(error)) as caught, load.explained("loading"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("wq"), "loading: KeyError: 'wq'"),
        (RecursionError("too deep"), "loading: RecursionError: too deep"),
        (ValueError("Validation error:\n  it is\n  too long"), "loading: Validation error: it is too long"),
        (OSError("first\n" + "x" * 400), "loading: first"),
        (AssertionError(), "loading: AssertionError"),
    ],
)
def test_the_reason_is_kept_in_one_line(error, text):
    with pytest.raises(CheckpointError) as caught, load.explained("loading"):
        raise error
    assert str(caught.value) == text


def test_infinity_in_a_config_is_decoded_as_transformers_does(tmp_path):
    save_tiny_model(MORE["bamba"](), tmp_path)
    raw = read_config(tmp_path)
    assert {"__float__": "Infinity"} in raw["time_step_limit"]
    ours, theirs = build_model_config(raw), load_config(tmp_path)
    assert list(ours.time_step_limit) == list(theirs.time_step_limit) == [0.0, float("inf")]


def test_a_config_without_a_type_is_not_guessed_from_its_path(tmp_path):
    """transformers would take a directory called llama-... for a Llama."""
    make_micro(tmp_path / "llama-like")
    edit_config(tmp_path / "llama-like", model_type=None)
    with pytest.raises(CheckpointError, match="no `model_type`"):
        load_config(tmp_path / "llama-like")


def test_attention_code_of_the_hub_is_not_fetched(tmp_path):
    make_micro(tmp_path)
    edit_config(tmp_path, attn_implementation="someone/fast-attention")
    with pytest.raises(CheckpointError, match="'someone/fast-attention'.*not run unasked"):
        load_causal_lm(tmp_path)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_value_is_found_anywhere(monkeypatch, dtype, value):
    monkeypatch.setattr(checks, "_PIECE", 10)
    tensor = torch.randn(7, 11).to(dtype)
    assert checks._is_finite(tensor) and checks._is_finite(tensor.new_empty(0))
    for place in (0, 9, 10, 76):
        broken = tensor.clone()
        broken.view(-1)[place] = value
        assert not checks._is_finite(broken)


def test_stored_tensors_are_checked_where_memory_cannot_show_it(tmp_path):
    """As quantised and offloaded weights are."""
    make_micro(tmp_path)
    checks.check_stored(read_shards(tmp_path))
    edit_weights(tmp_path, lambda s: {**s, "model.norm.weight": torch.full((16,), torch.inf)})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds 16 of 16 values"):
        checks.check_stored(read_shards(tmp_path))


def test_the_checksum_of_weights_sees_one_bit(tmp_path):
    model = load_causal_lm(make_micro(tmp_path), dtype=torch.bfloat16)
    before = checks.weights_checksum(model)
    assert checks.weights_checksum(load_causal_lm(tmp_path, dtype=torch.bfloat16)) == before
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight.view(torch.int16)[5000, 7] ^= 1
    assert checks.weights_checksum(model) != before


def test_large_weights_are_sampled_in_every_tensor(tmp_path, monkeypatch):
    make_micro(tmp_path)
    monkeypatch.setattr(weights, "_HASHED_WHOLE", 1000)
    before = weights.fingerprint_weights(tmp_path)
    assert before.startswith("sampled:") and weights.same_weights(tmp_path, before)
    copy = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    assert weights.same_weights(copy, before)  # another place and time
    for name in ("model.norm.weight", "lm_head.weight"):
        edit_weights(copy, lambda s, name=name: {**s, name: s[name] + 0.01})
        assert not weights.same_weights(copy, before)
        shutil.copy(tmp_path / "model.safetensors", copy)
