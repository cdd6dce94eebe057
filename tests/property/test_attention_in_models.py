"""What must hold for S2-Attn inside real transformers models, family by family."""

from __future__ import annotations

import pytest
import torch
from families import CONFIGS, tiny_model
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from longext.attention.layout import Layout, make_layout
from longext.attention.shifted import AttentionPlan, check_model, register_attention
from longext.attention.variant import ATTENTION_VARIANTS
from longext.errors import ConfigError

register_attention()
CAPPED = {"gemma2"}  # soft-capped scores: full attention is eager there
ALTERNATING = {"gemma2", "gemma3_text", "olmo3", "mistral"}  # some layers slide
OWN_ATTENTION = {"falcon", "stablelm"}  # attention of their own: training refuses them
TEXT = sorted(set(CONFIGS) - {"gemma3"} - OWN_ATTENTION)
HEADS = [(4, 4), (4, 2), (4, 1), (6, 3), (5, 5), (5, 1), (9, 3)]


def llama(heads=4, kv_heads=2, layers=2):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8 * heads,
        head_dim=8,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def forward(model, ids, variant="s2", group_size=8, **kwargs):
    """Logits in train mode under a variant; keywords go to the layout or the model."""
    implementation = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(ATTENTION_VARIANTS[variant].implementation)
    layout = make_layout(
        *ids.shape,
        kwargs.pop("attention_mask", None),
        kwargs.pop("document_ids", None),
        kwargs.pop("separate_documents", False),
    )
    plan = AttentionPlan(layout, group_size)
    logits = model.train()(ids, attention_plan=plan, use_cache=False, **kwargs).logits
    model.set_attn_implementation(implementation)
    return logits


def leaks(model, variant, length=32, group_size=8):
    """Pairs (position read, later position changed) whose logits move."""
    ids = torch.randint(3, 60, (1, length))
    with torch.no_grad():
        before = forward(model, ids, variant, group_size)
        pairs = []
        for later in range(1, length):
            changed = ids.clone()
            changed[0, later] = (changed[0, later] + 7) % 57 + 3
            moved = (forward(model, changed, variant, group_size) - before).abs().amax(-1)[0]
            pairs += [(read, later) for read in range(later) if moved[read] > 1e-6]
    return pairs


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("group_size", [7, 8])
def test_nothing_sees_the_future(heads, kv_heads, group_size):
    assert leaks(llama(heads, kv_heads), "s2", 30, group_size) == []


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_a_variant_sees_the_future_if_it_says_so(variant):
    assert bool(leaks(llama(), variant)) == ATTENTION_VARIANTS[variant].leaks


def test_the_wrapped_variant_leaks_as_the_papers_code_does():
    """With one layer the first half group reads the last one: 4 x 4 pairs at 32 tokens and groups of 8."""
    pairs = leaks(llama(layers=1), "s2-wrapped")
    assert pairs == [(read, later) for later in range(28, 32) for read in range(4)]


@pytest.mark.parametrize("family", TEXT)
def test_eval_mode_is_full_attention_bit_for_bit(family):
    attention = "eager" if family in CAPPED else "sdpa"
    model = tiny_model(family, attention=attention).eval()
    ids = torch.randint(3, 60, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cases = [{}, {"attention_mask": mask}]
    with torch.no_grad():
        expected = [model(ids, **case).logits for case in cases]
        model.set_attn_implementation("s2_attn")
        if family in CAPPED:
            with pytest.raises(ConfigError, match="eager"):
                model(ids)
            return
        for case, logits in zip(cases, expected, strict=True):
            assert torch.equal(model(ids, **case).logits, logits)


def test_generation_in_eval_mode_is_that_of_sdpa():
    model = llama().eval()
    ids = torch.randint(3, 60, (2, 20))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    model.set_attn_implementation("s2_attn")
    found = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", TEXT)
def test_a_group_as_long_as_the_row_is_full_attention(family):
    """Forward and backward equal the model's own eager full attention, sliding layers included."""
    ours, theirs = tiny_model(family), tiny_model(family).train()
    ids = torch.randint(3, 60, (2, 40))
    weight = torch.randn(2, 40, 64)
    logits, expected = forward(ours, ids, "s2", 40), theirs(ids, use_cache=False).logits
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        tolerance = 1e-5 * max(1.0, float(b.grad.abs().max()))
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", TEXT)
def test_a_row_alone_equals_the_row_in_a_padded_batch(family):
    model = tiny_model(family)
    lengths, width = (40, 27, 9), 40
    ids = torch.randint(3, 60, (3, width))
    for side in ("right", "left"):
        mask = torch.zeros_like(ids)
        positions = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            real = slice(0, length) if side == "right" else slice(width - length, width)
            mask[row, real] = 1
            positions[row, real] = torch.arange(length)
        batch = forward(model, ids, attention_mask=mask, position_ids=positions)
        for row in range(3):
            kept = mask[row].bool()
            alone = forward(model, ids[row][kept][None])
            torch.testing.assert_close(batch[row][kept], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TEXT)
def test_packed_documents_equal_separate_ones(family):
    model = tiny_model(family)
    lengths = (17, 3, 20)
    ids = torch.randint(3, 60, (1, 40))
    documents = torch.tensor([[d for d, n in enumerate(lengths) for _ in range(n)]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = forward(model, ids, document_ids=documents, separate_documents=True, position_ids=positions)
    start = 0
    for length in lengths:
        alone = forward(model, ids[:, start : start + length])
        torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-5, atol=1e-5)
        start += length
    joined = forward(model, ids, document_ids=documents, position_ids=positions)
    assert not torch.allclose(packed, joined)  # without the option, documents do attend to one another


def test_checkpointing_changes_no_gradient():
    plain, recomputed = llama(), llama()
    recomputed.load_state_dict(plain.state_dict())
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 60, (1, 32))
    for model in (plain, recomputed):
        model.set_attn_implementation("s2_attn")  # and it stays: the backward pass runs attention again
        forward(model, ids).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_without_a_plan_groups_are_a_quarter_of_the_row():
    model = llama()
    ids = torch.randint(3, 60, (2, 32))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    expected = forward(model, ids, attention_mask=mask)
    model.set_attn_implementation("s2_attn")
    found = model.train()(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_what_training_attention_refuses():
    model = llama().train()
    model.set_attn_implementation("s2_attn")
    ids = torch.randint(3, 60, (1, 16))
    with pytest.raises(ConfigError, match="4-D|2-D"):
        model(ids, attention_mask=torch.ones(1, 1, 16, 16, dtype=torch.bool), use_cache=False)
    with pytest.raises(ConfigError, match="not told of packed rows"):  # whose documents saw one another
        model(ids, position_ids=torch.arange(16)[None] % 8, use_cache=False)
    cache = model.eval()(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="use_cache=False"):
        model.train()(ids, past_key_values=cache)


@pytest.mark.parametrize(("family", "whole"), [("llama", 2), ("mistral", 0), ("gemma3_text", 1)])
def test_layers_that_see_everything_are_counted(family, whole):
    assert check_model(tiny_model(family)) == whole


def test_a_window_that_is_in_the_mask_alone_bounds_the_row():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    chunked = Llama4TextConfig(
        **sizes, num_key_value_heads=1, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=1,
        attention_chunk_size=16, layer_types=["chunked_attention"], pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM(chunked).train()
    check_model(model)
    ids = torch.randint(3, 60, (1, 24))
    assert torch.allclose(forward(model, ids[:, :16], "full"), model(ids[:, :16]).logits, atol=1e-6)
    with pytest.raises(ConfigError, match="keeps to 16 tokens by its mask alone"):
        forward(model, ids, "full")


def test_attention_sinks_are_refused_before_anything_is_trained():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    experts = {"num_key_value_heads": 1, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 1}
    with pytest.raises(ConfigError, match="attention sinks"):
        check_model(GptOssForCausalLM(GptOssConfig(**sizes, **experts, pad_token_id=0)))


def test_layout_of_unpadded_rows_needs_no_index():
    assert make_layout(2, 8, torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.int64)) == Layout(2, 8)


def test_rows_are_cut_only_where_tokens_meet_in_attention_once_a_layer():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    twice = DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    check_model(twice, shared=True)
    with pytest.raises(ConfigError, match="DiffLlamaForCausalLM attends more than once"):
        check_model(twice, swept=True)
    mixing = tiny_model("llama")
    mixing.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out + out.roll(1, 1))
    check_model(mixing)
    for how in ("swept", "shared"):
        with pytest.raises(ConfigError, match="mixes tokens outside attention"):
            check_model(mixing, **{how: True})


def test_a_model_that_computes_with_the_mask_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: kwargs["attention_mask"].dtype, with_kwargs=True
    )
    with pytest.raises(ConfigError, match="attention interface"):
        check_model(model)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_families_are_known_to_take_the_plan_or_refused(family):
    model = tiny_model(family).train()
    if family in OWN_ATTENTION:
        with pytest.raises(ConfigError, match="attention interface"):
            check_model(model)
    else:
        check_model(model, swept=True, shared=True)
    assert model.training
    assert model.config.get_text_config()._attn_implementation == "eager"
