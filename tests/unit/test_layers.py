"""Options of decoder layers in `finetune`: kernels, tiles, checkpoints; what is refused, recorded and resumed."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model

from longext.errors import ConfigError, MissingExtraError
from longext.training.checkpoints import check_fingerprint, mark_complete
from longext.training.config import FinetuneConfig
from longext.training.layers import kernels
from longext.training.layers.kernels import choose_kernels, use_compile, use_liger
from longext.training.layers.tiles import token_wise_modules
from longext.training.loading import full_attention, narrow_hidden_states
from longext.training.longlora import plan_finetune
from longext.training.losses import chunk_for
from longext.training.settings import check_finetune_config
from longext.training.tuning import norm_modules

CONFIG = FinetuneConfig(model="books-5m", data="sample", device="cpu", target_length=512)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "olmo2", "falcon"])
def test_norms_hand_bfloat16_on_and_take_float32_gradients(family, trained):
    """Under autocast, beside a model whose embedding and norms inside attention alone hand bfloat16 on.

    The projections round their input anyway, so only the order differs in which their gradients are rounded and added:
    a gradient may differ by 2^-6 of its largest entry (bfloat16 rounds to 2^-9).
    """
    results = []
    for narrow in (False, True):
        torch.manual_seed(0)
        model = tiny_model(family).train()
        if trained:
            lora = LoraConfig(target_modules="all-linear", modules_to_save=norm_modules(model))
            model = get_peft_model(model, lora)
        base = model.get_base_model() if trained else model
        if narrow:
            narrow_hidden_states(base)
        for name in ("embedding", *norm_modules(base)) if not narrow else ():
            module = base.get_input_embeddings() if name == "embedding" else base.get_submodule(name)
            if name == "embedding" or "attn" in name:
                module.register_forward_hook(lambda *call: call[2].bfloat16())
        seen = set()
        for name in norm_modules(base):
            base.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.add(call[2].dtype))
        ids = torch.arange(40)[None]
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        norms = {n: p for n, p in model.named_parameters() if p.requires_grad and (".ln_" in n or "norm" in n)}
        assert norms
        results.append({name: parameter.grad for name, parameter in norms.items()})
    assert seen == {torch.bfloat16}
    for name, before in results[0].items():
        assert results[1][name].dtype == torch.float32
        assert (results[1][name] - before).abs().max() <= 2**-6 * before.abs().max(), name


# --- kernels ----------------------------------------------------------------------------------------------------------


def fused_norm(self, x):
    return self.fused_weight * x


@pytest.fixture
def liger(monkeypatch):
    """A package that does what Liger does: binds methods to modules, and replaces names of the model's source file."""
    from transformers.integrations import liger as switch
    from transformers.models.llama import modeling_llama

    calls = []

    def to_llama(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None
    ):
        calls.append({name: value for name, value in locals().items() if isinstance(value, bool)})
        modeling_llama.apply_rotary_pos_emb = "fused rope"
        modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (), {})
        for layer in model.model.layers:
            layer.input_layernorm.fused_weight = 3.0
            layer.input_layernorm.forward = types.MethodType(fused_norm, layer.input_layernorm)

    def apply(model, **wanted):
        taken = {"rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"}
        to_llama(model=model, **{name: value for name, value in wanted.items() if name in taken})

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance = apply
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": to_llama}
    monkeypatch.setattr(switch, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(kernels, "_version", lambda: "0.8.5")
    return calls


def test_liger_is_switched_on_without_its_loss(liger):
    model = tiny_model("llama")
    used = use_liger(model)
    assert liger == [
        {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
    ]
    assert used.name == "liger 0.8.5: rms_norm, rope, swiglu"


def test_liger_leaves_an_mlp_with_another_activation(liger):
    model = tiny_model("llama")
    model.config.hidden_act = "gelu"
    assert use_liger(model).name == "liger 0.8.5: rms_norm, rope"
    assert liger[0]["swiglu"] is False


def test_what_liger_replaces_in_transformers_is_put_back(liger):
    from transformers.models.llama import modeling_llama

    norm, rope = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    used = use_liger(tiny_model("llama"))
    assert (modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb) == (norm, rope)
    with used.in_place():
        assert modeling_llama.apply_rotary_pos_emb == "fused rope"
        assert modeling_llama.LlamaRMSNorm is norm
    assert modeling_llama.apply_rotary_pos_emb is rope


def test_trained_copies_of_norms_keep_ligers_forward(liger):
    """PEFT copies a norm that is trained: the copy's method is bound to the copy."""
    model = tiny_model("llama")
    use_liger(model)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    norm = get_peft_model(model, lora).get_base_model().model.layers[0].input_layernorm.modules_to_save["default"]
    norm.fused_weight = 5.0
    assert torch.equal(norm(torch.ones(2)), torch.full((2,), 5.0))


def test_auto_takes_liger_on_cuda_where_it_knows_the_model(liger):
    assert choose_kernels("auto", "llama", CUDA, sharded=False) == "liger"
    assert choose_kernels("liger", "llama", CUDA, sharded=False) == "liger"
    assert choose_kernels("auto", "gpt_neox", CUDA, sharded=False) is None
    assert choose_kernels("auto", "llama", CUDA, sharded=True) is None
    assert choose_kernels("auto", "llama", CPU, sharded=False) is None
    assert choose_kernels("none", "llama", CUDA, sharded=False) is None
    assert choose_kernels("compile", "llama", CPU, sharded=False) == "compile"
    for model_type, device, sharded, message in (
        ("llama", CPU, False, "needs a CUDA device, this run is on cpu"),
        ("gpt_neox", CUDA, False, "Liger 0.8.5 has no kernels for gpt_neox models"),
        ("llama", CUDA, True, "has not been tried under FSDP or DeepSpeed"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_kernels("liger", model_type, device, sharded)
    with pytest.raises(ConfigError, match="no kernels for gpt_neox"):
        use_liger(tiny_model("gpt_neox"))


def test_without_liger(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert choose_kernels("auto", "llama", CUDA, sharded=False) is None
    with pytest.raises(MissingExtraError, match=r"pip install 'longext\[liger\]'"):
        choose_kernels("liger", "llama", CUDA, sharded=False)


def test_compile_is_for_training_rows(monkeypatch):
    """In place, one length at a time; evaluations run what was not compiled. Inductor itself takes 20 s: not here."""
    traced = []

    def backend(graph, examples):
        traced.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: real(function, backend=backend, **kwargs))
    torch.compiler.reset()
    model, ids = tiny_model("llama").train(), torch.arange(20)[None]
    expected = model(ids).logits
    names = token_wise_modules(model)
    assert use_compile(model, names).name.startswith("torch.compile ")
    torch.testing.assert_close(model(ids).logits, expected)
    assert len(traced) == 2  # a norm and an MLP serve all layers
    with full_attention(model, CPU, autocast=False), torch.no_grad():
        model(ids[:, :7])
    assert len(traced) == 2
    assert set(model.state_dict()) == set(tiny_model("llama").state_dict())
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_liger_computes_what_transformers_does(family):
    """bfloat16 autocast, loss to 2^-7 relative; each gradient's error is at most 3 % of its norm."""
    pytest.importorskip("liger_kernel")
    results = []
    for fused in (False, True):
        model = tiny_model(family).to("cuda").train()
        used = use_liger(model) if fused else kernels.Kernels()
        narrow_hidden_states(model)
        ids = torch.arange(60, device="cuda")[None]
        with used.in_place(), torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2**-7, atol=0)
    for name, expected in results[0][1].items():
        assert (results[1][1][name] - expected).norm() <= 0.03 * expected.norm(), name


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nested": 2, "checkpointing": False}, "--nested shares the inputs of checkpointed layers"),
        ({"checkpoint_every": 2, "checkpointing": False}, "--checkpoint-every chooses checkpointed layers"),
        ({"nested": 2, "checkpoint_every": 2}, "--nested 2 needs every layer checkpointed"),
        ({"tile": 64, "kernels": "compile"}, "--tile runs what --kernels compile has compiled"),
        ({"kernels": "fast"}, "Unknown kernels 'fast'"),
        ({"offload": True}, "--offload moves activations from a GPU"),
    ],
)
def test_combinations_that_cannot_run(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_finetune_config(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize("changes", [{"tile": 64}, {"nested": 2}])
def test_sharded_weights_are_refused(monkeypatch, changes):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="has not been tried under FSDP or DeepSpeed"):
        check_finetune_config(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("vocabulary", "tokens"),
    [(64, 4096), (32_000, 4096), (49_152, 2688), (128_256, 1024), (262_144, 512), (2**24, 128)],
)
def test_the_loss_chunk_by_default(vocabulary, tokens):
    assert chunk_for(vocabulary) == tokens


def test_what_changes_numbers_is_compared_on_resume(tmp_path):
    """A checkpoint from before these settings goes on with their defaults, and with nothing else."""
    data = {"tokens_sha256": "tokens"}
    now = plan_finetune(CONFIG).fingerprint(data)
    before = {key: value for key, value in now.items() if key not in ("kernels", "tile", "loss_chunk")}
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "adapter_model.safetensors"):
        (checkpoint / name).write_text(name)
    mark_complete(checkpoint, before)
    assert check_fingerprint(checkpoint, now)["last_step"] == CONFIG.num_steps
    for changes, key in (
        ({"kernels": "compile"}, "kernels"),
        ({"tile": 64}, "tile"),
        ({"loss_chunk": 9}, "loss_chunk"),
    ):
        changed = plan_finetune(dataclasses.replace(CONFIG, **changes)).fingerprint(data)
        with pytest.raises(ConfigError, match=f"was made with {key} None"):
            check_fingerprint(checkpoint, changed)
    same = plan_finetune(dataclasses.replace(CONFIG, nested=2, checkpointing=True)).fingerprint(data)
    assert same == now  # the same numbers
