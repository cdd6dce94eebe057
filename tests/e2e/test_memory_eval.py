"""Evaluation with a memory as a user types it: `eval ppl --memory`, `passkey --memory`, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, load_backbone, save_compressor
from longext.compressor.spec import CompressorSpec
from longext.evals.memory.controls import METHODS

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ("--max-tokens", 600, "--num-places", 3, "--num-bootstrap", 20)


@pytest.fixture(scope="module")
def made_uio(tmp_path_factory):
    """An untrained compressor of books-5m, segment 32, ratios 8 and 16."""
    return make(tmp_path_factory.mktemp("made") / "uio", "uio", (8, 16))


@pytest.fixture
def uio(made_uio, tmp_path):
    """A copy of it in the working directory."""
    return shutil.copytree(made_uio, tmp_path / "uio")


def make(directory, arch, ratios, memory="kv"):
    torch.manual_seed(0)
    base = find_base("books-5m")
    backbone, _ = load_backbone(base, device="cpu")
    spec = CompressorSpec(arch=arch, segment=32, ratios=ratios, sink=1, memory=memory, rank=4, alpha=8.0)
    directory.mkdir()
    save_compressor(directory, build_compressor(backbone, spec), base)
    return directory


def result_of(run, directory, *args):
    outcome = run("eval", "ppl", *args, "-o", directory)
    assert outcome.exit_code == 0, outcome.output
    for name in ("result.json", "table.md", "run.json", "recipe.yaml", "ppl.png"):
        assert (directory / name).is_file(), name
    return json.loads((directory / "result.json").read_text()), outcome.stdout


def refused(outcome, *texts):
    """Exit code 2, one line, no traceback."""
    assert outcome.exit_code == 2, outcome.output
    assert "Traceback" not in outcome.output
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for text in texts:
        assert text in lines[0], lines[0]


@pytest.mark.pictures
def test_a_compressor_needs_no_model_and_brings_its_segment(run, tmp_path, uio):
    record, out = result_of(run, tmp_path / "p", "--memory", "uio@16", "--lengths", "0,64,128", *SMALL)
    assert record["protocol"]["id"] == "ppl/next-segment"
    assert record["protocol"]["segment"] == 32
    assert record["model"]["memory"]["ratio"] == 16
    assert record["model"]["id"] == "books-5m + uio@16"
    rows = {(row["method"], row["length"]): row for row in record["results"]}
    assert set(rows) == {(method, length) for method in METHODS for length in (0, 64, 128)}
    assert len({row["nll"] for (_, length), row in rows.items() if length == 0}) == 1
    for length in (64, 128):
        own = rows["memory", length]
        assert own["num_readable"] == 1 + length // 16
        assert own["num_tokens"] == own["num_places"] * 31
        assert own["ppl_low"] <= own["ppl"] <= own["ppl_high"]
        for method in METHODS[1:]:
            assert rows[method, length]["difference"] == pytest.approx(own["nll"] - rows[method, length]["nll"])
    table = (tmp_path / "p/table.md").read_text()
    for text in (*METHODS, "positions: before the segment", "below 0", "first quarter", "last quarter"):
        assert text in table
        assert text in out


def test_a_run_comes_back_from_its_recipe(run, tmp_path, uio):
    first, _ = result_of(run, tmp_path / "p", "books-5m", "--memory", uio, "--lengths", "0,64", *SMALL)
    again, _ = result_of(run, tmp_path / "q", "-c", tmp_path / "p/recipe.yaml", "--force")
    assert [row["nll"] for row in again["results"]] == [row["nll"] for row in first["results"]]


def test_lengths_follow_the_segment_when_none_are_named(run, tmp_path):
    record, _ = result_of(
        run, tmp_path / "p", "books-5m", "--memory", "none", "--segment", 96, "--num-places", 2, "--num-bootstrap", 0
    )
    assert sorted({row["length"] for row in record["results"]}) == [0, 576, 1056, 2112, 4128]


@pytest.mark.parametrize(
    ("spec", "size"), [("none", 0), ("window:100", 100), ("streaming:4+60", 64), ("transformer-xl:64", 64)]
)
def test_untrained_memories(run, tmp_path, spec, size):
    record, out = result_of(
        run, tmp_path / "p", "books-5m", "--memory", spec, "--segment", 32, "--lengths", "0,128", *SMALL
    )
    rows = {(row["method"], row["length"]): row for row in record["results"]}
    assert ("constant prefix", 128) not in rows
    assert rows["memory", 128]["num_readable"] == size
    assert rows["memory", 0]["nll"] == rows["no memory", 0]["nll"]
    if spec == "none":
        assert rows["memory", 128]["nll"] == pytest.approx(rows["no memory", 128]["nll"])
    else:
        assert rows["memory", 128]["nll"] < rows["no memory", 128]["nll"]  # a real model gains by real context
    assert f"books-5m + {'no memory' if spec == 'none' else spec}" in out


def test_a_longer_rope_makes_room_for_a_longer_window(run, tmp_path):
    record, _ = result_of(
        run, tmp_path / "p", "books-5m", "--method", "yarn", "--factor", 2, "--memory", "window", *SMALL,
        "--lengths", "0,256",
    )  # fmt: skip
    assert record["model"]["memory"]["size"] == 1024 - 128


@pytest.mark.parametrize("protocol", ["sliding", "positional"])
def test_other_protocols_score_through_the_memory(run, tmp_path, uio, protocol):
    flags = ("--protocol", protocol, "--lengths", 160, "--stride", 64, "--max-tokens", 400, "--num-bootstrap", 10)
    record, out = result_of(run, tmp_path / "p", "--memory", uio, *flags)
    assert record["protocol"]["id"] == f"ppl/{protocol}"
    assert record["model"]["memory"]["compressor"]["arch"] == "uio"
    assert f"(ppl/{protocol})" in out


def test_a_window_that_holds_all_gives_the_plain_perplexity(run, tmp_path):
    flags = ("--protocol", "sliding", "--lengths", 200, "--stride", 100, "--max-tokens", 400, "--num-bootstrap", 0)
    plain, _ = result_of(run, tmp_path / "p", "books-5m", *flags)
    read, _ = result_of(run, tmp_path / "q", "books-5m", "--memory", "streaming:4+196", *flags)
    assert read["results"][0]["nll"] == pytest.approx(plain["results"][0]["nll"], rel=1e-5)


def test_soft_and_recurrent_compressors(run, tmp_path):
    make(tmp_path / "auto", "autocompressor", (8,), "soft")
    record, _ = result_of(run, tmp_path / "p", "--memory", "auto", "--lengths", "0,64", *SMALL)
    assert {row["method"] for row in record["results"]} == set(METHODS)


@pytest.mark.parametrize("spec", ["window:100", "uio@8"])
def test_passkey(run, tmp_path, uio, spec):
    model = () if spec.startswith("uio") else ("books-5m",)
    outcome = run(
        "passkey", *model, "--memory", spec, "--lengths", 160, "--depths", "0.5", "--num-trials", 2, "-o", "k"
    )
    assert outcome.exit_code == 0, outcome.output
    record = json.loads((tmp_path / "k/result.json").read_text())
    assert record["model"]["memory"]["spec"] == spec
    assert f"books-5m + {'no memory' if spec == 'none' else spec}" in outcome.stdout


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("books-5m", "--memory", "windw:4"), ("'windw:4'", "Did you mean 'window'", "compress-train")),
        (("books-5m", "--memory", "no/such/dir"), ("no/such/dir", "compressor.json", "streaming:4+N")),
        (("books-5m", "--memory", "uio@x"), ("@RATIO", "'x'")),
        (("--memory", "uio@3", "--lengths", "0,64"), ("ratio of 3 does not divide", "32 tokens")),
        (("--memory", "uio@32", "--segment", 64, "--lengths", "0,64"), ("--segment 64", "32 tokens")),
        (("--memory", "uio", "--lengths", "0,48"), ("multiples of the segment 32", "48")),
        (("--memory", "uio", "--lengths", "64,64"), ("--lengths",)),
        (("--memory", "uio", "--method", "yarn", "--factor", 2), ("--method yarn", "trained on it")),
        (("--memory", "uio", "--factor", 2), ("--factor 2 needs a --method",)),
        (("--memory", "window:64"), ("Missing: model",)),
        (("books-5m", "--memory", "window:x"), ("window:N", "'x'")),
        (("books-5m", "--memory", "window:500"), ("512 positions", "at most 384", "--segment")),
        (("books-5m", "--memory", "streaming:64"), ("streaming:4+N",)),
        (("books-5m", "--memory", "streaming:4+500"), ("512 positions",)),
        (("books-5m", "--memory", "transformer-xl"), ("transformer-xl:N",)),
        (("books-5m", "--memory", "none:4"), ("takes no size",)),
        (("books-5m", "--memory", "none", "--segment", 1024, "--lengths", "0,1024"), ("512 positions",)),
        (("books-5m", "--memory", "none", "--segment", 1, "--lengths", "0,4"), ("--segment must be >= 2",)),
        (("books-5m", "--memory", "window", "--num-places", 0), ("`num_places` must be >= 1",)),
        (("books-5m", "--memory", "window", "--device", "map"), ("one device",)),
        (("books-5m", "--memory", "window", "--max-tokens", 600), ("4224 tokens", "600", "--max-tokens")),
        (("books-5m", "--protocol", "next-segment"), ("give --memory",)),
        (("books-5m", "--method", "dynamic", "--factor", 2, "--memory", "streaming:4+60"), ("dynamic RoPE",)),
        (("books-5m", "--memory", "window", "--protocol", "slidng"), ("Unknown protocol 'slidng'",)),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, tmp_path, uio, args, texts):
    refused(run("eval", "ppl", *args, "-o", "p"), *texts)
    assert not (tmp_path / "p").exists()


def test_another_model_than_the_compressors_is_refused(run, tmp_path, uio):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS["books-5m"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    refused(run("eval", "ppl", "other", "--memory", "uio", "-o", "p"), "other weights")


def test_passkey_refuses_the_same(run, uio):
    refused(run("passkey", "--memory", "uio@5", "-o", "k"), "ratio of 5 does not divide")
    refused(run("passkey", "--memory", "window", "-o", "k"), "Missing: model")
    refused(run("passkey", "books-5m", "--memory", "wndow", "-o", "k"), "Did you mean 'window'")
