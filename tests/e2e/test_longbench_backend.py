"""`longext eval longbench --backend lm-eval`: lm-eval's own numbers, and labels that keep them from the authors'."""

from __future__ import annotations

import json
import math

import pytest
from test_bad_input import fails, no_leftovers
from test_commands import ok, result_of
from test_longbench_command import STORY, rows_of, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.evals.longbench import lm_eval_backend as longbench_harness
from longext.evals.longbench.suite import TaskScore
from longext.evals.longbench.tasks import TASKS

NEEDED = pytest.mark.skipif(bool(longbench_harness.missing_packages()), reason="needs longext[longbench-lm-eval]")
ROWS = {  # one kind of metric each
    "hotpotqa": [("Who kept the boat?", ["a girl", "the girl"], None)] * 2,
    "samsum": [("Dialogue: A: hi. B: bye.\nSummary: ", ["He met a girl who kept a boat."], None)],
    "trec": [("Question: Where is the sea ?\nType:", ["Location"], ["Location", "Person"])],
    "lcc": [("", ["He was not a girl"], None)],
    "passage_count": [("", ["2"], None)],
}
ARGS = (
    "eval",
    "longbench",
    "books-5m",
    "--device",
    "cpu",
    "--backend",
    "lm-eval",
    "--max-length",
    300,
    "--data",
    "data",
)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", ROWS)


def theirs(folder, names):
    """What lm-eval computes with its own model for transformers, on the rows under the names of its Hub copy."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    members = []
    for name in names:
        rows = rows_of(folder / f"{name}.jsonl")
        renamed = [{"question": row.pop("input"), **row, "all_classes": row["all_classes"] or []} for row in rows]
        file = folder / f"{name}-renamed.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in renamed))
        files = {"data_files": {"test": str(file)}}
        keys = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
        members.append({"task": f"longbench_{name}", **keys})
    package = lm_eval.tasks.__path__[0]
    manager = TaskManager(include_path=f"{package}/longbench", include_defaults=False)
    directory = BUNDLED_MODELS["books-5m"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=1, max_length=300)
    groups = [{"group": "local", "task": members}]
    return lm_eval.simple_evaluate(wrapped, tasks=groups, task_manager=manager)


@NEEDED
def test_scores_prompts_and_answers_are_those_of_lm_eval(run, tmp_path, data):
    ok(run(*ARGS, "-o", "out"))
    record = result_of(tmp_path / "out")
    found = theirs(data, list(ROWS))
    assert [row["task"] for row in record["results"]] == sorted(ROWS, key=list(TASKS).index)
    ours = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    for row in record["results"]:
        name = f"longbench_{row['task']}"
        assert row["score"] == pytest.approx(100 * found["results"][name]["score,none"])
        assert row["metric"] in {key.split(",")[0] for key in found["results"][name]}
        own = [sample for sample in ours if sample["task"] == name]
        for left, right in zip(own, found["samples"][name], strict=True):
            assert left["prompt_hash"] == right["prompt_hash"]
            assert left["filtered_resps"] == right["filtered_resps"]
    assert any(row["score"] for row in record["results"])
    cut = {row["task"]: row["num_truncated"] for row in record["results"]}
    assert cut["hotpotqa"] == 1 and all(row["num_prompt_tokens"] <= 300 for row in record["results"])


@NEEDED
def test_every_place_says_that_it_is_another_protocol(run, tmp_path, data):
    args = ("--tasks", "hotpotqa,lcc", "--limit", 1)
    out = ok(run(*ARGS, *args, "-o", "theirs"))
    record = result_of(tmp_path / "theirs")
    protocol = record["protocol"]
    assert (record["kind"], protocol["id"]) == ("longbench", "longbench-lm-eval")
    assert protocol["not_comparable_with"] == "longbench-official" and len(protocol["differences"]) >= 5
    table = (tmp_path / "theirs/table.md").read_text()
    for text in (out, table):
        assert "longbench-lm-eval: not comparable with longbench-official" in text
        assert "not comparable with the authors'" in text
    assert "lose their beginning" in record["notes"][0] and record["notes"][0] in out
    assert (tmp_path / "theirs/longbench.png").stat().st_size > 5000
    ok(run(*[arg for arg in ARGS if arg not in ("--backend", "lm-eval")], *args, "-o", "ours"))
    found = json.loads(ok(run("eval", "diff", "ours", "theirs", "--json")))
    assert not found["comparable"] and found["reasons"] == ["the protocol id differs"]
    assert "results[hotpotqa].score" in [pair["score"] for pair in found["scores"]]
    assert result_of(tmp_path / "ours")["data"] == record["data"]
    out = ok(run("report", "ours", "theirs", "-o", "r"))
    assert "not comparable with the authors'" in out
    assert "LongBench under lm-eval's protocol (not the authors')" in (tmp_path / "r/report.md").read_text()


@NEEDED
def test_a_memory_reads_all_and_bars_hold(run, tmp_path, data):
    args = tuple(arg for arg in ARGS if arg not in ("--max-length", 300))
    args = (*args, "--tasks", "hotpotqa", "--memory", "window:128", "--segment", 64, "--fail-under", "hotpotqa=100")
    fails(run(*args, "-o", "out"), 1, "Missed --fail-under: hotpotqa is")
    record = result_of(tmp_path / "out")
    assert record["protocol"]["max_length"] is None and record["results"][0]["num_truncated"] == 0
    assert record["model"]["memory"]["spec"] == "window:128"
    longest = len(rows_of(data / "hotpotqa.jsonl")[1]["context"]) / len(STORY)
    assert record["results"][0]["num_prompt_tokens"] > 10 * longest


@NEEDED
def test_a_chat_template_goes_around_every_prompt(run, tmp_path, data):
    fails(run(*ARGS, "--tasks", "lcc", "--chat-template", "-o", "out"), 2, "books-5m has no chat template")
    no_leftovers(tmp_path, "data")


def test_averages_are_those_of_lm_evals_groups():
    def score(name, value):
        return TaskScore(task=name, score=value, buckets=None, num_rows=1, num_missing=0, num_empty=0)

    values = {name: float(i) for i, name in enumerate(TASKS)}
    means = longbench_harness.lm_eval_averages([score(name, value) for name, value in values.items()])["all"]
    single = [values[name] for name in ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh")]
    assert means["single"] == pytest.approx(sum(single) / 4)
    assert means["code"] == pytest.approx((values["lcc"] + values["repobench-p"]) / 2)
    categories = [value for name, value in means.items() if name != "average"]
    assert len(categories) == 6 and means["average"] == pytest.approx(math.fsum(categories) / 6)
    some = longbench_harness.lm_eval_averages([score("lcc", 1.0), score("repobench-p", 2.0)])["all"]
    assert some["code"] == 1.5 and some["single"] is None and some["average"] is None


def test_without_its_packages_the_command_says_what_to_install(run, tmp_path, data, monkeypatch):
    monkeypatch.setattr(longbench_harness, "missing_packages", lambda: ["rouge"])
    fails(run(*ARGS, "-o", "out"), 2, "not installed: rouge", "pip install 'longext[longbench-lm-eval]'")
    no_leftovers(tmp_path, "data")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--e",), ("--e is of --backend official alone",)),
        (("--predictions", "pred"), ("--predictions is of --backend official alone",)),
        (("--resume",), ("--resume is of --backend official alone", "goes on by itself")),
        (("--code-similarity", "levenshtein"), ("--code-similarity is of --backend official alone",)),
        (("--fail-under", "english=3"), ("--fail-under english=3", "name a task")),
        (("--backend", "lmeval"), ("Unknown --backend 'lmeval'", "Did you mean 'lm-eval'")),
    ],
)
def test_options_of_the_authors_protocol_are_refused(run, tmp_path, data, args, texts):
    fails(run(*ARGS, "-o", "out", *args), 2, *texts)
    no_leftovers(tmp_path, "data")
