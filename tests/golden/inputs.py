"""The files that the cases read: texts, rows of every suite, tasks of lm-eval, a config."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

STORY = "The old man walked down the long road to the sea. He met a girl who kept a red boat. "
LONGBENCH_ROWS: dict[str, list[tuple[str, list[str], list[str] | None]]] = {
    "hotpotqa": [("Who kept the boat?", ["a girl", "the girl"], None)] * 3,
    "samsum": [("Dialogue: A: hi. B: bye.\nSummary: ", ["A greets B."], None)] * 2,
    "trec": [("Question: Where is the sea ?\nType:", ["Location"], ["Location", "Person"])] * 2,
    "lcc": [("", ["x = 1"], None)] * 2,
    "passage_count": [("", ["2"], None)],
    "passage_retrieval_en": [("The boat is red.", ["Paragraph 2"], None)],
}
GIVEN_ANSWERS = {
    "hotpotqa": ["the girl", "a girl with a boat", ""],
    "samsum": ["A greets B and leaves.", "B leaves."],
    "trec": ["Location", "Person or Location\nmore"],
    "lcc": ["x = 2\ny = 3", "# a comment\nx = 1"],
    "passage_count": ["There are 2, not 3."],
    "passage_retrieval_en": ["Paragraph 2 or 5"],
}
CHOICES = [
    {
        "question": "The old man walked down the long road to",
        "choices": [" the sea", " a boat, and", " him"],
        "label": 2,
    },
    {"question": "He met a girl who kept", "choices": [" the door", " it", " red red red"], "label": 0},
    {"question": STORY * 40 + "He was", "choices": [" not", " sea of boats"], "label": 1},
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{{ word }}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
QUESTIONS = [("The old man walked down to", "the"), ("He met a girl who", "was"), ("It was", "a")]


def write_inputs(folder: Path) -> None:
    """Make `folder`, with all files that the cases read."""
    folder.mkdir()
    _write_chat_model(folder / "chat")
    _write_texts(folder)
    _write_longbench(folder)
    _write_retrieval(folder)
    _write_tasks(folder / "tasks")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_chat_model(folder: Path) -> None:
    """books-5m with a chat template."""
    package = Path(importlib.util.find_spec("longext").origin).parent
    shutil.copytree(next(path for path in package.rglob("books-5m") if path.is_dir()), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_texts(folder: Path) -> None:
    (folder / "story.txt").write_text("The keeper climbed the stairs every night. " * 40)
    (folder / "texts").mkdir()
    (folder / "texts/a.txt").write_text(STORY * 12)
    (folder / "texts/b.txt").write_text("It was a cold day, and the ship lay at anchor in the bay. " * 9)
    write_lines(folder / "texts/c.jsonl", [{"text": STORY * 5, "id": "x"}, {"text": STORY * 7}])
    rows = [
        {"instruction": f"Repeat the number {n}. " + "word " * 60, "output": f"The number is {n}."} for n in range(12)
    ]
    write_lines(folder / "sft.jsonl", rows)
    factors = {"long_factor": [1 + n / 8 for n in range(32)], "short_factor": [1.0] * 32}
    (folder / "factors.json").write_text(json.dumps(factors))
    (folder / "llama2-7b").mkdir()
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    llama = {"model_type": "llama", **sizes, "intermediate_size": 11008, "vocab_size": 32000}
    (folder / "llama2-7b/config.json").write_text(json.dumps(llama))


def _write_longbench(folder: Path) -> None:
    for suffix in ("", "_e"):
        for task, given in LONGBENCH_ROWS.items():
            rows = [
                {
                    "input": question,
                    "context": STORY * (4 + 9 * index),
                    "answers": answers,
                    "length": 3000 * index,
                    "dataset": task,
                    "language": "en",
                    "all_classes": classes,
                    "_id": f"{task}-{index}",
                }
                for index, (question, answers, classes) in enumerate(given)
            ]
            answered = [
                {"pred": text, **{key: row[key] for key in ("answers", "all_classes", "length")}}
                for text, row in zip(GIVEN_ANSWERS[task], rows, strict=True)
            ]
            write_lines(folder / f"bench/{task}{suffix}.jsonl", rows)
            write_lines(folder / ("answers-e" if suffix else "answers") / f"{task}.jsonl", answered)


def _write_retrieval(folder: Path) -> None:
    for length, repeats in (("0k", 1), ("1k", 9)):
        for task, question in (("qa1", "Where is Mary? "), ("qa2", "Where is the boat? ")):
            row = {"input": "Mary went to the garden. " * repeats, "question": question, "target": "garden"}
            write_lines(folder / f"facts/{length}/{task}.jsonl", [row, {**row, "target": "sea"}, row])
    line = {"prompt": "line a-b: REGISTER_CONTENT is <7>\n", "expected_number": 7, "random_idx": ["a-b", 0]}
    write_lines(folder / "lines/1_lines.jsonl", [line, {**line, "expected_number": 3}])
    (folder / "3_response.txt").write_text(
        "Label: 2416, Predict: The <REGISTER_CONTENT> in line torpid-kid is <2416>., Parsed: 2416, prompt length: 90\n"
        "Label: 418, Predict: The <REGISTER_CONTENT> in line a-b is <102>., Parsed: 102, prompt length: 91\n"
        "Accuracy: 0.5\n"
    )
    write_lines(folder / "lines/2_topics.jsonl", [{"prompt": "Art, then Sea.", "topics": ["Art", "Sea"]}])


def _write_tasks(folder: Path) -> None:
    """Three tasks of lm-eval's three kinds, one with examples, and a group."""
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    choices = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": accuracy,
    }
    answers = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": ["\n", ","], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    }
    _write_task(folder, "choices", CHOICES, **choices)
    _write_task(folder, "first", CHOICES[:1], **choices)
    _write_task(folder, "rest", CHOICES[1:], **choices)
    _write_task(folder, "examples", CHOICES, **choices, fewshot_split="test")
    _write_task(folder, "answers", [{"question": q, "answer": a} for q, a in QUESTIONS], **answers)
    _write_task(folder, "rolling", [{"question": STORY}, {"question": STORY * 40}], **rolling)
    group = {"group": "both", "task": ["first", "rest"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))


def _write_task(folder: Path, name: str, rows: list[dict[str, Any]], **keys: Any) -> None:
    write_lines(folder / f"{name}.jsonl", rows)
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    task = {"task": name, **source, "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 3.0}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **keys}))
