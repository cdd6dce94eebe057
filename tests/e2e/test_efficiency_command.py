"""`longext eval efficiency` on a model and on an untrained compressor, as a user types it."""

from __future__ import annotations

import json

import pytest
import torch

from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, load_backbone, save_compressor
from longext.compressor.spec import CompressorSpec

SMALL = ("--num-new-tokens", 2, "--num-repeats", 1)
POSITION = 2 * 4 * 2 * 64 * 4  # books-5m: keys and values, layers, KV heads, head size, float32


@pytest.fixture
def compressor(tmp_path):
    """A directory with an untrained UIO on books-5m: segments of 64, ratios 4 and 8."""
    base = find_base("books-5m")
    backbone, _ = load_backbone(base, device="cpu")
    torch.manual_seed(0)
    made = build_compressor(backbone, CompressorSpec(segment=64, ratios=(4, 8), rank=4, alpha=8.0))
    (tmp_path / "uio").mkdir()
    save_compressor(tmp_path / "uio", made, base)
    return tmp_path / "uio"


def test_a_compressor_against_full_attention(run, tmp_path, compressor):
    result = run("eval", "efficiency", "uio", "--lengths", "128,1024", *SMALL, "--device", "cpu", "-o", "out")
    assert result.exit_code == 0, result.output
    for text in ("books-5m + uio", "uio 4x", "window", "4,096", "full at 1,024."):
        assert text in result.stdout
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["kind"] == "efficiency"
    assert "live tensors" in record["protocol"]["memory"]
    points = {(p["way"], p["ratio"], p["length"]): p for p in record["results"]}
    assert len(points) == 8
    assert points["full", None, 1024]["kv_bytes"] == POSITION * 1024
    assert points["window", None, 1024]["kv_bytes"] == POSITION * 512
    assert points["uio", 8, 1024]["kv_bytes"] == POSITION * (1 + 15 * 8 + 64)
    assert all(p["kv_bytes"] == p["kv_bytes_formula"] and p["prefill_seconds"] > 0 for p in record["results"])
    assert (tmp_path / "out/efficiency.png").stat().st_size > 10_000


def test_a_plain_model(run, tmp_path):
    args = ("--lengths", "64,96", "--window", 32, *SMALL, "--device", "cpu", "--json", "-o", "out")
    record = json.loads(run("eval", "efficiency", "books-5m", *args).stdout)
    assert [(p["way"], p["length"], p["slots"]) for p in record["results"]] == [
        ("full", 64, 64),
        ("window", 64, 32),
        ("full", 96, 96),
        ("window", 96, 32),
    ]
    assert record["protocol"]["notes"] == []


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("nowhere",), "No model at 'nowhere'"),
        (("uio", "--lengths", "64,128"), "--lengths must be above the segment's 64 tokens"),
        (("uio", "--ratio", "3"), "A ratio of 3 does not divide"),
        (("uio", "--revision", "abc", "--trust-remote-code"), "takes no `revision`, `trust_remote_code`"),
        (("uio", "--lengths", "128,128"), "--lengths must be different"),
        (("uio", "--num-repeats", 0), "`num_repeats` must be >= 1"),
        (("uio", "--window", 1), "`window` must be >= 2"),
        (("books-5m", "--ratio", "8"), "--ratio and --base are for the directory of a trained compressor"),
        ((), "Missing: model"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, compressor, args, text):
    result = run("eval", "efficiency", *args, "-o", "out")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert text in result.stderr
    assert not (tmp_path / "out").exists()
