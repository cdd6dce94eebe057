"""A folder of LongBench, with a few rows of each kind of task."""

from __future__ import annotations

import json

from harness_tasks import STORY

TASKS = {
    "hotpotqa": [("Who kept the boat?", ["a girl", "the girl"], None)] * 3,
    "samsum": [("Dialogue: A: hi. B: bye.\nSummary: ", ["A greets B."], None)] * 2,
    "trec": [("Question: Where is the sea ?\nType:", ["Location"], ["Location", "Person"])] * 2,
    "lcc": [("", ["x = 1"], None)] * 2,
    "passage_count": [("", ["2"], None)],
}


def write_data(folder, tasks=None, suffix=""):
    folder.mkdir(exist_ok=True)
    for name, rows in (tasks or TASKS).items():
        lines = [
            {
                "input": question,
                "context": STORY * (4 + 9 * index),
                "answers": answers,
                "length": 3000 * index,
                "dataset": name,
                "language": "en",
                "all_classes": classes,
                "_id": f"{name}-{index}",
            }
            for index, (question, answers, classes) in enumerate(rows)
        ]
        (folder / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
