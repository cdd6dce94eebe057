"""`merge` against peft's own `merge_and_unload`, tensor by tensor, and against base + adapter in logits."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import FUSED, add_rope, edit_adapter, load_tensors, make_adapter, peft_merge
from families import CONFIGS, save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.weights import INDEX_NAME, read_shards
from longext.conversion.config import MergeConfig
from longext.conversion.merge import merge_adapter
from longext.conversion.proof import TOLERANCE
from longext.errors import CheckpointError

BOOKS = BUNDLED_MODELS["books-5m"]


def tiny(family, directory, **changes):
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    return save_tiny_model(config, directory)


def merge(adapter, output, **keys):
    return merge_adapter(MergeConfig(adapter=str(adapter), output=str(output), **keys))


def assert_same(ours, theirs, tolerance=1e-6):
    """Same names; every tensor within `tolerance` of its largest value."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error = (ours[name].double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def books_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("books") / "adapter"
    return add_rope(make_adapter(BOOKS, directory), "books-5m")


@pytest.fixture(scope="module")
def books_peft(books_adapter):
    return peft_merge(BOOKS, books_adapter)


@pytest.fixture(scope="module")
def books_merged(books_adapter, tmp_path_factory):
    """The directory and the result of a merge in the base's own type."""
    output = tmp_path_factory.mktemp("merged") / "out"
    return output, merge(books_adapter, output)


def test_float32_equals_pefts_merge_in_every_tensor(books_adapter, books_peft, tmp_path):
    result = merge(books_adapter, tmp_path / "out", dtype="float32")
    ours = load_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert_same(ours, books_peft)
    assert result.proof.max_difference <= result.proof.limit
    assert result.proof.effect > 1000 * result.proof.max_difference
    assert (result.proof.num_tensors, result.proof.worst_share) == (38, 0.0)
    assert config_of(tmp_path / "out")["dtype"] == "float32"


def test_half_precision_is_the_float32_merge_rounded_once(books_adapter, books_merged, books_peft, tmp_path):
    output, result = books_merged
    merge(books_adapter, tmp_path / "out", dtype="float16", check=False)
    for directory, stored in ((output, torch.bfloat16), (tmp_path / "out", torch.float16)):
        ours = load_tensors(directory)
        assert set(ours) == set(books_peft)
        for name, expected in books_peft.items():
            assert torch.equal(ours[name], expected.to(stored)), name
    assert result.proof.max_difference <= TOLERANCE
    assert result.proof.rounding_kl < 1e-4
    assert result.proof.rounding_top1 > 0.98


def test_untouched_tensors_are_copied_bit_for_bit(books_merged):
    ours, base = load_tensors(books_merged[0]), load_tensors(BOOKS)
    same = [name for name in base if torch.equal(base[name], ours[name])]
    assert sorted(same) == sorted(name for name in base if "mlp" in name)


FAMILIES = [
    "llama",
    "qwen3",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi",
    "falcon",
    "mixtral",
    "gemma3",
    "olmo2",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    base = tiny(family, tmp_path / "base")
    targets = FUSED.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"])
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    result = merge(adapter, tmp_path / "out")
    assert_same(load_tensors(tmp_path / "out"), peft_merge(base, adapter))
    assert result.proof.max_difference <= result.proof.limit < result.proof.effect


SETTINGS = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 8}, "alpha_pattern": {"q_proj": 64}},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"},
    "one layer": {"layers_to_transform": [0]},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "everything on": {"use_rslora": True, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"k_proj": 3}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_lora_settings(tmp_path, settings):
    base = tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(adapter, tmp_path / "out", check=False)
    assert_same(load_tensors(tmp_path / "out"), peft_merge(base, adapter))


def test_fan_in_fan_out_means_nothing_for_linear_layers(tmp_path):
    base = tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "fan_in_fan_out": True}))
    merge(adapter, tmp_path / "out", check=False)
    assert_same(load_tensors(tmp_path / "out"), peft_merge(base, adapter))


def test_lora_on_embedding_and_output_matrix(tmp_path):
    base = tiny("llama", tmp_path / "base")
    targets = ["q_proj", "embed_tokens", "lm_head"]
    adapter = make_adapter(base, tmp_path / "adapter", embedding=False, target_modules=targets)
    merge(adapter, tmp_path / "out", check=False)
    assert_same(load_tensors(tmp_path / "out"), peft_merge(base, adapter))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("together", [True, False])
def test_lora_on_a_tied_embedding(tmp_path, together, dtype):
    """peft's own merge adds the update twice to the shared matrix, so its forward pass is the reference here."""
    base = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    keys = {"embedding": False, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": together}
    result = merge(make_adapter(base, tmp_path / "adapter", **keys), tmp_path / "out", dtype=dtype)
    assert result.merge.stays_tied == together
    assert result.proof.max_difference <= result.proof.limit < result.proof.effect


def test_a_sharded_base_keeps_its_files(tmp_path):
    base = tiny("llama", tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(adapter, tmp_path / "out")
    names = [shard.path.name for shard in read_shards(tmp_path / "base")]
    assert len(names) > 2
    assert [shard.path.name for shard in read_shards(tmp_path / "out")] == names
    index, before = (json.loads((tmp_path / d / INDEX_NAME).read_text()) for d in ("out", "base"))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"]
    assert_same(load_tensors(tmp_path / "out"), peft_merge(tmp_path / "base", adapter))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base")  # leaves the index, not the shards
    assert [shard.path.name for shard in read_shards(tmp_path / "base")] == ["model.safetensors"]


# --- tied embeddings --------------------------------------------------------------------------------------------


def test_tied_stays_tied(books_adapter, books_merged):
    assert "base_model.model.lm_head.weight" in load_file(books_adapter / "adapter_model.safetensors")
    output, result = books_merged
    assert result.merge.stays_tied
    assert "lm_head.weight" not in load_tensors(output)
    assert config_of(output)["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("sharded", [False, True])
def test_an_embedding_trained_without_tying_is_written_apart_from_the_output_matrix(tmp_path, sharded):
    base = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    if sharded:
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        base = tmp_path / "shards"
    adapter = make_adapter(base, tmp_path / "adapter", ensure_weight_tying=False)
    result = merge(adapter, tmp_path / "out")
    ours, before = load_tensors(tmp_path / "out"), load_tensors(base)
    assert not result.merge.stays_tied
    assert "no longer tied" in " ".join(result.merge.notes)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(ours["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    assert_same(ours, peft_merge(base, adapter))


# --- logits -----------------------------------------------------------------------------------------------------


def test_the_proof_crosses_the_trained_length_and_sees_a_wrong_merge(
    books_adapter, books_merged, tmp_path, monkeypatch
):
    from longext.errors import VerificationError

    result = books_merged[1]
    assert result.proof.first_position < 512 < result.proof.first_position + result.proof.num_tokens
    real = merge_adapter.__globals__["merged_tensor"]
    one = "model.layers.2.self_attn.v_proj.weight"
    monkeypatch.setattr(
        "longext.conversion.merge.merged_tensor",
        lambda adapter, name, base: base.float() if name == one else real(adapter, name, base),
    )
    with pytest.raises(VerificationError, match="differs from base"):
        merge(books_adapter, tmp_path / "wrong", dtype="bfloat16")
    assert not (tmp_path / "wrong").exists()


def test_the_proof_sees_a_wrong_merge_however_little_the_adapter_changes(tmp_path, monkeypatch):
    """With an effect below the tolerance of the logits, only the weights can tell."""
    from longext.errors import VerificationError

    adapter = make_adapter(BOOKS, tmp_path / "adapter", norms=False, embedding=False)
    edit_adapter(adapter, lambda held: [tensor.mul_(1e-4) for key, tensor in held.items() if "lora_B" in key])
    proof = merge(adapter, tmp_path / "out", dtype="float32").proof
    assert 0 < proof.effect < proof.limit
    monkeypatch.setattr("longext.conversion.merge.merged_tensor", lambda adapter, name, base: base.float())
    with pytest.raises(VerificationError, match="differs from base . adapter in 'model.layers"):
        merge(adapter, tmp_path / "wrong", dtype="float32")


def test_the_proof_sees_a_wrong_rope(books_adapter, tmp_path, monkeypatch):
    from longext.conversion.extend import extended_config
    from longext.errors import VerificationError

    def plain(plan):
        return {
            **extended_config(plan),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": None,
        }

    monkeypatch.setattr("longext.conversion.merge.extended_config", plain)
    with pytest.raises(VerificationError, match="differs from base"):
        merge(books_adapter, tmp_path / "out")


def test_rounding_that_costs_too_much_is_refused(tmp_path, monkeypatch):
    from longext.conversion import proof
    from longext.errors import VerificationError

    base = tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(proof, "KL_LIMIT", 1e-12)
    with pytest.raises(VerificationError, match="--dtype float32"):
        merge(adapter, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


# --- adapters from elsewhere --------------------------------------------------------------------------------------


def test_whole_tensors_that_no_module_to_save_lists_are_used(tmp_path):
    """As peft stores embeddings by itself: keys of base tensors beside the LoRA pairs."""
    base = tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", norms=False, embedding=False)
    key = "base_model.model.model.embed_tokens.weight"
    edit_adapter(adapter, lambda held: held.update({key: torch.ones(64, 32) / 3}))
    merge(adapter, tmp_path / "out")
    assert_same(load_tensors(tmp_path / "out"), peft_merge(base, adapter))
    assert float(load_tensors(tmp_path / "out")["model.embed_tokens.weight"].max()) == pytest.approx(1 / 3)


REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "use_qalora": {"use_qalora": True},
    "velora_config": {"velora_config": {"num_groups": 4}},
    "a key of a later peft": {"scale_by_moonlight": 0.5},
    "IA3": {"peft_type": "IA3"},
}


@pytest.mark.parametrize(("name", "settings"), REFUSED.items(), ids=REFUSED.keys())
def test_other_kinds_are_refused_by_name(tmp_path, name, settings):
    base = tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", norms=False, embedding=False)
    held = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**held, **settings}))
    key = next(iter(settings)) if name != "IA3" else name
    with pytest.raises(CheckpointError, match=f"{key}.*plain LoRA"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
