"""The benchmark's restatement of the published training loop against our policies, draw for draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from compressors import gradient_of, make_compressor, make_document, random_ids

FILE = Path(__file__).parents[2] / "benchmarks" / "compressor_gradients.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("compressor_gradients_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts(compressor, gradient):
    """(encoder and memory vector, transfer head) of a flat gradient."""
    sizes = [p.numel() for p in compressor.parameters()]
    named = dict(zip([name for name, _ in compressor.named_parameters()], gradient.split(sizes), strict=True))
    transfer = [g for name, g in named.items() if ".transfer." in name]
    return torch.cat([g for name, g in named.items() if ".transfer." not in name]), torch.cat(transfer)


@pytest.mark.parametrize(("size", "sink", "seed"), [(1, 0, 0), (2, 0, 1), (2, 1, 2), (3, 1, 3)])
def test_the_released_loop_is_the_raw_reservoir_with_an_exact_transfer_head(benchmark, size, sink, seed):
    compressor = make_compressor("uio", sink=sink, overlap=0, ratios=(4,))
    document = make_document(compressor, random_ids(2, 9, seed))
    loss, raw = gradient_of(compressor, document, f"reservoir-raw:{size}", seed)
    _, exact = gradient_of(compressor, document, "exact")
    compressor.zero_grad()
    total, zeros = benchmark.released_reservoir(document, size, np.random.default_rng(seed))
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in compressor.parameters()])
    assert float(total) == pytest.approx(loss, rel=1e-10)
    encoder, transfer = parts(compressor, found)
    (raw_encoder, raw_transfer), (exact_encoder, exact_transfer) = parts(compressor, raw), parts(compressor, exact)
    torch.testing.assert_close(encoder, raw_encoder, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(transfer, exact_transfer, rtol=1e-8, atol=1e-12)
    for ours, other in ((transfer, raw_transfer), (encoder, exact_encoder)):
        assert (ours - other).norm() > 0.05 * other.norm()  # a difference worth the name
    assert 0 <= zeros <= 8 - size


def test_every_column_of_the_benchmark_runs(benchmark):
    compressor = make_compressor("uio", sink=0, overlap=0, ratios=(4,))
    document = make_document(compressor, random_ids(1, 4))
    for policy in benchmark.POLICIES:
        compressor.zero_grad()
        benchmark.runner(document, policy)()
        assert compressor.vector.grad.any(), policy
