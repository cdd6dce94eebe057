"""Properties of compressors: what is seen, what is not, and what must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compressors import (
    SEGMENT,
    VARIANTS,
    gradient_of,
    make_compressor,
    make_document,
    make_spec,
    random_ids,
    tiny_llama,
)
from families import tiny_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longext.compressor.architectures.beacon import beacon_mask
from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor, build_compressor
from longext.compressor.config import CompressConfig
from longext.compressor.gradients import Sweep
from longext.compressor.independent import causal_mask, prefix_mask
from longext.compressor.memory import MemoryStore, num_bytes, num_slots
from longext.compressor.objectives import Batch, Objectives, compare_gradients
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.segments import reconstruction_segments, split_segments
from longext.compressor.settings import document_length, spec_of
from longext.compressor.spec import CompressorSpec, check_spec
from longext.errors import ConfigError
from longext.settings import build_config, find_recipe
from longext.training.loading import enable_checkpointing

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Identity(Compressor):
    """Remembers every token's own keys and values: ratio 1."""

    recurrent = True

    def write(self, segment, memory, first_slot):
        embeds = self.embed(segment.tokens)
        positions = num_slots(memory) + torch.arange(embeds.shape[1])
        mask = causal_mask(embeds.shape[1])
        _, captured = self.backbone.run_and_capture(embeds, slice(None), positions, memory, mask)
        return self.backbone.project(captured, torch.arange(first_slot, first_slot + embeds.shape[1])[None])


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "olmo2", "gemma3_text"])
def test_identity_compressor_is_full_attention(family):
    """Positions, masks, boundary labels: memories that are the raw keys and values give the model's own loss."""
    model = tiny_model(family, attention="sdpa").double().eval()
    identity = Identity(Backbone(model), CompressorSpec(segment=5, ratios=(1,), sink=0, rank=1))
    ids = torch.randint(3, 60, (2, 15))
    document = Sweep(split_segments(ids, ids, identity.spec, [1] * 3), identity)
    store, losses = document.new_store(), []
    with torch.no_grad():
        for t in range(3):
            loss, _ = identity.step(document.segments[t], store.view(0, t), 0, loss=True, write=False)
            losses.append(loss)
            if t < 2:
                store.put(t, document.write(t, store))
        logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(torch.stack(losses).sum(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_off_is_the_base_model_bit_for_bit(variant):
    ids = random_ids(2, 2)
    expected = tiny_llama()(ids).logits
    model = tiny_llama()
    make_compressor(variant, model)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_segment_of_a_frozen_reader_is_the_base_model(variant):
    compressor = make_compressor(variant, tiny_llama())
    if compressor.trains_reader:
        pytest.skip("its reader is trained")
    ids = random_ids(2, 3)
    hidden = compressor.read(make_document(compressor, ids).segments[0], ())
    expected = tiny_llama()(ids[:, :SEGMENT]).logits
    assert torch.equal(compressor.backbone.logits(hidden), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_know_nothing_of_one_another(variant):
    """One after the other, or side by side in a batch: each as if it were alone."""
    compressor = make_compressor(variant)
    ids = random_ids(2, 4)
    alone = [gradient_of(compressor, make_document(compressor, row[None]), "exact") for row in ids]
    again = gradient_of(compressor, make_document(compressor, ids[:1]), "exact")
    assert again[0] == alone[0][0] and torch.equal(again[1], alone[0][1])
    loss, gradient = gradient_of(compressor, make_document(compressor, ids), "exact")
    assert loss == pytest.approx(alone[0][0] + alone[1][0], rel=1e-10)
    torch.testing.assert_close(gradient, alone[0][1] + alone[1][1], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("policy", "offload"), [("exact", False), ("full", False), ("full", True)])
def test_checkpointing_changes_no_gradient(variant, policy, offload):
    """Also in one graph, where other adapters are active when a layer is run again, and with layer inputs moved."""
    plain = make_compressor(variant)
    ids = random_ids(2, 4)
    loss, expected = gradient_of(plain, make_document(plain, ids), policy)
    checked = make_compressor(variant)
    checked.load_state_dict(plain.state_dict())
    checked.backbone.enable_checkpointing(checked.adapters, offload, enable_checkpointing)
    found_loss, found = gradient_of(checked, make_document(checked, ids), policy)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_reaches_the_loss_under_checkpointing(variant):
    """transformers drops caches there: the loss would be that without memory, and nothing would say so."""
    compressor = make_compressor(variant)
    compressor.backbone.enable_checkpointing(compressor.adapters, False, enable_checkpointing)
    document = make_document(compressor, random_ids(1, 3))
    store = document.new_store()
    for t in range(2):
        store.put(t, document.write(t, store))
    memory = store.view(*document.schedule.span(2))
    other = tuple(x + torch.randn_like(x) for x in memory)
    assert abs(document.read(2, memory)[0] - document.read(2, other)[0]) > 1e-5


def test_ratios_are_nested():
    """The memories of ratio 8 are every second memory of ratio 4, from the same weights."""
    compressor = make_compressor("uio")
    ids = random_ids(2, 1)
    fine, coarse = (compressor.encode(ids, ratio, torch.tensor([3, 3])) for ratio in (4, 8))
    for a, b in zip(fine[1::2], coarse[1::2], strict=True):  # values: keys are rotated to other slots
        torch.testing.assert_close(a[..., 1::2, :], b, **TIGHT)
    moved = compressor.backbone.rerotate(tuple(x[..., 1::2, :][..., :1, :] for x in fine), -1)
    for a, b in zip(moved, coarse, strict=True):
        torch.testing.assert_close(a, b[..., :1, :], rtol=1e-6, atol=1e-6)  # transformers' float32 cos and sin


def test_probes_see_their_prefix_and_nothing_else():
    compressor = make_compressor("uio")
    ids = random_ids(1, 1)
    before = compressor.encode(ids, 4, torch.tensor([0]))
    for changed in (3, 4, 11, 15):
        other = ids.clone()
        other[0, changed] = 1
        after = compressor.encode(other, 4, torch.tensor([0]))
        for i in range(4):
            # the first layer's input of a probe is its vector, whatever the text: look from the second layer on
            same = all(torch.equal(a[..., i, :], b[..., i, :]) for a, b in zip(before[2:], after[2:], strict=True))
            assert same == (changed >= (i + 1) * 4), (changed, i)


def test_text_rows_do_not_see_probes():
    compressor = make_compressor("uio")
    ids = random_ids(1, 1)
    embeds, positions, mask = compressor._inputs(ids, 4)
    with compressor.adapters.use("encoder"):
        with_probes = compressor.backbone.run(embeds, positions, mask=mask)[:, :SEGMENT]
        without = compressor.backbone.run(embeds[:, :SEGMENT])
    torch.testing.assert_close(with_probes, without, **TIGHT)


def test_raw_rows_of_beacon_do_not_see_the_beacons_of_their_segment():
    compressor = make_compressor("beacon")
    segment = make_document(compressor, random_ids(1, 3)).segments[1]
    loss, _ = compressor.step(segment, (), 0, loss=True, write=True)
    alone, _ = compressor.step(segment, (), 0, loss=True, write=False)
    torch.testing.assert_close(loss, alone, **TIGHT)


@pytest.mark.parametrize("variant", ["beacon", "icae-kv"])
def test_a_fused_projection_carries_one_adapter(variant):
    """Their queries and keys are adapted in two calls; a second adapter on the same layer would run untrained."""
    compressor = make_compressor(variant, tiny_model("phi3", attention="eager").double(), overlap=0)
    hooks = [len(attention.qkv_proj._forward_hooks) for attention in compressor.backbone.attentions]
    assert hooks == [1] * len(hooks)


@pytest.mark.parametrize("variant", ["autocompressor", "rmt"])
def test_writing_does_not_change_the_loss(variant):
    compressor = make_compressor(variant)
    segment = make_document(compressor, random_ids(1, 3)).segments[0]
    loss, _ = compressor.step(segment, (), 0, loss=True, write=True)
    torch.testing.assert_close(loss, compressor.loss(compressor.read(segment, ()), segment), **TIGHT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_segment_sees_the_future(variant):
    """A changed token changes no loss of an earlier segment, and within its own no earlier position."""
    compressor = make_compressor(variant)
    ids = random_ids(1, 4)
    other = ids.clone()
    other[0, 2 * SEGMENT + 5] = 1
    states = []
    for tokens in (ids, other):
        document = make_document(compressor, tokens)
        store, hidden = document.new_store(), []
        with torch.no_grad():
            for t in range(4):
                hidden.append(
                    compressor.read(document.segments[t], store.view(*document.schedule.span(t)) if t else ())
                )
                if t < 3:
                    store.put(t, document.write(t, store))
        states.append(torch.cat(hidden, 1))
    changed = (states[0] != states[1]).any(-1)[0]
    assert not changed[: 2 * SEGMENT + 5].any()
    assert changed[2 * SEGMENT + 5]
    # the prefix control is blind: a later segment differs only where the overlap shows it the token
    assert changed[3 * SEGMENT :].any() or variant == "prefix"


def test_masks_row_by_row():
    assert prefix_mask(4, 2).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]
    assert beacon_mask(4, 2, 1).int().tolist()[5:] == [[1, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]]


def test_padding_changes_nothing():
    """A short document beside a long one in a batch counts as it would alone."""
    compressor = make_compressor("uio")
    objectives = Objectives(parse_objectives("lm"), parse_policy("exact"), 0)
    long, short = random_ids(1, 5, 1), random_ids(1, 3, 2)[:, :-4]
    padded = F.pad(short, (0, long.shape[1] - short.shape[1]), value=0)
    masked = F.pad(short, (0, long.shape[1] - short.shape[1]), value=-100)

    def gradient(tokens, labels, count):
        compressor.zero_grad()
        batch = Batch(tokens, labels, torch.tensor(count), 7, 1.0, 1.0)
        loss = objectives.backward(compressor, batch)["documents"]
        return loss, torch.cat([p.grad.flatten() for n, p in compressor.named_parameters() if n != "repeat"])

    both = gradient(torch.cat([long, padded]), torch.cat([long, masked]), [80, 44])
    alone = [gradient(long, long, [80]), gradient(padded, masked, [44]), gradient(short, short, [44])]
    torch.testing.assert_close(both[0], alone[0][0] + alone[2][0], **TIGHT)
    torch.testing.assert_close(both[1], alone[0][1] + alone[2][1], rtol=1e-8, atol=1e-11)
    assert torch.equal(alone[1][0], alone[2][0])


def test_checkpoint_of_memories_holds_their_bytes_alone():
    """A view of the encoder's output would keep all of it alive, as the released code does."""
    compressor = make_compressor("uio")
    document = make_document(compressor, random_ids(2, 4))
    store = MemoryStore((), document.slots)
    for t in range(3):
        store.put(t, document.write(t, store))
    slots = sum(document.slots)
    assert (
        num_bytes(store.tensors) == 3 * 2 * 2 * 2 * slots * 8 * 8
    )  # layers, k and v, rows, heads, slots, width, bytes


def test_reconstruction_asks_with_the_trained_vector():
    compressor = make_compressor("uio")
    ids = random_ids(2, 1)
    segments = reconstruction_segments(ids, 4, 1)
    document = Sweep(segments, compressor)
    _, gradient = gradient_of(compressor, document, "full")
    assert compressor.repeat.grad.any()
    torch.testing.assert_close(gradient_of(compressor, document, "exact")[1], gradient, **TIGHT)
    assert (segments[1].labels == torch.where(torch.arange(SEGMENT) < 1, -100, ids)).all()


def test_divergence_equals_the_full_softmax_and_vanishes_for_the_teacher():
    compressor = make_compressor("uio")
    backbone, ids = compressor.backbone, random_ids(2, 2)
    backbone.loss_chunk = 5
    (teacher,) = backbone.teacher_states(ids, [(SEGMENT, 2 * SEGMENT)])
    model = backbone.model
    expected = model(ids).logits[:, SEGMENT:]
    torch.testing.assert_close(backbone.logits(teacher), expected, **TIGHT)
    student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
    scored = torch.rand(2, SEGMENT) < 0.7
    found = backbone.divergence(student, teacher, scored)
    p, q = expected.log_softmax(-1), backbone.logits(student).log_softmax(-1)
    reference = ((p.exp() * (p - q)).sum(-1) * scored).sum()
    torch.testing.assert_close(found, reference, **TIGHT)
    torch.testing.assert_close(*torch.autograd.grad(found, student), *torch.autograd.grad(reference, student), **TIGHT)
    assert abs(backbone.divergence(teacher, teacher, scored)) < 1e-12


def test_a_teacher_reads_what_its_window_holds():
    backbone, ids = Backbone(tiny_llama(max_position_embeddings=2 * SEGMENT + 3)), random_ids(2, 4)
    spans = [(t * SEGMENT, (t + 1) * SEGMENT) for t in range(4)]
    for (start, stop), states in zip(spans, backbone.teacher_states(ids, spans), strict=True):
        first = max(0, stop - backbone.window)
        expected = backbone.model(ids[:, first:stop]).logits[:, start - stop :]
        torch.testing.assert_close(backbone.logits(states), expected, **TIGHT)


def test_gradient_check_reports_and_keeps_the_gradients():
    compressor = make_compressor("uio")
    ids = random_ids(1, 5)
    batch = Batch(ids, ids, torch.tensor([80]), 0, 1.0, 1.0)
    for parameter in compressor.parameters():
        parameter.grad = torch.ones_like(parameter)
    exact = compare_gradients(compressor, Objectives({"lm": 1.0}, parse_policy("exact"), 0), batch)
    assert exact == pytest.approx({"cosine": 1.0, "relative_error": 0.0, "norm_ratio": 1.0}, abs=1e-9)
    window = compare_gradients(compressor, Objectives({"lm": 1.0}, parse_policy("window:1"), 0), batch)
    assert window["relative_error"] > 0.05
    assert all(bool((p.grad == 1).all()) for p in compressor.parameters())


def test_the_position_budget_is_the_papers():
    """W = 4096, l = 1024: 97 segments (99,328 tokens) at 32x and 25 (25,600) at 8x (arXiv 2406.18173, section 4)."""
    spec = CompressorSpec(segment=1024, ratios=(8, 32), sink=0)
    assert [spec.schedule(4096, ratio).max_segments * 1024 for ratio in (32, 8)] == [99_328, 25_600]
    hybrid = CompressorSpec(segment=128, ratios=(32,), sink=1, overlap=128)
    assert hybrid.schedule(512, 32).max_segments == 1 + (512 - 1 - 256) // 4 + 1


def test_the_recipe_for_smollm2_reads_128000_tokens():
    config = build_config(CompressConfig, find_recipe("compress/smollm2-128k"), [], {})
    spec = spec_of(config, 8192)
    assert spec.schedule(8192, 16).max_segments * spec.segment == 129_024 >= 128_000
    assert document_length(config, spec, 8192) == 4096


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("uio", {"ratios": (3,)}, "does not divide"),
        ("uio", {"segment": 250, "ratios": (2,)}, "no room for memories"),
        ("uio", {"memory": "soft"}, "must be kv"),
        ("gist", {"sink": 1}, "--sink 0"),
        ("rmt", {"ratios": (4, 8)}, "one --ratio"),
        ("uio", {"ratios": (4, 4)}, "different"),
        ("uio", {"sink": SEGMENT}, "must be below --segment"),
        ("uio", {"segment": 64, "overlap": 128, "ratios": (1,)}, "no room for memories"),
    ],
)
def test_impossible_specs_are_refused(variant, changes, said):
    import dataclasses

    with pytest.raises(ConfigError, match=said):
        check_spec(dataclasses.replace(make_spec(variant), **changes), 256)


def test_a_model_without_our_cache_seams_is_refused():
    with pytest.raises(ConfigError, match="cannot put memories"):
        Backbone(tiny_model("falcon"))
    hybrid = tiny_model("llama")
    hybrid._is_stateful = True  # layers with a state, as Falcon-H1 has beside its attention
    with pytest.raises(ConfigError, match="cannot put memories"):
        Backbone(hybrid)


def test_attention_that_takes_no_mask_is_refused():
    """As flash-attn: without its mask a probe would read what stands behind it."""
    AttentionInterface.register("blind", lambda *args, **keys: sdpa_attention_forward(*args[:4], None, **keys))
    model = tiny_model("llama", attention="sdpa")
    model.set_attn_implementation("blind")
    with pytest.raises(ConfigError, match="use --attention sdpa or eager"):
        build_compressor(Backbone(model), CompressorSpec(segment=8, rank=1))
