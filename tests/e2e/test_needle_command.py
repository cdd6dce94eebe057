"""`longext eval needle` as a user types it."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok, result_of

SMALL = ("--lengths", "300,400", "--num-trials", 2, "--num-needles", 2, "--haystack", "noise")


def test_exact_scoring_ends_in_table_picture_and_record(run, tmp_path):
    out = ok(run("eval", "needle", "books-5m", *SMALL, "--scoring", "exact", "-o", "n"))
    for text in ("300", "multiquery", "all", "95% interval"):
        assert text in out
    record = result_of(tmp_path / "n")
    assert (record["kind"], record["protocol"]["scoring"]) == ("needle", "exact")
    assert [cell["num_trials"] for cell in record["by_length"]] == [8, 8]
    assert len(record["results"]) == len(record["by_task"]) == 8
    assert (tmp_path / "n/needle.png").stat().st_size > 5000
    assert not (tmp_path / "n/answers.jsonl").exists()


def test_match_scoring_keeps_the_answers(run, tmp_path):
    args = ("eval", "needle", "books-5m", *SMALL, "--tasks", "single", "--max-new-tokens", 10, "-o", "n")
    record = json.loads(ok(run(*args, "--method", "yarn", "--factor", 8, "--depths", "0,1", "--json")))
    assert record["protocol"]["max_new_tokens"] == 10
    assert [(cell["length"], cell["depth"]) for cell in record["results"]] == [(300, 0), (300, 1), (400, 0), (400, 1)]
    rows = [json.loads(line) for line in (tmp_path / "n/answers.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[0]["num_prompt_tokens"] == 290
    no_leftovers(tmp_path, "n")


def test_a_run_cut_off_goes_on_where_it_was(run, tmp_path, monkeypatch):
    from longext.models import answers as predictions

    args = ("eval", "needle", "books-5m", *SMALL, "--tasks", "single", "--max-new-tokens", 10, "--batch-tokens", 1)
    args = (*args, "-o", "n")
    monkeypatch.setattr("longext.models.throughput.prefixes.STRETCH", 1)  # kept one by one
    ok(run(*args))
    whole = (tmp_path / "n/answers.jsonl").read_text()
    real, calls = predictions._Writer.answer, []

    def once(self, numbers):
        calls.append(numbers)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, numbers)

    monkeypatch.setattr(predictions._Writer, "answer", once)
    cut = run(*args, "--force")
    assert cut.exit_code != 0
    assert "The answers so far are in n.predictions.jsonl" in cut.stderr
    assert len((tmp_path / "n.predictions.jsonl").read_text().splitlines()) == 3  # a header and two answers
    ok(run(*args, "--force"))
    assert len(calls) == 3 + 2
    assert (tmp_path / "n/answers.jsonl").read_text() == whole
    no_leftovers(tmp_path, "n")


def test_reading_by_segments_with_a_memory(run, tmp_path):
    args = ("--tasks", "single", "--lengths", "300", "--num-trials", 1, "--scoring", "exact", "-o", "n")
    ok(run("eval", "needle", "books-5m", *args, "--memory", "window:256", "--segment", 128))
    assert result_of(tmp_path / "n")["model"]["memory"]["spec"] == "window:256"


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--tasks", "multikeys"), ("Unknown task 'multikeys'", "Did you mean 'multikey'")),
        (("--tasks", "single,single"), ("different tasks",)),
        (("--scoring", "exat"), ("Unknown scoring 'exat'", "'exact'")),
        (("--key-type", "word"), ("type of keys", "'words'")),
        (("--haystack", "nowhere.txt"), ("--haystack", "nowhere.txt", "book")),
        (("--depths", "0,2"), ("`depths` must be <= 1",)),
        (("--num-needles", 0), ("`num_needles` must be >= 1",)),
        (("--num-trials", 0), ("`num_trials` must be >= 1",)),
        (("--lengths", "70"), ("needs at least", "got 70")),
        (("--lengths", "32"), ("64",)),
        (("--tasks", "multivalue", "--max-new-tokens", 4), ("more than 4",)),
    ],
)
def test_wrong_flags_end_in_one_line(run, tmp_path, args, texts):
    fails(run("eval", "needle", "books-5m", "-o", "n", *args), 2, *texts)
    no_leftovers(tmp_path)


@pytest.mark.parametrize(("content", "text"), [(b"\xff\xfe\x00", "not UTF-8"), (b" \n", "is empty")])
def test_a_broken_haystack_ends_in_one_line(run, tmp_path, content, text):
    (tmp_path / "hay.txt").write_bytes(content)
    fails(run("eval", "needle", "books-5m", "-o", "n", "--haystack", "hay.txt"), 2, "hay.txt", text)
