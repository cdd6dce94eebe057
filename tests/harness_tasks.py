"""Tasks of lm-eval and their rows, for `longext eval harness`; the command as the tests type it."""

from __future__ import annotations

import json

import yaml

STORY = "The old man walked down the long road to the sea. He met a girl who kept a red boat. "
CHOICES = [
    {
        "question": "The old man walked down the long road to",
        "choices": [" the sea", " a boat, and", " him"],
        "label": 2,
    },
    {"question": "He met a girl who kept", "choices": [" the door", " it", " red red red"], "label": 0},
    {"question": STORY * 40 + "He was", "choices": [" not", " sea of boats"], "label": 1},
]


def write_task(folder, name, rows, **keys):
    """A task file and its rows."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 3.0},
        **keys,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_choices(folder, name="choices", rows=CHOICES, **keys):
    kind = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    kind["target_delimiter"] = ""
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    write_task(folder, name, rows, **{**kind, "metric_list": metrics, **keys})


def write_answers(folder, rows, name="answers", **settings):
    write_task(
        folder,
        name,
        rows,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"max_gen_toks": 8, "until": ["\n", ","], "do_sample": False, **settings},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def harness(run, *args, code=0):
    result = run("eval", "harness", "books-5m", "--include-path", "tasks", "--device", "cpu", "-o", "out", *args)
    assert result.exit_code == code, result.output
    return result
