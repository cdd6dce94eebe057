"""A swept row has the gradient of one graph: float64, 1e-10, for every kind of model, attention and batch."""

from __future__ import annotations

import types

import pytest
import torch
from families import CONFIGS, tiny_model
from sweeps import batch_of, gradients, worst
from transformers import LlamaConfig, LlamaForCausalLM

from longext.attention.chunks import KeyValueStore
from longext.attention.merged import fused_kernel, merged_attention
from longext.attention.variant import ATTENTION_VARIANTS
from longext.errors import ConfigError
from longext.training.sweep import chunk_tokens

LIMIT = 1e-10
SWEPT = sorted(name for name in ATTENTION_VARIANTS if not ATTENTION_VARIANTS[name].leaks)
FAMILIES = sorted(set(CONFIGS) - {"gemma3", "falcon", "stablelm"})


def wide(model):
    """The model in float64, also where its family computes in float32: Gemma's norms, Mixtral's experts."""
    for module in model.modules():
        if type(module).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm"):
            module.forward = types.MethodType(_gemma_norm, module)
    model.config._experts_implementation = "eager"
    return model.double()


def _gemma_norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def agree(model, batch, variant, chunk, **options):
    loss, expected = gradients(model, batch, variant, **options)
    swept, found = gradients(model, batch, variant, chunk, **options)
    assert torch.allclose(swept, loss, rtol=1e-12)
    assert worst(found, expected) < LIMIT


@pytest.mark.parametrize("variant", SWEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, variant):
    agree(wide(tiny_model(family)), batch_of("whole"), variant, 16)


@pytest.mark.parametrize("chunk", [5, 8, 12, 24, 43])
@pytest.mark.parametrize("kind", ["whole", "packed", "padded", "masked"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_batches_and_chunks(family, kind, chunk):
    """Chunks that the group divides and that it does not; sliding windows of 32 tokens; chunks without a label."""
    agree(wide(tiny_model(family)), batch_of(kind), "s2", chunk)


@pytest.mark.parametrize("window", [3, 8, 19])
@pytest.mark.parametrize("chunk", [8, 20])
@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_sliding_windows(window, chunk, kind):
    model = tiny_model("mistral").double()
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    agree(model, batch_of(kind), "full", chunk)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 3), (5, 5), (5, 1), (9, 3)])
@pytest.mark.parametrize("group", [7, 8])
def test_heads(heads, kv_heads, group):
    """MHA, GQA, MQA, odd numbers, and a half that falls inside a group of heads."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=8 * heads, head_dim=8, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    agree(LlamaForCausalLM(config).double(), batch_of("whole"), "s2", 16, group=group)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rope_that_follows_the_length_sees_that_of_the_row(rope_type):
    """The row has 44 tokens, the model 16 positions: rotated by its own length, no chunk would agree."""
    more = {"factor": 2.0} if rope_type == "dynamic" else {
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16 if rope_type == "dynamic" else 64,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0, **more},
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    agree(model, batch_of("whole"), "s2", 8)
    assert model.model.rotary_emb.rope_type == rope_type


def test_positions_with_skips():
    """PoSE: positions are those of the row, whatever the chunk."""
    positions = torch.arange(44) + (torch.arange(44) > 13) * 9
    agree(tiny_model("llama").double(), batch_of("whole"), "full", 8, positions=positions.expand(2, -1))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tuning", ["lora+embed+norm", "lora", "lora+norm"])
def test_adapters(tuning, checkpointing):
    from longext.training.config import FinetuneConfig
    from longext.training.loading import enable_checkpointing
    from longext.training.tuning import make_trainable

    model = wide(tiny_model("gemma3_text"))
    network, _ = make_trainable(model, FinetuneConfig(model="x", data="sample", tuning=tuning, lora_r=4), "x")
    network.double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be most gradients
                parameter.normal_(0, 0.3)
    if checkpointing:
        enable_checkpointing(model, offload=False)
    agree(model, batch_of("packed"), "s2", 16, network=network)


def test_dropout_is_the_same_in_both_runs_of_a_chunk():
    model = tiny_model("llama").double()
    model.config.attention_dropout = 0.0
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.5))
    outputs = []
    model.model.layers[1].register_forward_hook(lambda _, __, out: outputs.append(out.detach().clone()))
    torch.manual_seed(3)
    gradients(model, batch_of("whole"), "s2", 16)
    first, second = outputs[:2], outputs[2:]
    assert len(second) == 3
    for once, again in zip(first, reversed(second[1:]), strict=True):
        assert torch.equal(once, again)
    after = torch.rand(3)
    torch.manual_seed(3)
    for _ in range(3):  # two chunks, and the last one, which runs once
        torch.nn.functional.dropout(torch.zeros(2, 16 if _ < 2 else 12, 32, dtype=torch.float64), 0.5)
    assert torch.equal(after, torch.rand(3))


def test_a_reordering_variant_is_refused():
    with pytest.raises(ConfigError, match="later tokens"):
        gradients(tiny_model("llama"), batch_of("whole", length=48), "s2-wrapped", 16)


def test_chunk_sizes():
    assert chunk_tokens("off", 10**6, 8192) is None
    assert chunk_tokens("auto", 10**6, 6000) == 12_000
    assert chunk_tokens("auto", 10**6, 16_384) == 16_384
    assert chunk_tokens("auto", 10**6, None) == 8192
    assert chunk_tokens("auto", 8192, None) is None  # one chunk is the whole row
    assert chunk_tokens("4096", 10_000, None) == 4096
    for wrong in ("0", "-1", "x", "1.5", "", "9" * 5000):
        with pytest.raises(ConfigError, match="--sweep takes"):
            chunk_tokens(wrong, 10_000, None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 12), (8, 9), (16, 64)])
def test_merged_attention_is_attention(heads, kv_heads, queries, keys):
    """Two calls of a fused kernel against one with a mask: output and gradients in float64."""
    q = torch.randn(2, queries, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, keys, kv_heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(2))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    repeated = [x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=0.3)
    found = merged_attention(q, k, v, 0.3, fused_kernel(q))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), gradient) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", SWEPT)
@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_what_waits_in_host_memory_comes_back_as_it_was(variant, kind):
    """Nothing may stay on the device, or all: the gradient of one graph, to the rounding of float32."""
    model = tiny_model("qwen3").cuda()
    batch = {name: x.cuda() for name, x in batch_of(kind).items()}
    _, expected = gradients(model, batch, variant)
    for store in (KeyValueStore(), KeyValueStore(room=0, gradient_room=0)):
        _, found = gradients(model, batch, variant, 8, store=store)
        assert worst(found, expected) < 1e-4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("variant", SWEPT)
@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_half_precision_kernels_behind_earlier_keys(variant, kind, device):
    """bfloat16 takes other kernels, aligned at the last key: not further from float32 than one graph is, twice over."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    batch = {name: x.to(device) for name, x in batch_of(kind, length=256).items()}
    _, exact = gradients(model, batch, variant, group=64)
    _, plain = gradients(model, batch, variant, group=64, autocast=True)
    _, swept = gradients(model, batch, variant, 64, group=64, autocast=True)

    def error(found):
        return sum(float((found[name] - exact[name]).norm() ** 2) for name in exact) ** 0.5

    assert error(swept) < 2 * error(plain)
