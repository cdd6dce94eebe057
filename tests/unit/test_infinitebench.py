"""InfiniteBench: each task's score on answers made by hand, published forms of files, rows and prompts."""

from __future__ import annotations

import json

import pytest
from command_line import fails, ok, result_of

from longext.errors import ConfigError, DataError
from longext.evals.base import make_eval
from longext.evals.longbench.infinitebench import INFINITE_TASKS, label_of, prompt_of

UUID = "5e6b7b90-710d-4953-9b18-3e96b2cadbf2"
CASES = [
    ("passkey", " is 71432. 5", "71432", 1),
    ("passkey", "it is 071432", ["71432"], 0),
    ("passkey", "none", "71432", 0),
    ("number_string", "2 2 2", "222", 0),
    ("kv_retrieval", f'"x": "{UUID}".', UUID, 1),
    ("kv_retrieval", f"{UUID}-1", UUID, 0),
    ("code_run", "The value is: 4.", 4, 1),
    ("code_run", "-12", [-12], 1),
    ("code_run", "4 is the value", 4, 0),
    ("code_run", " ", 4, 0),
    ("code_debug", "B. main", ["main", "B"], 1),
    ("code_debug", "The answer is: `main`", ["main", "B"], 1),
    ("code_debug", "The correct option is: B", ["main", "B"], 1),
    ("code_debug", "The answer is:", ["main", "B"], 0),
    ("code_debug", "B", ["main", "B"], 0),  # the authors ask for a mark behind it
    ("code_debug", "I think it is B.", ["main", "B"], 0),
    ("longdialogue_qa_eng", "Ace said", ["ACE", "ACE ROTHSTEIN"], 1),
    ("longdialogue_qa_eng", "Rothstein", ["ACE", "ACE ROTHSTEIN"], 0),
    ("longbook_choice_eng", "A. Walking", ["Walking", "A"], 1),
    ("longbook_choice_eng", "Almost surely B", ["Walking", "B"], 0),  # the first letter counts
    ("longbook_choice_eng", "Walking", ["Walking", "B"], 1),
    ("longbook_choice_eng", "the answer is B", ["Walking", "B"], 1),
    ("longbook_choice_eng", "the answer is", ["Walking", "B"], 0),
    ("longbook_choice_eng", "perhaps C , or B", ["Walking", "B"], 0),
    ("longbook_choice_eng", "perhaps B !", ["Walking", "B"], 1),
    ("longbook_choice_eng", "", ["Walking", "B"], 0),
    ("longbook_qa_eng", "The red boat.", ["a boat", "red sea boat"], 0.8),
    ("longbook_qa_eng", "nothing", ["a boat"], 0),
    ("longbook_qa_chn", "他是王五。", ["王五"], 2 * 0.5 * 1 / 1.5),
    ("math_find", "88\n\nThe", 88, 1),
    ("math_find", "it is 7.5", 7.5, 1),
    ("math_find", "7.5", 7, 0),
    ("math_find", "none", [7], 0),
    ("math_calc", "[1, 4, 7]", [1, 4, 8], 2 / 3),
    ("math_calc", "1 -3", [[1, -3]], 0.5),  # signs are not read
    ("math_calc", "none", [1], 0),
]


@pytest.mark.parametrize(("task", "answer", "label", "score"), CASES)
def test_scores_by_hand(task, answer, label, score):
    assert INFINITE_TASKS[task].score(answer, label) == pytest.approx(score)


def test_rouge_of_summaries():
    pytest.importorskip("rouge_score")
    score = INFINITE_TASKS["longbook_sum_eng"].score
    assert score("a red boat", ["a red boat"]) == pytest.approx(1)
    assert score("a red", ["a red boat here", "a red boat"]) == pytest.approx(0.8)


def test_the_label_of_options_has_its_letter():
    row = {"answer": ["g"], "options": ["f", "g", "h", "i"]}
    assert label_of("code_debug", row) == ["g", "B"]
    assert label_of("longbook_choice_eng", {**row, "answer": "i"}) == ["i", "D"]
    assert label_of("code_debug", {**row, "answer": ["g", "B"]}) == ["g", "B"]
    assert label_of("passkey", {"answer": ["1"]}) == ["1"]


def test_prompts_hold_the_row(tmp_path):
    row = {"context": "CONTEXT {{input}}", "input": "func_1(2) The largest number of", "options": list("wxyz")}
    for task in INFINITE_TASKS:
        if INFINITE_TASKS[task].file:
            assert "CONTEXT {{input}}" in prompt_of(task, row), task
    assert prompt_of("passkey", row).endswith("CONTEXT {{input}}\n\nfunc_1(2) The largest number of")


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_published_answers_are_scored(run, tmp_path):
    write(
        tmp_path / "gpt",
        preds_passkey=[{"id": 0, "prediction": "71432", "ground_truth": "71432"}],
        preds_math_find=[{"id": 0, "pred": "3", "label": 4}, {"id": 1, "pred": "4", "label": 4}],
        preds_other=[{}],
    )
    out = ok(run("eval", "infinitebench", "--predictions", "gpt", "-o", "out", "--fail-under", "math_find=0.5"))
    assert "Left out, no task: other" in out
    record = result_of(tmp_path / "out")
    assert [(row["task"], row["score"], row["num_trials"]) for row in record["results"]] == [
        ("passkey", 1.0, 1),
        ("math_find", 0.5, 2),
    ]
    (tmp_path / "gpt/preds_passkey.jsonl").write_text('{"id": 0, "ground_truth": "1"}')
    result = run("eval", "infinitebench", "--predictions", "gpt/preds_passkey.jsonl", "-o", "b")
    fails(result, 2, "preds_passkey.jsonl:1")


def test_rows_of_files_are_asked_and_their_answers_scored_again(run, tmp_path):
    passkey = {"context": "The pass key is 71432. " * 9, "input": "What is the pass key?", "answer": ["71432"]}
    choice = {"context": "One. " * 99, "input": "Who?", "answer": ["w"], "options": list("wxyz")}
    write(tmp_path / "rows", passkey=[passkey] * 2, longbook_choice_eng=[choice])
    ok(run("eval", "infinitebench", "books-5m", "--data", "rows", "--limit", 1, "--max-length", 90, "-o", "out"))
    record = result_of(tmp_path / "out")
    assert [row["task"] for row in record["results"]] == ["passkey", "longbook_choice_eng"]
    assert all(row["num_tokens"] <= 100 for row in record["results"])
    ok(run("eval", "infinitebench", "--predictions", "out/answers.jsonl", "-o", "again"))
    again = result_of(tmp_path / "again")["results"]
    assert [row["score"] for row in again] == [row["score"] for row in record["results"]]


def test_wrong_settings_and_rows(tmp_path):
    with pytest.raises(ConfigError, match="math_calc has no prompt"):
        make_eval("infinitebench", "m", tasks=("math_calc",)).check()
    with pytest.raises(ConfigError, match="needs wrong answers"):
        make_eval("infinitebench", "m", answers="likelihood").check()
    with pytest.raises(ConfigError, match="folder with InfiniteBench's"):
        make_eval("infinitebench", "m").load_data()
    row = {"context": "x", "input": "y", "answer": ["g"], "options": ["a", "b", "c", "d"]}
    write(tmp_path / "rows", code_debug=[row])
    with pytest.raises(DataError, match=r"code_debug.jsonl:1 is no row of InfiniteBench's code_debug"):
        make_eval("infinitebench", "m", data=str(tmp_path / "rows")).load_data()
    with pytest.raises(ConfigError, match="No passkey.jsonl"):
        make_eval("infinitebench", "m", data=str(tmp_path / "rows"), tasks=("passkey",)).load_data()
