"""Four suites on every kind of model that longext makes: extended, adapter, compressor, cache policy.

Models come from the commands that users make them with; the numbers are held elsewhere, here that each suite runs
on each kind and says what it measured.
"""

from __future__ import annotations

import json
import math

import pytest
from command_line import ok
from harness_tasks import CHOICES, write_answers, write_choices
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAIN = ("--data", "sample", "--num-steps", 1, "--accumulation", 1, "--set", "warmup_steps=0")
COMPRESSOR = ("--segment", 32, "--ratio", 8, "--document-length", 128, "--lora-r", 4, "--lora-alpha", 8)
# kind -> the arguments that name it
KINDS = {
    "extended": ("extended",),
    "adapter": ("adapter",),
    "compressor": ("--memory", "compressor@8"),
    "policy": ("books-5m", "--memory", "streaming:4+60", "--segment", 64),
}
TASKS = ("--include-path", "tasks", "--tasks", "choices,answers", "--num-bootstrap", 0)
ONE = ("--lengths", 256, "--tasks", "single", "--num-trials", 1, "--haystack", "noise")
SEARCH = ("--min-length", 128, "--max-length", 128, "--depths", "0.5", "--num-trials", 2)
SHORT = ("--lengths", "64,128", "--max-tokens", 300, "--num-bootstrap", 0, "--tolerance", 1000)
SUITES = {
    "harness": TASKS,
    "needle": (*ONE, "--max-new-tokens", 12),
    "effective": SEARCH,
    "short": SHORT,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with an extended checkpoint, an adapter, a compressor, and tasks for the harness."""
    from longext.cli import app

    folder = tmp_path_factory.mktemp("models")
    for name, args in {
        "extended": ("extend", "books-5m", "--method", "yarn", "--factor", 4),
        "adapter": ("finetune", "books-5m", "--method", "linear", "--target-length", 1024, *TRAIN),
        "compressor": ("compress-train", "books-5m", *TRAIN, *COMPRESSOR),
    }.items():
        result = CliRunner().invoke(app, [str(arg) for arg in (*args, "-o", folder / name)])
        assert result.exit_code == 0, result.output
    write_choices(folder / "tasks", rows=CHOICES[:2])
    write_answers(folder / "tasks", [{"question": "The old man walked down to", "answer": "the sea"}])
    return folder


@pytest.fixture
def record_of(run, models, monkeypatch, tmp_path):
    """record_of(suite, kind, ...): the record of one evaluation."""
    monkeypatch.chdir(models)
    return lambda suite, kind, *args: json.loads(
        ok(run("eval", suite, *KINDS[kind], *args, "--device", "cpu", "--json", "-o", tmp_path / suite))
    )


def numbers_of(record):
    keys = ("value", "score", "accuracy", "ppl", "base_ppl", "change")
    return [row[key] for row in record["results"] for key in keys if row.get(key) is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_on_every_kind(record_of, suite, kind):
    against = ("--against", "books-5m") if suite == "short" and kind in ("extended", "adapter") else ()
    record = record_of(suite, kind, *SUITES[suite], *against)
    assert numbers_of(record) and all(math.isfinite(value) for value in numbers_of(record))
    model = record["model"]
    assert model["rope_parameters"]["rope_type"] == {"extended": "yarn", "adapter": "linear"}.get(kind, "default")
    assert ("adapter" in model) == (kind == "adapter")
    assert model.get("memory", {}).get("kind") == {"compressor": "compressor", "policy": "streaming"}.get(kind)
    if suite == "short":
        assert record["base"]["id"] == "books-5m" and "memory" not in record["base"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_over_the_answer_works_on_every_kind(record_of, kind):
    exact = record_of("needle", kind, *ONE, "--scoring", "exact")
    search = ("--test", "needle", "--min-length", 256, "--max-length", 256, "--depths", "0.5", "--num-trials", 1)
    assert len(exact["by_length"]) == 1 and len(record_of("effective", kind, *search)["results"]) == 1
