"""A session reads as training reads: token by token, at once, after a question, from a file, past its window."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from families import CONFIGS
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import BaseModel, LoadedCompressor
from longext.compressor.gradients import Sweep
from longext.compressor.memory import num_slots
from longext.compressor.reading.session import Session
from longext.compressor.segments import split_segments
from longext.compressor.spec import CompressorSpec
from longext.errors import CheckpointError, ConfigError, LongextError
from longext.models.decode import Sampler

TOLERANCE = {"rtol": 0.0, "atol": 1e-8}
KINDS = [(arch, memory) for arch in COMPRESSORS for memory in COMPRESSORS[arch].memories]
LENGTH = 2 * 16 + 7  # two boundaries and a tail


def make(arch, memory="kv", *, window=256, seed=0, **sizes):
    """A compressor in float64 whose adapters and vectors are random, not zero."""
    torch.manual_seed(seed)
    config = CONFIGS["llama"]()
    config.max_position_embeddings = window
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(exact_norm, module)
    values = {"segment": 16, "ratios": (4,), "sink": 0 if arch == "gist" else 1, "overlap": 3, "rank": 4, "alpha": 8}
    compressor = build_compressor(Backbone(model), CompressorSpec(arch=arch, memory=memory, **(values | sizes)))
    compressor.double()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return compressor


def exact_norm(module, hidden):
    """RMSNorm in the dtype of its input: transformers' own rounds to float32 on the way."""
    return module.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def document(length=LENGTH, seed=1):
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def batch_logits(compressor, tokens, ratio=4):
    """[N, V]: what training's own segments, store and read give; the first segment holds its sink itself."""
    tokens = tokens[None]
    count = -(-tokens.shape[1] // compressor.spec.segment)
    trained = Sweep(split_segments(tokens, tokens, compressor.spec, [ratio] * count), compressor)
    store, found = trained.new_store(), []
    for t, segment in enumerate(trained.segments):
        memory = store.view(*trained.schedule.span(t)) if t else ()
        found.append(compressor.backbone.logits(compressor.read(segment, memory))[0])
        if t < count - 1:
            seen = memory if compressor.recurrent else ()
            store.put(t, compressor.write(segment, seen, store.bounds[t]))
    return torch.cat(found)


def disk(compressor, base="weights"):
    return LoadedCompressor(compressor, None, BaseModel("base", None, Path("base"), base), Path("compressor"))


def same(a, b):
    torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize(("arch", "memory"), KINDS)
@pytest.mark.parametrize("overlap", [3, 20])
def test_token_by_token_equals_at_once_equals_training(arch, memory, overlap):
    compressor, tokens = make(arch, memory, overlap=overlap), document()
    expected = batch_logits(compressor, tokens)
    slow = Session(compressor)
    for place, token in enumerate(tokens.tolist()):
        slow.absorb([token])
        same(slow.logits(), expected[place])
    for length in (1, 15, 16, 17, 32, 33, LENGTH):
        fast = Session(compressor)
        fast.absorb(tokens[:length])
        same(fast.logits(), expected[length - 1])
    assert slow.num_tokens == LENGTH
    assert slow.num_slots == fast.num_slots
    for one, other in zip(slow.memory, fast.memory, strict=True):
        same(one, other)


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_reading_in_uneven_parts_changes_nothing(arch, memory):
    compressor, tokens = make(arch, memory), document()
    session = Session(compressor)
    for part in tokens.split([5, 1, 20, 2, 11]):
        session.absorb(part)
        if len(part) > 1:
            session.logits()
    same(session.logits(), batch_logits(compressor, tokens)[-1])


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_generate_equals_choosing_the_best_token_each_time(arch, memory):
    compressor, tokens = make(arch, memory), document(30)
    session, seen = Session(compressor), []
    session.absorb(tokens)
    new = session.generate(8, on_token=seen.append)  # across the boundary at 32
    text = torch.cat([tokens, torch.tensor(new)])
    assert new == batch_logits(compressor, text)[29:-1].argmax(-1).tolist()
    assert seen == new
    assert session.num_tokens == 38


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_the_repeat_token_may_stand_anywhere(arch, memory):
    """In the sink and in a segment that is compressed: a long answer to it becomes memory too."""
    session = Session(make(arch, memory))
    session.absorb([-1, *document(20).tolist(), -1])
    assert session.logits().isfinite().all()


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_asking_leaves_the_session_as_it_was(arch, memory):
    compressor, tokens, question = make(arch, memory), document(28), document(3, seed=2)
    session = Session(compressor)
    session.absorb(tokens)
    before, held = session.logits(), session.memory
    first = session.ask(question, 12)  # fills the tail and compresses it
    assert session.memory is held
    assert session.num_tokens == 28
    assert session.ask(question, 12) == first
    same(session.logits(), before)
    session.absorb(question)
    assert session.generate(12) == first


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_bytes_are_those_of_the_tensors(arch, memory):
    compressor = make(arch, memory)
    session = Session(compressor)
    session.absorb(document(70))
    assert session.num_bytes == sum(tensor.nbytes for tensor in session.memory) > 0
    assert session.num_slots == (1 if compressor.reads_last else 4) * 4
    assert num_slots(session.memory) - session.num_slots == (0 if memory == "soft" or arch == "gist" else 1)


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_a_saved_session_goes_on_where_it_stopped(arch, memory, tmp_path):
    loaded, tokens = disk(make(arch, memory)), document()
    session = Session.of(loaded)
    session.absorb(tokens)
    session.save(tmp_path / "a.safetensors")
    again = Session.load(tmp_path / "a.safetensors", loaded)
    assert torch.equal(again.logits(), session.logits())
    assert (again.num_tokens, again.num_slots, again.num_bytes) == (LENGTH, session.num_slots, session.num_bytes)
    assert again.generate(20) == session.generate(20)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_two_documents_in_sequence_equal_each_alone(arch, memory):
    compressor, one, two = make(arch, memory), document(), document(50, seed=3)
    session = Session(compressor)
    for tokens in (one, two):
        session.reset()
        session.absorb(tokens)
        same(session.logits(), batch_logits(compressor, tokens)[-1])


@pytest.mark.parametrize(("arch", "memory"), KINDS)
def test_what_does_not_fit_slides_out(arch, memory):
    compressor, tokens = make(arch, memory, window=64), document(400)
    session, sizes = Session(compressor, when_full="forget"), []
    for part in tokens.split(16):
        session.absorb(part)
        sizes.append((session.num_bytes, session.num_slots))
        spec = compressor.spec
        assert spec.sink + session.num_slots + spec.overlap + spec.segment <= 64
    assert max(sizes) == max(sizes[:14])
    assert (session.num_forgotten > 0) == (not compressor.reads_last)
    at_once = Session(compressor, when_full="forget")
    at_once.absorb(tokens)
    assert (at_once.num_slots, at_once.num_forgotten) == (session.num_slots, session.num_forgotten)
    # transformers makes angles in float32: keys that moved differ from keys made in place by its rounding
    torch.testing.assert_close(at_once.logits(), session.logits(), rtol=0, atol=1e-4)


def test_keys_that_slide_are_rotated_and_values_are_not():
    compressor, tokens = make("uio", window=64), document(200)
    session = Session(compressor, when_full="forget")
    length = next(n for n in range(17, 200, 16) if _absorbed(session, tokens, n).num_forgotten)
    before = _absorbed(session, tokens, length - 16).memory
    after = _absorbed(session, tokens, length).memory
    dropped = session.num_forgotten // 4
    for layer in range(2):
        keys, values = before[2 * layer][..., 1 + dropped :, :], before[2 * layer + 1][..., 1 + dropped :, :]
        kept = keys.shape[-2]
        moved = compressor.backbone.rerotate(tuple(t[..., 1 + dropped :, :] for t in before), -dropped)
        same(after[2 * layer][..., 1 : 1 + kept, :], moved[2 * layer])
        same(after[2 * layer + 1][..., 1 : 1 + kept, :], values)
        same(after[2 * layer][..., :1, :], before[2 * layer][..., :1, :])


def _absorbed(session, tokens, length):
    session.reset()
    for part in tokens[:length].split(16):
        session.absorb(part)
    return session


def test_an_error_names_the_longest_document_and_absorbs_nothing():
    compressor = make("uio", window=64)
    session = Session(compressor, when_full="refuse")
    longest = compressor.schedule(4).max_segments * 16
    session.absorb(document(longest))
    with pytest.raises(ConfigError, match=str(longest)):
        session.absorb([1])
    assert session.num_tokens == longest
    assert session.num_forgotten == 0
    session.logits()


@pytest.mark.parametrize("ratio", [1, 2, 8, 16])
def test_nested_ratios_need_no_training(ratio):
    compressor, tokens = make("uio"), document()
    session = Session(compressor, ratio=ratio)
    session.absorb(tokens)
    assert session.num_slots == 2 * 16 // ratio
    same(session.logits(), batch_logits(compressor, tokens, ratio)[-1])


@pytest.mark.parametrize(
    ("arch", "sizes", "ratio", "text"),
    [
        ("uio", {}, 3, "does not divide"),
        ("uio", {"window": 35}, 1, "no room"),
        ("gist", {}, 8, "trained at 4"),
        ("beacon", {"ratios": (4, 8)}, 2, "trained at 4, 8"),
    ],
)
def test_ratios_that_cannot_be_are_refused(arch, sizes, ratio, text):
    with pytest.raises(ConfigError, match=text):
        Session(make(arch, **sizes), ratio=ratio)


def test_ends_at_the_end_of_sequence():
    session = Session(make("uio"))
    session.absorb(document(5))
    first = session.ask([], 1)[0]
    session.eos = frozenset({first})
    assert session.generate(10) == [first]


def test_the_repeat_token_may_ask():
    session = Session(make("icae", "soft"))
    session.absorb(document(16))
    assert len(session.ask([-1], 16)) == 16


def test_sampling_repeats_with_its_seed_and_follows_top_p():
    session = Session(make("uio"))
    session.absorb(document(20))
    with session.snapshot():
        greedy = session.generate(6)
    draws = []
    for seed, top_p in ((0, 1.0), (0, 1.0), (1, 1.0), (2, 1e-9)):
        with session.snapshot():
            draws.append(session.generate(6, temperature=5.0, top_p=top_p, seed=seed))
    assert draws[0] == draws[1] != draws[2]
    assert draws[3] == greedy
    with pytest.raises(LongextError, match="not finite"):
        Sampler(1.0)(torch.tensor([[1.0, float("inf")]]))


def test_nothing_is_read_where_nothing_is_given(monkeypatch):
    session = Session(make("uio", ratios=(4, 8)), ratio=[8])
    assert session.ratio == 8
    session.absorb([])
    assert session.ask(document(20), 3) == session.ask(document(20), 3)
    session.absorb(document(20))
    session.logits()
    monkeypatch.setattr(Cache, "crop", None)  # a crop by 0 drops everything in some versions of transformers
    with session.snapshot():
        pass


def test_wrong_tokens_and_nothing_to_continue_are_refused():
    session = Session(make("uio"))
    with pytest.raises(ConfigError, match="nothing to continue"):
        session.logits()
    with pytest.raises(ConfigError, match="Token id 64"):
        session.absorb([1, 64])
    assert session.num_tokens == 0


def test_a_failure_while_compressing_loses_nothing(monkeypatch):
    compressor, tokens = make("autocompressor", "soft"), document()
    session = Session(compressor)
    session.absorb(tokens[:20])
    write, calls = compressor.write, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        return write(*args)

    monkeypatch.setattr(compressor, "write", fails_later)
    with pytest.raises(MemoryError):
        session.absorb(document(60))
    monkeypatch.undo()
    session.absorb(tokens[20:])
    same(session.logits(), batch_logits(compressor, tokens)[-1])


def test_a_foreign_memory_is_refused(tmp_path):
    loaded, path = disk(make("uio")), tmp_path / "a.safetensors"
    session = Session.of(loaded)
    session.absorb(document())
    session.save(path)
    other = disk(make("uio", seed=1))
    with pytest.raises(CheckpointError, match="another compressor"):
        Session.load(path, other)
    with pytest.raises(CheckpointError, match="another compressor"):
        Session.load(path, disk(make("gist", overlap=0)))
    with pytest.raises(CheckpointError, match="another base model"):
        Session.load(path, dataclasses.replace(loaded, base=dataclasses.replace(loaded.base, weights="other")))
    with pytest.raises(CheckpointError, match="No memory file"):
        Session.load(tmp_path / "none.safetensors", loaded)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no readable safetensors header.*damaged"):
        Session.load(path, loaded)


def test_a_damaged_memory_is_one_line(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    compressor, path = make("anchor"), tmp_path / "a.memory"
    one = Session.of(disk(compressor))
    one.absorb(document())
    one.save(path)
    with safe_open(path, "pt") as file:
        said, tensors = file.metadata()["longext"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    heads = {name: tensor.repeat(1, 2, 1, 1) for name, tensor in tensors.items() if name.startswith("memory.")}
    for changed, text in (
        (heads, said),
        ({}, said.replace('"num_segments": 2', '"num_segments": 3')),
        ({}, said.replace(f'"num_tokens": {LENGTH}', '"num_tokens": 5')),
        ({"sink": tensors["before"].clone()}, said),
    ):
        save_file({**tensors, **changed}, path, {"longext": text})
        with pytest.raises(CheckpointError, match="damaged"):
            Session.load(path, disk(compressor))
