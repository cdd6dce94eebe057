"""Position remapping against its definition: every pair of tokens its own relative position, one softmax, float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from longext.attention import merged
from longext.attention.banded import BandPlan, Rotation, StepPlan
from longext.attention.bands import REMAPS, remap_spec
from longext.attention.pieces import Piece, cut_intervals

HEADS, KV_HEADS, SIZE, PAIRS = 4, 2, 20, 8  # four dimensions of a head stay unrotated
TRAINED = 24
ROTATION = Rotation(10000.0 ** (-torch.arange(PAIRS, dtype=torch.float64) / PAIRS), 1.1, True)

# distance that query i and key j are made to have, written from the papers' formulas, one token pair at a time
DISTANCES = {
    "rerope": lambda i, j, p: min(i - j, p["window"]),
    "leaky-rerope": lambda i, j, p: i - j if i - j < p["window"] else p["window"] + (i - j - p["window"]) / p["k"],
    "selfextend": lambda i, j, p: (
        i - j if i - j < p["window"] else i // p["group"] + p["window"] - p["window"] // p["group"] - j // p["group"]
    ),
    "string": lambda i, j, p: i - j if i - j < p["shift"] else i - j - p["shift"] + p["window"],
    "window": lambda i, j, p: i - j if i - j < p["window"] else (min(i, p["window"]) - j if j < p["sinks"] else None),
}


def _lampe(i, j, p):
    def m(position):
        return position * p["reach"] // (p["target"] - 1)

    return i - j if i - j <= p["window"] else m(i) - m(j) + p["window"] - m(p["window"]) - 1


def _dca(i, j, p):
    size = p["chunk"] - p["window"]
    age = i // size - j // size
    at = [i % size, min(i % size + size, p["chunk"]), min(2 * size - 1, p["chunk"])][min(age, 2)]
    return at - j % size


def _dpe(i, j, p):
    if i - j < p["window"]:
        return [i - j] * PAIRS
    sizes = [p["factors"][pair * len(p["factors"]) // PAIRS] for pair in range(PAIRS)]
    return [i // G + p["window"] - p["window"] // G - j // G for G in sizes]


DISTANCES |= {"lampe": _lampe, "dca": _dca, "dpe": _dpe}
CASES = [
    ("rerope", {"window": 7}),
    ("leaky-rerope", {"window": 6, "k": 3.5}),
    ("leaky-rerope", {"window": 1, "k": 2, "logn": True}),
    ("selfextend", {"window": 5, "group": 3}),
    ("selfextend", {}),
    ("string", {"shift": 8, "window": 3}),
    ("lampe", {"window": 6, "reach": 15, "temperature": 1.07}),
    ("dpe", {"window": 5, "factors": "2-5-3"}),
    ("dca", {"chunk": 12, "window": 2, "temperature": "yarn"}),
    ("dca", {"chunk": 11, "window": 5, "logn": True}),
    ("window", {"window": 9, "sinks": 3}),
    ("window", {}),
]


def _spec(name, given, target=90):
    return remap_spec(name, TRAINED, target, PAIRS, given)


def _inputs(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, heads, length, SIZE, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def _dense(q, k, v, spec, scale):
    """Attention as the definition says it: score = (R q)(k) with R the rotation by the pair's distance."""
    length = q.shape[2]
    parameters = {**spec.values, "target": spec.target_length}
    distances = torch.zeros(length, length, PAIRS, dtype=torch.float64)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            distance = DISTANCES[spec.method](i, j, parameters)
            if distance is not None:
                seen[i, j] = True
                distances[i, j] = torch.tensor(distance, dtype=torch.float64)
    angles = distances * ROTATION.inv_freq
    cos, sin = angles.cos(), angles.sin()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    qa, qb, qr = q[..., :PAIRS], q[..., PAIRS : 2 * PAIRS], q[..., 2 * PAIRS :]
    ka, kb, kr = k[..., :PAIRS], k[..., PAIRS : 2 * PAIRS], k[..., 2 * PAIRS :]
    same = torch.einsum("bhip,bhjp,ijp->bhij", qa, ka, cos) + torch.einsum("bhip,bhjp,ijp->bhij", qb, kb, cos)
    cross = torch.einsum("bhip,bhjp,ijp->bhij", qa, kb, sin) - torch.einsum("bhip,bhjp,ijp->bhij", qb, ka, sin)
    scores = (same + cross) * ROTATION.scaling**2 + qr @ kr.transpose(-1, -2)
    if spec.logn:
        number = torch.arange(length, dtype=torch.float64)
        scores = scores * (torch.log(number + 1) / math.log(TRAINED)).clip(min=1)[:, None]
    scores = scores * spec.temperature**2 * scale
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 5, 23, 64])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_a_method_is_its_definition_forward_and_backward(name, given, length):
    spec = _spec(name, given)
    q, k, v = _inputs(2, length)
    expected = _dense(q, k, v, spec, 0.3)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    found = BandPlan(spec, ROTATION, 0, length, q).attend(q, k, v, 0.3)
    assert torch.allclose(found, expected, atol=1e-10, rtol=1e-10)
    for own, reference in zip(torch.autograd.grad((found * weights).sum(), (q, k, v)), gradients, strict=True):
        assert torch.allclose(own, reference, atol=1e-10, rtol=1e-10)


def test_blocks_are_written_as_torch_compile_traces_them():
    """Its functional form of a write into `unfold`ed blocks sets the tokens between them to zero."""
    x, into = torch.zeros(1, 1, 10, 1), torch.ones(1, 1, 2, 3, 1)

    def write(x: torch.Tensor) -> torch.Tensor:
        out = x + 5
        merged._blocks(out, 2, 1, 4, 3).copy_(into)
        return out

    expected = torch.tensor([5.0, 1, 1, 1, 5, 1, 1, 1, 5, 5])
    assert torch.equal(torch.func.functionalize(write)(x).flatten(), expected)


def test_every_method_has_a_definition_here():
    assert set(DISTANCES) == set(REMAPS)
    assert {name for name, _ in CASES} == set(REMAPS)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_reading_in_pieces_and_step_by_step_is_reading_at_once(name, given):
    spec, length = _spec(name, given), 41
    q, k, v = (x.detach() for x in _inputs(1, length))
    whole = BandPlan(spec, ROTATION, 0, length, q).attend(q, k, v, 0.3)
    for first, stop in ((0, 13), (13, 14), (14, 41)):
        piece = BandPlan(spec, ROTATION, first, stop - first, q).attend(
            q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop], 0.3
        )
        assert torch.allclose(piece, whole[:, :, first:stop], atol=1e-10)
    for last in range(length):
        step = StepPlan(spec, ROTATION, torch.zeros(1, dtype=torch.int64), last + 1, q)
        own = step.attend(q[:, :, last : last + 1], k[:, :, : last + 1], v[:, :, : last + 1], 0.3)
        assert torch.allclose(own[:, :, 0], whole[:, :, last], atol=1e-10)


@pytest.mark.parametrize("block", [7, 1024])
def test_the_definition_as_a_kernel_is_the_fused_one(block, monkeypatch):
    """It runs where torch has no fused kernel that returns its log-sum-exp: float32 on CUDA, MPS."""
    monkeypatch.setattr(merged, "_QUERIES", block)
    q, k, v = _inputs(2, 23)
    weights = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for piece in (Piece("until", 0, 23, 0, 23), Piece("from", 0, 23, 0, 23), Piece("all", 2, 9, 5, 7, 2, 11, 9)):
        found = []
        for kernel in (merged._CPU, merged._PLAIN):
            out = merged.attend_pieces([merged.Part(q, k, 0, 0, [piece])], v, 23, 0.3, kernel)
            found.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
        for fused, plain in zip(*found, strict=True):
            assert torch.allclose(fused, plain, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "given", "query", "expected"),
    [
        ("dca", {"chunk": 12, "window": 2}, 13, {0: 12, 5: 7, 9: 3, 12: 1}),
        ("dca", {"chunk": 12, "window": 2}, 19, {0: 12, 5: 7, 9: 3, 12: 7, 19: 0}),
        ("dca", {"chunk": 12, "window": 2}, 25, {0: 12, 5: 7, 9: 3, 12: 10, 19: 3, 23: 2}),
        ("selfextend", {"window": 4, "group": 4}, 9, {0: 5, 3: 5, 6: 3, 9: 0}),
        ("selfextend", {"window": 4, "group": 4}, 20, {0: 8, 3: 8, 6: 7, 9: 6, 12: 5, 15: 5, 18: 2}),
        ("string", {"shift": 6, "window": 2}, 20, {0: 16, 3: 13, 6: 10, 9: 7, 12: 4, 15: 5, 18: 2}),
        ("leaky-rerope", {"window": 4, "k": 4}, 20, {0: 8, 3: 7.25, 6: 6.5, 9: 5.75, 12: 5, 15: 4.25, 18: 2}),
        ("leaky-rerope", {"window": 4, "k": 4}, 9, {0: 5.25, 3: 4.5, 6: 3}),
    ],
)  # fmt: skip
def test_distances_are_those_of_the_papers(name, given, query, expected):
    spec = remap_spec(name, 16, 64, PAIRS, given)
    at = torch.tensor([float(query)], dtype=torch.float64)
    found = {}
    for band in spec.bands:
        for key in expected:
            if float(band.start(at).clip(min=0)) <= key < min(float(band.stop(at)), query + 1):
                found[key] = float(band.query(at) - band.key(torch.tensor([float(key)], dtype=torch.float64)))
    assert found == expected


def _random_intervals(seed):
    generator = np.random.default_rng(seed)
    length = int(generator.integers(1, 40))
    ends = np.sort(generator.integers(0, 40, length))
    slow = np.cumsum(generator.integers(0, 2, length)) + int(generator.integers(0, 5))
    start = np.minimum(np.sort(generator.integers(0, 30, length)), slow) if seed % 2 else slow // 2
    return np.maximum.accumulate(start).astype(np.int64), np.maximum(ends, slow if seed % 3 else 0).astype(np.int64)


@pytest.mark.parametrize("seed", range(60))
def test_pieces_hold_what_is_seen_exactly_once(seed):
    start, stop = _random_intervals(seed)
    count = np.zeros((len(start), max(1, int(stop.max()))), dtype=np.int64)
    for piece in cut_intervals(start, stop):
        for block in range(piece.count):
            for t in range(piece.queries):
                first, end = {"all": (0, piece.keys), "until": (0, t + 1), "from": (t, piece.keys)}[piece.kind]
                row = piece.query_start + block * piece.query_step + t
                at = piece.key_start + block * piece.key_step
                count[row, at + first : at + end] += 1
    keys = np.arange(count.shape[1])
    assert (count == ((keys >= start[:, None]) & (keys < stop[:, None]))).all()


def test_work_does_not_grow_with_the_square_of_the_text():
    """The near band of 4,096 queries is two calls; a window's pieces hold about two keys a query and place."""
    for method in ("leaky-rerope", "window"):
        spec = remap_spec(method, 256, 4096, PAIRS, {"window": 128})
        plan = BandPlan(spec, ROTATION, 0, 4096, torch.zeros(1))
        assert sum(len(pieces) for pieces, *_ in plan.bands) <= 8
    near = plan.bands[0][0]
    assert sum(piece.count * piece.queries * piece.keys for piece in near) <= 2 * 4096 * 128 + 2 * 128**2
