"""Mixed windows: every document of a row is rotated as if it were alone, below L by one RoPE and above it by another."""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch
from rope_examples import METHODS, example, spec_for
from sweeps import gradients, worst
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longext.data.packing import Windows, document_positions
from longext.errors import ConfigError
from longext.rope.spec import ROPE_METHODS, compute_inv_freq, rope_parameters
from longext.rope.windows import join_windows, trained_window
from longext.training.tuning import make_trainable
from longext.training.windows import document_lengths, rotated_by_document

L, N = 12, 44
ROWS = [[5, 12, 13, 14], [44], [11, 1, 12, 12, 8]]  # tokens of the documents of each row; the second is one long one
LONG = [1.0, 2.0, 5.0, 9.0]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def longrope(short, long):
    return {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.0,
        "original_max_position_embeddings": L, "short_factor": short, "long_factor": long,
    }  # fmt: skip


def wide(model):
    """The model in float64, norms too, which transformers computes in float32."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "Gemma3RMSNorm"):
            module.forward = types.MethodType(_norm, module)
    return model.double()


def _norm(self, x):
    is_gemma = hasattr(self, "eps")
    epsilon = self.eps if is_gemma else self.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (self.weight + is_gemma)


def tiny(family="llama", short=(1.0,) * 4, long=LONG):
    torch.manual_seed(0)
    rope = longrope(list(short), list(long))
    if family == "llama":
        return wide(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)))
    local = {"rope_type": "default", "rope_theta": 1e3}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, layer_types=kinds, sliding_window=64,
        rope_parameters={"sliding_attention": local, "full_attention": rope},
    )  # fmt: skip
    return wide(Gemma3ForCausalLM(config))


def mixed_batch():
    """A batch of three rows, and the documents in it: (row, start, tokens)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (len(ROWS), N), generator=generator)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in ROWS])
    labels, spans = ids.clone(), []
    for number, row in enumerate(ROWS):
        starts = np.cumsum([0, *row[:-1]])
        labels[number, starts] = -100
        spans += [(number, int(start), size) for start, size in zip(starts, row, strict=True)]
    positions = torch.stack([document_positions(row) for row in documents])
    return {"input_ids": ids, "labels": labels, "document_ids": documents}, positions, spans


def separately(models, batch, spans, variant, wrap=lambda model: model):
    """Loss and gradients of every document alone, in the model of its length; `models` have the same weights."""
    total, sums, count = 0.0, {}, 0
    for row, start, size in spans:
        part = {name: x[row : row + 1, start : start + size] for name, x in batch.items()}
        scored = int((part["labels"][:, 1:] != -100).sum())
        if not scored:
            continue
        part["document_ids"] = torch.zeros_like(part["document_ids"])
        model = models[size > L]
        loss, found = gradients(model, part, variant, network=wrap(model))
        total, count = total + loss * scored, count + scored
        for name, gradient in found.items():
            sums[name] = sums.get(name, 0) + gradient * scored
    return total / count, {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("variant", ["full", "s2"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_mixed_batch_is_its_documents_in_two_models(family, variant):
    batch, positions, spans = mixed_batch()
    mixed, short, long = tiny(family), tiny(family, long=(1.0,) * 4), tiny(family, short=LONG)
    expected_loss, expected = separately((short, long), batch, spans, variant)
    with rotated_by_document(mixed, L):
        loss, found = gradients(mixed, batch, variant, positions=positions)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert worst(found, expected) < 1e-10
    plain_loss, _ = gradients(mixed, batch, variant, positions=positions)
    assert abs(plain_loss - expected_loss) > 1e-6  # transformers takes one window for the whole batch


def test_adapters_and_checkpointed_layers_are_the_same():
    from longext.training.config import FinetuneConfig
    from longext.training.loading import enable_checkpointing

    def adapted(model, checkpointed):
        network, _ = make_trainable(model, FinetuneConfig(model="x", data="sample", tuning="lora", lora_r=4), "x")
        network.double()
        torch.manual_seed(5)
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0, 0.3)
        if checkpointed:
            enable_checkpointing(model, offload=False)
        return network

    batch, positions, spans = mixed_batch()
    models = tiny(long=(1.0,) * 4), tiny(short=LONG)
    networks = {id(model): adapted(model, False) for model in models}
    expected_loss, expected = separately(models, batch, spans, "s2", lambda model: networks[id(model)])
    mixed = tiny()
    network = adapted(mixed, True)
    with rotated_by_document(mixed, L):
        loss, found = gradients(mixed, batch, "s2", network=network, positions=positions)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert worst(found, expected) < 1e-10


def test_evaluation_is_left_to_transformers_and_the_hook_goes():
    model = tiny().eval()
    ids = torch.arange(N)[None] % 60
    with torch.no_grad():
        expected = [model(ids[:, :n]).logits for n in (L, N)]
        with rotated_by_document(model, L):
            found = [model(ids[:, :n]).logits for n in (L, N)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not model.model.rotary_emb._forward_hooks


def test_lengths_of_documents_follow_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2], [6] * 6]


# --- the RoPE that is written -----------------------------------------------------------------------------------------


def module_of(spec):
    rope = rope_parameters(spec)
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=512,
                    rope_parameters=rope)
    )  # fmt: skip


@pytest.mark.parametrize("method", [name for name in METHODS if not ROPE_METHODS[name].follows_length])
def test_short_texts_keep_their_rotation_bit_for_bit_and_long_ones_get_the_new(method):
    original = spec_for("none", 64, 1e4, 1.0, 512)
    new = spec_for(method, 64, 1e4, 8.0, 512, **{**example(method, 64), "attention_factor": None})
    joined = join_windows(original, new, 4096)
    assert (joined.method, joined.factor, joined.original_max_position_embeddings) == ("longrope", 8.0, 512)
    module, plain = module_of(joined), module_of(original)
    x, positions = torch.zeros(1), torch.arange(512)[None]
    assert all(torch.equal(a, b) for a, b in zip(module(x, positions), plain(x, positions), strict=True))
    module(x, torch.tensor([[512]]))
    np.testing.assert_allclose(module.inv_freq.double(), compute_inv_freq(new, 4096)[0], rtol=1e-6)
    assert module.attention_scaling == 1.0


def test_a_model_trained_with_a_scaled_rope_keeps_that_in_its_own_window():
    original = spec_for("yarn", 64, 1e4, 4.0, 512)
    joined = join_windows(original, spec_for("yarn", 64, 1e4, 16.0, 512), 8192)
    assert trained_window(original) == joined.original_max_position_embeddings == 2048
    frequencies, temperature = compute_inv_freq(joined, 2048)
    expected, expected_temperature = compute_inv_freq(original)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-12)
    assert temperature == expected_temperature


@pytest.mark.parametrize(
    ("method", "keys", "text"),
    [
        ("dynamic", {}, "Two windows need one RoPE each, and `dynamic` follows the length"),
        ("yarn", {"attention_factor": 1.2}, "Two windows share one temperature, that of the original RoPE \\(1\\)"),
    ],
)
def test_what_two_windows_cannot_be(method, keys, text):
    with pytest.raises(ConfigError, match=text):
        join_windows(spec_for("none", 64, 1e4, 1.0, 512), spec_for(method, 64, 1e4, 8.0, 512, **keys), 4096)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_short_row_is_cut_into_pieces_that_begin_at_nothing():
    row = {"input_ids": torch.arange(10), "labels": torch.arange(10), "document_ids": torch.tensor([0] * 7 + [1] * 3)}
    short = Windows(3, 1.0).place(copy.deepcopy(row), short=True)
    assert short["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2]
    assert short["document_ids"].tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert short["labels"].tolist() == [-100, 1, 2, -100, 4, 5, -100, -100, 8, 9]
    long = Windows(3, 0.0).place(copy.deepcopy(row), short=False)
    assert long["position_ids"].tolist() == [*range(7), 0, 1, 2]
    assert torch.equal(long["labels"], row["labels"])


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 30), (0.5, 50), (1.0, 100)])
def test_the_share_of_short_rows_is_kept_in_every_stretch(share, count):
    short = [Windows(8, share).is_short(index) for index in range(100)]
    assert sum(short) == count
    assert all(abs(sum(short[i : i + 10]) - 10 * share) < 1 for i in range(90))
