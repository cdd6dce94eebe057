"""A run killed midway: the same command goes on, asks nothing twice, and ends in the same scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import fails, no_leftovers, ok
from harness_tasks import STORY, write_answers, write_choices, write_task
from longbench_data import TASKS, write_data

from longext.models.answer_file import Journal

pytestmark = pytest.mark.usefixtures("no_pictures")


class PowerCut(BaseException):
    """Ends a run; what was on the disk is kept apart, whatever the run tidies up on its way out."""


NEEDLE = ("needle", "books-5m", "--tasks", "single", "--lengths", "200,256", "--num-trials", 2, "--haystack", "noise")
NEEDLE = (*NEEDLE, "--max-new-tokens", 8, "--batch-tokens", 1)
SUITES = {
    "needle": NEEDLE,
    "longeval": ("longeval", "books-5m", "--sizes", "2,3", "--num-cases", 2, "--complete"),
    "babilong": ("babilong", "books-5m", "--data", "facts", "--tasks", "qa1", "--max-new-tokens", 2),
    "longbench": ("longbench", "books-5m", "--data", "bench", "--tasks", "samsum,trec", "--max-length", 60),
    "choices": ("harness", "books-5m", "--include-path", "tasks", "--tasks", "choices"),
    "mixed": ("harness", "books-5m", "--include-path", "tasks", "--tasks", "answers,rolling"),
    "ppl": ("ppl", "books-5m", "--lengths", "64,128", "--max-tokens", "300"),
    "ranked": ("longeval", "books-5m", "--sizes", "2,3", "--num-cases", 2, "--complete", "--answers", "likelihood"),
    "passkey": ("passkey", "books-5m", "--lengths", "128", "--depths", "0,1", "--num-trials", 2),
}
DISK = "disk"
WHERE = {"longbench": "out.predictions", "choices": "out.predictions", "mixed": "out.predictions"}
WHERE |= dict.fromkeys(("ppl", "ranked", "passkey"), "out.scores.jsonl")


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """Answers are kept one by one, not a batch or a stretch of prompts with one prefix at a time."""
    monkeypatch.setattr("longext.models.throughput.prefixes.STRETCH", 1)
    for name, words in SUITES.items():
        monkeypatch.setitem(SUITES, name, (*words, "--batch-tokens", 1))


@pytest.fixture
def data(tmp_path):
    """What the suites read."""
    (tmp_path / "facts/0k").mkdir(parents=True)
    rows = [
        {"input": f"{name} went to the garden.", "question": f"Where is {name}?", "target": "garden"} for name in "ABC"
    ]
    (tmp_path / "facts/0k/qa1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_data(tmp_path / "bench", {name: TASKS[name] for name in ("samsum", "trec")})
    write_choices(tmp_path / "tasks")
    write_answers(tmp_path / "tasks", [{"question": text, "answer": "x"} for text in ("He", "She had", "It")])
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    texts = [{"question": STORY * n} for n in (1, 2)]
    write_task(tmp_path / "tasks", "rolling", texts, **rolling, metric_list=[{"metric": "bits_per_byte"}])


@pytest.fixture
def asked(monkeypatch):
    """Every answer that is kept, as (file, id); after `asked.last` many the power is cut."""

    class Asked(list):
        last = None

    found, real = Asked(), Journal.add

    def add(self, rows):
        real(self, rows)
        found.extend((self.path.name, name) for name in rows)
        if found.last is not None and len(found) >= found.last:
            shutil.copytree(".", DISK, ignore=shutil.ignore_patterns("whole", "facts", "bench", "tasks", "disk"))
            raise PowerCut

    monkeypatch.setattr(Journal, "add", add)
    return found


def killed(run, asked, args, after):
    """Run a command until so many answers are kept, and leave on the disk what was there at that moment."""
    asked.last = after
    with pytest.raises(PowerCut):
        run(*args)
    asked.last = None
    asked.clear()
    for path in Path.cwd().glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(DISK, ".", dirs_exist_ok=True)
    shutil.rmtree(DISK)


def kept(tmp_path, name):
    """The answers on disk as (file, id)."""
    place = tmp_path / WHERE.get(name, "out.predictions.jsonl")
    files = [place] if place.is_file() else sorted(place.glob("*.jsonl"))
    return [(file.name, json.loads(line)["id"]) for file in files for line in file.read_text().splitlines()[1:]]


def outcome(directory):
    """What a run leaves that does not depend on the time it took."""
    record = json.loads((directory / "result.json").read_text())
    files = [file for file in sorted(directory.rglob("*.jsonl"))]
    for timed in (record, *record["results"]):
        timed.pop("seconds", None)
    del record["command"]
    return record, [file.read_bytes() for file in files]


@pytest.mark.parametrize("name", SUITES)
def test_the_same_command_goes_on(run, tmp_path, data, asked, name):
    args = ("eval", *SUITES[name], "-o")
    ok(run(*args, "whole"))
    whole = list(asked)
    assert len(whole) == len(set(whole)) >= 3
    asked.clear()
    killed(run, asked, (*args, "out"), len(whole) - 1)
    before = kept(tmp_path, name)
    assert len(before) == len(whole) - 1
    assert not (tmp_path / "out").exists()
    ok(run(*args, "out"))
    assert len(asked) == 1  # the one that was open
    assert sorted(str(own) for _, own in [*before, *asked]) == sorted(str(own) for _, own in whole)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    no_leftovers(tmp_path, "bench", "facts", "out", "tasks", "whole")


@pytest.mark.parametrize("name", SUITES)
def test_an_interrupt_says_where_the_answers_are(run, tmp_path, data, monkeypatch, name):
    real, count = Journal.add, []

    def add(self, rows):
        real(self, rows)
        count.append(rows)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add)
    result = run("eval", *SUITES[name], "-o", "out")
    assert result.exit_code == 130
    where = WHERE.get(name, "out.predictions.jsonl")
    assert f"The answers so far are in {where}: the same command goes on from them." in result.stderr


def test_without_o_the_name_to_go_on_with_is_told(run, tmp_path, asked, monkeypatch):
    real = Journal.add

    def add(self, rows):
        real(self, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add)
    told = run("eval", *NEEDLE).stderr
    output = told.partition(" with -o ")[2].split()[0]
    assert output.startswith("results/needle-books-5m-")
    monkeypatch.setattr(Journal, "add", real)
    ok(run("eval", *NEEDLE, "-o", output))
    no_leftovers(tmp_path / "results", output.removeprefix("results/"))


CHANGES = {
    "seed": ("--seed", 1),
    "lengths": ("--lengths", "200,260"),
    "max-new-tokens": ("--max-new-tokens", 9),
    "num-trials": ("--num-trials", 1),
    "dtype": ("--dtype", "bfloat16"),
    "method": ("--method", "linear", "--factor", 2),
    "memory": ("--memory", "window:128", "--segment", 64),
    "haystack": ("--haystack", "book"),
}


def test_another_setting_uses_no_stale_answers_and_says_so(run, tmp_path, asked):
    args = ("eval", *NEEDLE, "-o", "out")
    killed(run, asked, args, 2)
    file = tmp_path / "out.predictions.jsonl"
    before = file.read_bytes()
    for change in CHANGES.values():
        message = fails(
            run(*args, *change), 2, "out.predictions.jsonl", "other prompts or of another model", "another -o"
        )
        assert "are not used" in message
    ok(run("extend", "books-5m", "--method", "yarn", "--factor", 2, "-o", "other"))
    fails(run("eval", "needle", "other", *NEEDLE[2:], "-o", "out"), 2, "of another model")
    assert file.read_bytes() == before
    assert not (tmp_path / "out").exists()
    ok(run(*args))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("longeval", ("--seed", 1)),
        ("babilong", ("--prompt", "plain")),
        ("longbench", ("--max-length", 50)),
        ("choices", ("--max-length", 200)),
        ("mixed", ("--dtype", "bfloat16")),
    ],
)
def test_no_suite_uses_stale_answers(run, tmp_path, data, asked, name, change):
    args = ("eval", *SUITES[name], "-o", "out")
    killed(run, asked, args, 2)
    fails(run(*args, *change), 2, WHERE.get(name, "out.predictions"), "are not used", "another -o to start over")


def test_another_command_leaves_an_unfinished_training_alone(run, tmp_path, data):
    """A working directory of the same name is never touched."""
    from longext.manifest import write_manifest
    from longext.training.config import FinetuneConfig

    work = tmp_path / "out.running"
    work.mkdir()
    write_manifest(work, "finetune", FinetuneConfig(model="m"), state="running")
    for suite in ("longbench", "choices"):
        run("eval", *SUITES[suite], "-o", "out", "--limit", 1)
        assert json.loads((work / "run.json").read_text())["config"]["model"] == "m"
    fails(run("eval", *SUITES["longbench"], "-o", "new/../out2", "--resume"), 2, "Nothing to resume")
