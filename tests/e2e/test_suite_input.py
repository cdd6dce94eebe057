"""Bad input of the evaluation suites: one line, exit code 2, nothing left behind; or a note where a run makes sense."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok

from longext.data.json_lines import repeated_note

pytestmark = pytest.mark.usefixtures("no_pictures")
ROW = {"input": "Where is Mary?", "context": "Mary went to the garden.", "answers": ["garden"], "length": 5}
FACT = {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}
LINE = {"prompt": "line a-b: REGISTER_CONTENT is <7>\n", "expected_number": 7, "random_idx": ["a-b", 0]}
TOPIC = {"prompt": "Art.", "topics": ["Art", "Sea"]}
LONGBENCH = ("eval", "longbench", "books-5m", "--data", "data", "--tasks", "hotpotqa")
BABILONG = ("eval", "babilong", "books-5m", "--data", "data", "--tasks", "qa1", "--max-new-tokens", 2)
LONGEVAL = ("eval", "longeval", "books-5m", "--data", "data")
FILES = {LONGBENCH: ("hotpotqa.jsonl", ROW), BABILONG: ("0k/qa1.jsonl", FACT), LONGEVAL: ("1_lines.jsonl", LINE)}
SUITES = {"longbench": LONGBENCH, "babilong": BABILONG, "longeval": LONGEVAL}


def write(tmp_path, suite, *lines):
    """The data of a suite: its good row, then `lines` (text, bytes, or rows)."""
    name, good = FILES[suite]
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in (good, *lines)
    ]
    file.write_bytes(b"\n".join(encoded) + b"\n")
    return file


@pytest.fixture(params=SUITES)
def suite(request):
    return SUITES[request.param]


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("{broken", ("not valid JSON",)),
        ('{"a": 1', ("not valid JSON",)),
        (b'{"input": "\xff"}', ("not UTF-8 text",)),
        ("[1, 2]", ("JSON object",)),
        ("null", ("JSON object",)),
    ],
)
def test_a_broken_line_names_file_and_line(run, tmp_path, suite, line, texts):
    file = write(tmp_path, suite, line)
    message = fails(run(*suite, "-o", "out"), 2, file.name, *texts)
    assert f"{file.name}:2" in message or f"{file.name}, line 2" in message
    no_leftovers(tmp_path, "data")


@pytest.mark.parametrize(
    ("suite", "field"),
    [
        *((LONGBENCH, name) for name in ("input", "context", "answers")),
        *((BABILONG, name) for name in ("input", "question", "target")),
        *((LONGEVAL, name) for name in ("prompt", "expected_number", "random_idx")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
@pytest.mark.parametrize("value", ["absent", None, 1.5])
def test_a_row_without_a_field_names_file_line_and_field(run, tmp_path, suite, field, value):
    good = FILES[suite][1]
    row = {key: own for key, own in good.items() if key != field}
    file = write(tmp_path, suite, row if value == "absent" else {**row, field: value})
    message = fails(run(*suite, "-o", "out"), 2, f"'{field}'")
    assert f"{file.name}:2" in message or f"{file.name}, line 2" in message


def test_topics_without_topics(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/2_topics.jsonl").write_text(f"{json.dumps(TOPIC)}\n{json.dumps({**TOPIC, 'topics': []})}\n")
    fails(run(*LONGEVAL), 2, "2_topics.jsonl:2", "'topics'")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(run, tmp_path, suite, content):
    file = write(tmp_path, suite)
    file.write_text(content)
    fails(run(*suite, "-o", "out"), 2, f"{file.name}", "no")
    no_leftovers(tmp_path, "data")


def test_a_folder_where_a_file_is_expected(run, tmp_path, suite):
    file = write(tmp_path, suite)
    file.unlink()
    file.mkdir()
    fails(run(*suite, "-o", "out"), 2, "data")
    no_leftovers(tmp_path, "data")


def test_a_file_where_a_folder_is_expected(run, tmp_path, suite):
    (tmp_path / "data").write_text("{}")
    fails(run(*suite, "-o", "out"), 2, "folder", "data")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        ((*LONGBENCH[:-1], "qasper"), ("data has no qasper.jsonl", "THUDM/LongBench", "hf download")),
        ((*BABILONG, "--tasks", "qa2"), ("qa2.jsonl", "Tasks there: qa1", "RMT-team/babilong")),
        ((*LONGEVAL, "--sizes", 2), ("No cases of 2", "1_lines.jsonl", "DachengLi1/LongChat")),
        ((*LONGBENCH, "--data", "nowhere"), ("nowhere", "THUDM/LongBench")),
        ((*BABILONG, "--data", "nowhere"), ("nowhere", "RMT-team/babilong")),
        ((*LONGEVAL, "--data", "nowhere"), ("nowhere", "DachengLi1/LongChat")),
    ],
    ids=lambda value: " ".join(map(str, value[1:2])),
)
def test_missing_data_is_named_with_where_to_get_it(run, tmp_path, args, texts):
    for suite in SUITES.values():
        write(tmp_path, suite)
    fails(run(*args, "-o", "out"), 2, *texts)
    no_leftovers(tmp_path, "data")


def test_the_hub_offline(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    args = ("eval", "longbench", "books-5m", "--tasks", "hotpotqa", "-o", "out")
    for data in ((), ("--data", "hub")):
        fails(run(*args, *data), 2, "cannot be fetched from the Hub", "THUDM/LongBench", "--data DIR/data")


def test_the_hub_out_of_reach(run, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_args, **_keys):
        raise ConnectionError("Max retries exceeded with url: /api\nCaused by something long")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    message = fails(run("eval", "longbench", "books-5m", "-o", "out"), 2, "Max retries exceeded", "--data DIR/data")
    assert "something long" not in message
    no_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("needle", "--lengths", "-512"), ("--lengths must be different whole numbers >= 64", "-512")),
        (("needle", "--lengths", "512.5"), ("`lengths` must be a whole number", "512.5")),
        (("needle", "--max-new-tokens", "-1"), ("`max_new_tokens` must be >= 1",)),
        (("longeval", "--sizes", "-3"), ("`sizes` must be >= 1", "-3")),
        (("longeval", "--num-cases", "-1"), ("`num_cases` must be >= 1",)),
        (("babilong", "--data", "data", "--lengths", "-4k"), ("No length '-4k'",)),
        (("babilong", "--data", "data", "--num-cases", "0"), ("`num_cases` must be >= 1",)),
        (("longbench", "--data", "data", "--max-length", "-1"), ("`max_length` must be >= 2",)),
        (("longbench", "--data", "data", "--limit", "-1"), ("`limit` must be >= 1",)),
        (("effective", "--max-length", "-128"), ("`max_length` must be >= 2", "-128")),
        (("short", "--against", "books-5m", "--lengths", "-64"), ("--lengths must be", "-64")),
        (("ppl", "--lengths", "-64"), ("--lengths must be", "-64")),
        (("ppl", "--memory", "none", "--lengths", "-128"), ("--lengths must be", "-128")),
        (("efficiency", "--lengths", "-64"), ("--lengths", "-64")),
    ],
    ids=lambda value: " ".join(map(str, value[:4])),
)
def test_numbers_that_cannot_be(run, tmp_path, args, texts):
    write(tmp_path, BABILONG)
    fails(run("eval", args[0], "books-5m", *args[1:], "-o", "out"), 2, *texts)
    no_leftovers(tmp_path, "data")


def test_rows_that_stand_twice_are_pointed_out(run, tmp_path, suite):
    name, good = FILES[suite]
    other = {
        key: f"{value} And then." if key in ("context", "input", "prompt") else value for key, value in good.items()
    }
    write(tmp_path, suite, other, good, good)
    assert "repeat an earlier one: 2 of 4 of" in ok(run(*suite, "-o", "out"))


def test_only_rows_of_one_file_repeat_each_other():
    assert repeated_note([("a", 1), ("a", 2), ("b", 1)]) == []
    assert repeated_note([("a", 1), ("a", 1), ("b", 1)]) == [
        "Rows that repeat an earlier one: 1 of 2 of a (each of them counts)."
    ]


def test_two_files_of_one_name_are_not_chosen_from(run, tmp_path):
    file = write(tmp_path, LONGEVAL)
    (tmp_path / "data/old").mkdir()
    (tmp_path / "data/old" / file.name).write_bytes(file.read_bytes())
    fails(run(*LONGEVAL, "-o", "out"), 2, "Two files of one name", "old/1_lines.jsonl")


def test_a_byte_order_mark_is_no_error(tmp_path, suite):
    from longext.evals.longbench.rows import read_longbench
    from longext.evals.suites.babilong import read_rows
    from longext.evals.suites.longeval import read_cases

    file = write(tmp_path, suite)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    folder = str(tmp_path / "data")
    rows = {
        LONGBENCH: lambda: read_longbench(file),
        BABILONG: lambda: read_rows(folder, ("qa1",), (), None),
        LONGEVAL: lambda: read_cases(folder, ("lines",), (), 5),
    }[suite]()
    assert len(rows) == 1


def test_predictions_that_are_fewer_or_empty_say_how_many_and_where(run, tmp_path):
    write(tmp_path, LONGBENCH, {**ROW, "answers": ["sea"]}, {**ROW, "answers": ["hill"]})
    (tmp_path / "pred").mkdir()
    answers = [{"pred": " ", "answers": ["sea"], "all_classes": None}, {"pred": "garden", "answers": ["garden"]}]
    (tmp_path / "pred/hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    args = ("eval", "longbench", "--predictions", "pred", "--data", "data", "--tasks", "hotpotqa")
    out = ok(run(*args, "-o", "out"))
    assert "no answer in pred: 1 of the 3 of hotpotqa (scored 0)" in out
    assert "an empty answer in pred: 1 of the 3 of hotpotqa" in out
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["results"][0]["score"] == 33.33
    (tmp_path / "pred/hotpotqa.jsonl").write_bytes(b'{"pred": "\xe9"}\n')
    fails(run(*args), 2, "pred/hotpotqa.jsonl, line 1 is not UTF-8 text")
    fails(run(*args[:2], "--predictions", "pred/hotpotqa.jsonl"), 2, "is no folder")
    fails(run("eval", "longeval", "--predictions", "pred"), 2, "--predictions must be a file")
