"""`longext eval harness` on task files made here, against transformers and lm-eval's own model; no network."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from command_line import fails
from harness_tasks import CHOICES, STORY, harness, write_answers, write_choices, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, load_backbone, save_compressor
from longext.compressor.reading.readers import load_reader
from longext.compressor.spec import CompressorSpec
from longext.evals.harness.model import Scorer, harness_model
from longext.evals.harness.squad import compute_exact, compute_f1, normalize_answer
from longext.options import RuntimeConfig


@pytest.fixture(scope="module")
def plain():
    """books-5m as transformers loads it, and its tokenizer."""
    directory = BUNDLED_MODELS["books-5m"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def record_of(tmp_path):
    record = json.loads((tmp_path / "out/result.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    return record, samples, {(row["task"], row["metric"]): row for row in record["results"]}


def test_multiple_choice_equals_the_log_softmax(run, tmp_path, plain):
    write_choices(tmp_path / "tasks")
    result = harness(run, "--tasks", "choices")
    record, samples, rows = record_of(tmp_path)
    model, tokenizer = plain
    right, right_by_length = [], []
    for sample, row in zip(samples, CHOICES, strict=True):
        context, totals = tokenizer(row["question"]).input_ids, []
        for choice, (value, is_greedy) in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = tokenizer(row["question"] + choice).input_ids
            num = len(ids) - len(context)
            with torch.no_grad():  # 512 tokens are read, the next is predicted
                logits = model(torch.tensor([ids[-513:-1]])).logits[0, -num:]
            chosen = torch.tensor(ids[-num:])
            totals.append(float(logits.log_softmax(-1)[range(num), chosen].sum()))
            assert value == pytest.approx(totals[-1], abs=1e-3)
            assert is_greedy == bool((logits.argmax(-1) == chosen).all())
        by_length = [total / len(choice) for total, choice in zip(totals, row["choices"], strict=True)]
        right.append(totals.index(max(totals)) == row["label"])
        right_by_length.append(by_length.index(max(by_length)) == row["label"])
    assert rows["choices", "acc"]["value"] == pytest.approx(sum(right) / 3)
    assert rows["choices", "acc_norm"]["value"] == pytest.approx(sum(right_by_length) / 3)
    variance = sum((hit - sum(right) / 3) ** 2 for hit in right) / 2
    assert rows["choices", "acc"]["stderr"] == pytest.approx(math.sqrt(variance / 3))
    assert rows["choices", "acc"]["num_truncated"] == 1
    assert record["kind"] == "harness" and record["protocol"]["max_length"] == 512
    assert record["protocol"]["lm_eval"] in record["protocol"]["reference"]
    task = record["data"]["tasks"]["choices"]
    assert task["version"] == 3.0 and task["config"]["doc_to_text"] == "{{question}}"
    for text in ("acc_norm", "lost its beginning: 1 ", "samples.jsonl"):
        assert text in result.stdout


def test_answers_equal_generate_and_match_by_hand(run, tmp_path, plain):
    model, tokenizer = plain
    questions, texts = ["The old man walked down to", "He met a girl who", "It was"], []
    for question in questions:
        ids = torch.tensor([tokenizer(question).input_ids])
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True).split("\n")[0].split(",")[0])
    wanted = [texts[0], "something else", texts[2]]
    write_answers(tmp_path / "tasks", [{"question": q, "answer": a} for q, a in zip(questions, wanted, strict=True)])
    result = harness(run, "--tasks", "answers", "--json")
    assert json.loads(result.stdout)["results"][0]["value"] == pytest.approx(2 / 3)
    _, samples, _ = record_of(tmp_path)
    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in texts]
    assert [sample["exact_match"] for sample in samples] == [1.0, 0.0, 1.0]


def test_the_harness_own_model_gives_the_same_numbers(plain, books):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = plain
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128)
    ours = harness_model(Scorer(books, 128, batch_tokens=512))

    def both(kind, *arguments):
        made = [Instance(kind, {}, args, i, metadata=("task", i, 1)) for i, args in enumerate(arguments)]
        return getattr(ours, kind)(made), getattr(theirs, kind)(made)

    pairs = [("The old man ", "walked"), ("", "He met a girl"), (STORY * 9, " The sea"), ("The", " old man, red")]
    mine, reference = both("loglikelihood", *pairs, *pairs[:1])
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in reference], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in reference]
    mine, reference = both("loglikelihood_rolling", (STORY,), (STORY * 9,))
    assert mine == pytest.approx(reference, abs=1e-3)  # sums over 200 tokens
    settings = {"until": ["."], "max_gen_toks": 12}
    mine, reference = both("generate_until", ("The old man", settings), (STORY * 9, settings))
    assert mine == reference


def test_an_untrained_compressor_is_measured(run, tmp_path):
    torch.manual_seed(0)
    base = find_base("books-5m")
    backbone, _ = load_backbone(base, device="cpu")
    spec = CompressorSpec(arch="uio", segment=32, ratios=(8,), sink=1, memory="kv", rank=4, alpha=8.0)
    (tmp_path / "uio").mkdir()
    save_compressor(tmp_path / "uio", build_compressor(backbone, spec), base)
    write_choices(tmp_path / "tasks")
    harness(run, "--tasks", "choices", "--memory", "uio@8")
    record, samples, rows = record_of(tmp_path)
    assert record["model"]["memory"]["ratio"] == 8 and rows["choices", "acc"]["num_truncated"] == 0
    reader = load_reader(RuntimeConfig(model="", device="cpu"), "uio@8")
    ids = reader.encode(CHOICES[2]["question"] + CHOICES[2]["choices"][1])
    num = len(ids) - len(reader.encode(CHOICES[2]["question"]))
    value = -float(reader.score(torch.tensor([ids]), len(ids) - num).nll.sum())
    assert samples[2]["filtered_resps"][1][0] == pytest.approx(value, abs=1e-4)


def test_a_group_has_its_mean_and_its_bar(run, tmp_path):
    write_choices(tmp_path / "tasks", "one", CHOICES[:1])
    write_choices(tmp_path / "tasks", "two", CHOICES[1:])
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks/both.yaml").write_text(yaml.safe_dump(group))
    harness(run, "--tasks", "both", "--fail-under", "both:acc=1.1", code=1)
    rows = record_of(tmp_path)[2]
    mean = (rows["one", "acc"]["value"] + 2 * rows["two", "acc"]["value"]) / 3
    assert rows["both", "acc"]["value"] == pytest.approx(mean)
    assert rows["both", "acc"]["num_truncated"] == 1


@pytest.mark.parametrize(
    ("args", "window"), [(("--memory", "window:384"), None), (("--method", "yarn", "--factor", 8), 4096)]
)
def test_memories_and_extensions_read_long_prompts_whole(run, tmp_path, args, window):
    write_choices(tmp_path / "tasks", rows=CHOICES[1:])
    harness(run, "--tasks", "choices", *args)
    record, _, rows = record_of(tmp_path)
    assert record["protocol"]["max_length"] == window
    assert rows["choices", "acc"]["num_truncated"] == 0
    assert "--memory" not in args or record["model"]["memory"]["spec"] == "window:384"


def test_a_memory_answers_and_rolls(run, tmp_path):
    write_answers(tmp_path / "tasks", [{"question": STORY * 40, "answer": "x"}])
    write_task(
        tmp_path / "tasks",
        "rolling",
        [{"question": STORY}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    args = ("--tasks", "answers,rolling", "--segment", 64)
    harness(run, *args, "--memory", "window:448")
    short = record_of(tmp_path)[2]["rolling", "bits_per_byte"]
    harness(run, "--tasks", "rolling", "--force")
    whole = record_of(tmp_path)[2]["rolling", "bits_per_byte"]
    assert short["value"] == pytest.approx(whole["value"], rel=1e-4)  # a text that the window holds
    assert not whole["higher_is_better"]


def test_examples_limit_and_bars(run, tmp_path):
    write_choices(tmp_path / "tasks", fewshot_split="test")
    args = ("--tasks", "choices", "--num-fewshot", 1, "--limit", 2)
    result = harness(run, *args, "--fail-under", "choices=0", "--fail-under", "choices:acc_norm=0")
    assert "not comparable" in result.stdout
    row = record_of(tmp_path)[2]["choices", "acc"]
    assert (row["num_fewshot"], row["num_documents"]) == (1, 2)
    result = harness(run, *args, "--force", "--fail-under", "choices:acc_norm=1.5", code=1)
    assert "choices:acc_norm is" in result.stderr and "at least 1.5" in result.stderr


def test_sampling_and_unknown_settings_are_told(run, tmp_path):
    write_answers(tmp_path / "tasks", [{"question": "He", "answer": "x"}], do_sample=True, temperature=0.7, top_k=4)
    assert "without effect here: sampling, top_k" in harness(run, "--tasks", "answers").stdout


@pytest.fixture
def few_tasks(monkeypatch):
    """lm-eval without its own tasks, which take long to search."""
    import lm_eval.tasks

    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (
            ("--tasks", "choice"),
            ("Unknown task 'choice'", "Did you mean 'choices'", "tasks has answers, broken, choices"),
        ),
        ((), ("Missing: tasks",)),
        (("--tasks", "remote"), ("data of remote cannot be had", "nobody/nothing", "Offline", "--include-path")),
        (("--tasks", "lost"), ("data of lost cannot be had", "lost-rows.jsonl")),
        (("--tasks", "broken"), ("lm-eval cannot load broken", "'nowhere' is undefined")),
        (("--tasks", "empty"), ("lm-eval cannot load empty", "no rows")),
        (("--tasks", "garbled"), ("lm-eval cannot load garbled", "utf-8")),
        (("--tasks", "torn"), ("Unknown task 'torn'", "torn.yaml is there, but is not valid YAML")),
        (("--tasks", "unsplit"), ("lm-eval cannot load unsplit", "must have valid or test docs")),
        (("--tasks", "halfway"), ("lm-eval cannot run halfway", "no attribute 'answer'", "--debug")),
        (("--tasks", "choices", "--fail-under", "choicse=1"), ("unknown task 'choicse'", "Did you mean 'choices'")),
        (("--tasks", "choices", "--fail-under", "choices=high"), ("--fail-under takes TASK=SCORE", "0 or more")),
        (("--tasks", "choices", "--factor", 4), ("--factor 4 needs a --method",)),
        (("--tasks", "choices", "--max-length", 2), ("choice of", "--max-length")),
        (("--tasks", "answers", "--max-length", 8), ("answers of 8 tokens", "no room", "--max-length")),
        (("--tasks", "choices", "--limit", 0), ("`limit` must be >= 1",)),
        (("--tasks", "choices", "--include-path", "nowhere"), ("--include-path nowhere is no folder",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_input_is_one_line(run, tmp_path, few_tasks, args, texts):
    folder = tmp_path / "tasks"
    write_choices(folder)
    write_answers(folder, [{"question": "He", "answer": "x"}])
    write_choices(folder, "remote", dataset_path="nobody/nothing", dataset_kwargs={})
    write_choices(folder, "lost", dataset_kwargs={"data_files": {"test": str(tmp_path / "lost-rows.jsonl")}})
    write_choices(folder, "broken", doc_to_text="{{nowhere}}")
    write_choices(folder, "unsplit", test_split=None, dataset_kwargs={"data_files": str(folder / "choices.jsonl")})
    write_choices(folder, "empty", [])
    write_choices(folder, "garbled")
    (folder / "garbled.jsonl").write_bytes(b'{"question": "\xff"}')
    (folder / "torn.yaml").write_text("task: torn\n  dataset_path: [")
    # a template that fails at the second row, when the first was read to load the task
    write_answers(folder, [{"question": "He", "answer": {"answer": "x"}}, {"question": "It", "answer": {}}], "halfway")
    text = (folder / "halfway.yaml").read_text()
    (folder / "halfway.yaml").write_text(text.replace("{{answer}}", "{{answer.answer}}"))
    result = harness(run, *args, code=2)
    lines = result.stderr.splitlines()
    message = lines[-1] if lines[0].startswith("Usage") else " ".join(line for line in lines if "longext: " in line)
    for text in texts:
        assert text in message, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("longest", "lengths"), [(300, "[]"), (8192, "[8192]")])
def test_tasks_that_make_their_data_get_the_tokenizer_and_the_length(run, tmp_path, longest, lengths):
    """As RULER's of lm-eval: a function is called with what `--metadata` and the model say."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "making.py").write_text(
        "import datasets\n\n\ndef make(**given):\n"
        "    same = given['tokenizer'] == given['pretrained']\n"
        "    text = f\"{given.get('max_seq_lengths', [])} {given['note']} {same}\"\n"
        "    rows = [{'question': text, 'answer': given['tokenizer']}]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    (tasks / "made.yaml").write_text(
        "task: made\ncustom_dataset: !function making.make\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{question}}'\ngeneration_kwargs: {max_gen_toks: 2, until: [x]}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    harness(run, "--tasks", "made", "--metadata", "note=seen", "--max-length", longest)
    (sample,) = map(json.loads, (tmp_path / "out/samples.jsonl").read_text().splitlines())
    assert sample["target"] == f"{lengths} seen True"


def test_lm_evals_infinitebench_and_longbench2_run_on_rows_of_a_file(run, tmp_path):
    """Their own task files, with another place for the data."""
    theirs = Path(lm_eval.__file__).parent / "tasks"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    row = {"id": 0, "context": "The grass is green. " * 20, "input": "What is the pass key?", "answer": ["71432"]}
    (tasks / "passkey.jsonl").write_text(json.dumps({**row, "options": []}))
    row = {"context": "The grass is green. " * 20, "question": "Which?", "choices": list("abcd"), "answer": "B"}
    (tasks / "table.jsonl").write_text(json.dumps(row))
    for name, file, split in (
        ("infinitebench/infinitebench_passkey", "passkey", "passkey"),
        ("longbench2/table", "table", "train"),
    ):
        (tasks / f"own_{file}.yaml").write_text(
            f"include: {theirs}/{name}.yaml\ntask: own_{file}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {tasks}/{file}.jsonl\n"
        )
    harness(run, "--tasks", "own_passkey,own_table")
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert [(row["task"], row["metric"]) for row in record["results"]] == [
        ("own_passkey", "score"),
        ("own_table", "acc"),
    ]


def test_tasks_that_import_squads_metrics_from_transformers_reach_their_data(run, tmp_path):
    """SCROLLS's own module of lm-eval: its data is on the Hub, which the tests do not ask."""
    theirs = Path(lm_eval.__file__).parent / "tasks" / "scrolls"
    result = run("eval", "harness", "books-5m", "--tasks", "scrolls_qasper", "--include-path", theirs, "-o", "out")
    fails(result, 2, "The data of scrolls_qasper cannot be had")


def test_squads_metrics_by_hand():
    assert normalize_answer("  The Cat, a  dog! ") == "cat dog"
    assert compute_exact("The cat", "cat.") == 1
    assert compute_exact("cat", "dog") == 0
    assert compute_f1("a red boat", "the red sea") == pytest.approx(0.5)
    assert [compute_f1("the", "a"), compute_f1("the", "cat"), compute_f1("cat", "")] == [1, 0, 0]
