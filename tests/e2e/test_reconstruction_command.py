"""`longext eval reconstruction` on an untrained compressor, as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, load_backbone, save_compressor
from longext.compressor.spec import CompressorSpec
from longext.models.answer_file import Journal

SMALL = ("--num-samples", 6, "--num-bootstrap", 20, "--max-tokens", 600)


@pytest.fixture(scope="module")
def made_compressor(tmp_path_factory):
    """A directory with an untrained UIO on books-5m: segments of 32, ratios 4 and 8."""
    base = find_base("books-5m")
    backbone, _ = load_backbone(base, device="cpu")
    torch.manual_seed(0)
    made = build_compressor(backbone, CompressorSpec(segment=32, ratios=(4, 8), rank=4, alpha=8.0))
    directory = tmp_path_factory.mktemp("made")
    save_compressor(directory, made, base)
    return directory


@pytest.fixture
def compressor(made_compressor, tmp_path):
    """A copy of it in the working directory."""
    return shutil.copytree(made_compressor, tmp_path / "uio")


def test_tables_json_and_picture(run, tmp_path, compressor):
    result = run("eval", "reconstruction", "uio", *SMALL, "--content", "text,shuffled,random", "-o", "out")
    assert result.exit_code == 0, result.output
    for text in ("greedy decoding", "teacher-forced", "bits saved per token", "random"):
        assert text in result.stdout
    header, _, first = (tmp_path / "out/table.md").read_text().split("\n| content")[1].splitlines()[:3]
    column = header.split("|").index(" segments ")
    assert first.split("|")[1:][column].strip() == "6"
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["kind"] == "reconstruction"
    assert record["model"]["compressor"]["segment"] == 32
    assert record["data"]["num_segments_available"] == 600 // 32
    places = [(row["content"], row["ratio"], row["slots"]) for row in record["results"]]
    assert places == [(c, r, 32 // r) for c in ("text", "shuffled", "random") for r in (4, 8)]
    for row in record["results"]:
        metrics = row["metrics"]
        assert row["num_tokens"] == 6 * 31  # the sink token is not scored
        assert metrics["ce_memory"]["low"] <= metrics["ce_memory"]["mean"] <= metrics["ce_memory"]["high"]
        saved = (metrics["ce_none"]["mean"] - metrics["ce_memory"]["mean"]) / torch.log(torch.tensor(2.0)).item()
        assert metrics["bits_saved"]["mean"] == pytest.approx(saved, abs=1e-6)
        assert len(row["examples"]) == 3
    of = {row["content"]: row["metrics"] for row in record["results"] if row["ratio"] == 8}
    assert of["text"]["ce_base"]["mean"] < of["shuffled"]["ce_base"]["mean"] < of["random"]["ce_base"]["mean"]
    assert (tmp_path / "out/reconstruction.png").stat().st_size > 10_000

    # what came back, scored again without the compressor
    again = run("eval", "reconstruction", "--predictions", "out/answers.jsonl", "--num-bootstrap", 20, "-o", "again")
    assert again.exit_code == 0, again.output
    given = json.loads((tmp_path / "again/result.json").read_text())
    for row, old in zip(given["results"], record["results"], strict=True):
        kept = {name: value for name, value in old["metrics"].items() if name in row["metrics"]}
        assert row == {**old, "metrics": kept, "slots": None, "seconds": None}
        assert list(kept) == ["bleu", "sentence_bleu", "rouge_l", "exact_prefix", "exact_match"]


def test_other_ratios_batches_and_json(run, compressor):
    args = ("eval", "reconstruction", "uio", *SMALL, "--ratio", "16", "--json")
    one, many = (json.loads(run(*args, "--batch-tokens", size, "-o", f"o{size}").stdout) for size in (32, 4096))
    for a, b in zip(one["results"], many["results"], strict=True):
        assert a["examples"] == b["examples"]
        assert a["metrics"]["ce_memory"]["mean"] == pytest.approx(b["metrics"]["ce_memory"]["mean"], rel=1e-5)


def test_a_run_that_was_cut_off_goes_on_with_what_it_scored(run, tmp_path, compressor, monkeypatch):
    args, scored, add = ("eval", "reconstruction", "uio", *SMALL, "--batch-tokens", 64), [], Journal.add

    def cut(self, rows):
        add(self, rows)
        scored.extend(rows)
        if len(scored) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", cut)
    assert run(*args, "-o", "out").exit_code == 130
    assert run(*args, "-o", "out").exit_code == 0
    assert len(scored) == len(set(scored)) == 12  # six segments at two ratios, none of them twice
    assert run(*args, "-o", "whole").exit_code == 0
    found, expected = (
        [{**row, "seconds": 0} for row in json.loads((tmp_path / name / "result.json").read_text())["results"]]
        for name in ("out", "whole")
    )
    assert found == expected


def test_a_compressor_that_is_loaded_as_a_memory_has_its_own_segment(compressor):
    from longext import load

    assert load("books-5m", memory=str(compressor)).segment == 32
    assert load("books-5m", memory="window:64").segment == 128


def test_notes_say_what_was_not_as_asked(run, compressor):
    out = run("eval", "reconstruction", "uio", "--max-tokens", 96, "--ratio", "16", "-o", "out").stdout
    assert "Ratio 16: not trained (trained: 4, 8)." in out
    assert "has 3 segments of 32 tokens: all of them were used" in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("books-5m",), "is no trained compressor"),
        (("uio", "--ratio", "5"), "A ratio of 5 does not divide the compressor's segments of 32 tokens"),
        (("uio", "--ratio", "4,4"), "got 4,4"),
        (("uio", "--device", "map"), "the model on one device"),
        (("uio", "--set", "revision=abc"), "takes no `revision`"),
        (("uio", "--content", "txt"), "Did you mean 'text'"),
        (("uio", "--content", "text,text"), "--content must be different"),
        (("uio", "--num-samples", 0), "`num_samples` must be >= 1"),
        (("uio", "--data", "nowhere.txt"), "No data at 'nowhere.txt'"),
        (("uio", "--max-tokens", 20), "No document has a segment of 32 tokens: the longest has 20"),
        (("uio", "--base", "nowhere"), "No model at 'nowhere'"),
        ((), "Missing: model"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, compressor, args, text):
    result = run("eval", "reconstruction", *args, "-o", "out")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert text in result.stderr
    assert not (tmp_path / "out").exists()
