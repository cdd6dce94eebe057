"""LongBench's prompts, cuts, buckets and averages."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from longext.errors import ConfigError, DataError, LongextError
from longext.evals.base import make_eval
from longext.evals.limits import PlaceLimit
from longext.evals.longbench import run as bench
from longext.evals.longbench import scores as scoring
from longext.evals.longbench import tasks
from longext.evals.longbench.cutting import default_max_length, prompt_limit
from longext.evals.longbench.rows import LongBenchRow, longbench_files, read_longbench
from longext.evals.longbench.scores import least_mean, row_weights
from longext.evals.longbench.tasks import TASKS, fill_prompt, read_prompt
from longext.evals.runner import run_eval
from longext.evals.sequential.asking import Decisions
from longext.evals.suites import longbench as suite
from longext.evals.suites.longbench import LongBench
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

NO_ROWS = {"buckets": None, "num_rows": 1, "num_missing": 0, "num_empty": 0}
TEMPLATE = "{{ bos_token }}<u>{% for m in messages %}{{ m['content'] }}{% endfor %}</u>"


def row(**changes):
    return LongBenchRow(
        **{
            "id": "1",
            "question": "Q?",
            "context": "C",
            "answers": ("A",),
            "length": 10,
            "all_classes": (),
            **changes,
        }
    )


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_are_the_authors(name):
    prompt = read_prompt(name)  # checks its hash
    assert "{{context}}" in prompt
    has_question = TASKS[name].category not in ("code",) and name not in (
        "gov_report",
        "multi_news",
        "vcsum",
        "passage_count",
    )
    assert ("{{question}}" in prompt) == (has_question or name == "repobench-p")


def test_white_space_that_lm_eval_changed_is_put_back():
    for name in ("triviaqa", "samsum"):
        assert read_prompt(name).endswith("{{context}}\n\n{{question}}")
    for name in ("trec", "lsht"):
        assert read_prompt(name).endswith("{{context}}\n{{question}}")
    assert read_prompt("passage_count").endswith("is: ")
    assert read_prompt("passage_retrieval_en").endswith("is: ")
    assert read_prompt("lcc").endswith(":\n")
    assert read_prompt("repobench-p").endswith(":\n")


def test_another_wording_is_refused(monkeypatch):
    monkeypatch.setattr(tasks, "_as_published", lambda name, prompt: prompt + "!")
    with pytest.raises(LongextError, match="prompt of hotpotqa in the installed lm-eval is not"):
        read_prompt("hotpotqa")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LongextError, match=r"prompts needs lm-eval: pip install 'longext\[eval\]'"):
        read_prompt("hotpotqa")


def test_fields_inside_a_text_stay():
    filled = fill_prompt("a {{context}} b {{question}} {{other}}", "{{question}} \\1 {x}", "{{context}}")
    assert filled == "a {{question}} \\1 {x} b {{context}} {{other}}"


# --- the cut ----------------------------------------------------------------------------------------------------------


def characters(text):
    return [0, *map(ord, text)]  # BOS in front


def text_of(ids):
    return "".join(map(chr, filter(None, ids)))


@pytest.mark.parametrize(
    ("limit", "expected", "is_cut"),
    [
        (None, "abcdefghi", False),
        (10, "abcdefghi", False),  # nine characters and BOS
        (9, "abcfghi", True),  # 4 + 4 with BOS among the first: an odd limit loses one
        (8, "abcfghi", True),
        (7, "abghi", True),
        (2, "i", True),  # BOS and the last
    ],
)
def test_the_middle_is_cut_by_tokens(limit, expected, is_cut):
    assert bench.cut_middle("abcdefghi", limit, characters, text_of) == (expected, is_cut)


def test_prompts_are_cut_as_text_and_encoded_again(books):
    rows = [row(context="One two three four. " * 100, question="What is five?")]
    (request,), is_cut = bench.build_requests(books, "hotpotqa", rows, 101, chat=False)
    whole = books.encode(fill_prompt(read_prompt("hotpotqa"), rows[0].context, rows[0].question))
    assert is_cut == [True]
    assert list(request.input_ids) == books.encode(books.decode(whole[:50]) + books.decode(whole[-50:]))
    assert request.max_new_tokens == 32 and request.stop_ids == () and request.min_new_tokens == 0
    (request,), is_cut = bench.build_requests(books, "hotpotqa", rows, len(whole), chat=False)
    assert is_cut == [False] and list(request.input_ids) == whole


def test_the_chat_template_goes_around_the_cut_prompt(books):
    books.tokenizer.chat_template = TEMPLATE
    bos = books.tokenizer.bos_token or ""
    rows = [row(context="One two three four. " * 100)]
    (plain,), _ = bench.build_requests(books, "hotpotqa", rows, 100, chat=False)
    (chat,), is_cut = bench.build_requests(books, "hotpotqa", rows, 100, chat=True)
    text = books.decode(plain.input_ids)
    assert is_cut == [True] and books.decode(chat.input_ids) == f"<u>{text}</u>"
    once = books.encode(f"{bos}<u>{text}</u>", add_bos=not bos)
    assert list(chat.input_ids) == once
    if books.prefix:
        assert chat.input_ids.count(books.prefix[0]) == 1
    for name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
        assert bench.build_requests(books, name, rows, 100, chat=True) == bench.build_requests(
            books, name, rows, 100, chat=False
        )


def test_samsum_ends_at_a_line_feed_that_is_not_first(books):
    (request,), _ = bench.build_requests(books, "samsum", [row()], None, chat=False)
    assert books.encode("\n", add_bos=False)[-1] in request.stop_ids
    assert books.tokenizer.eos_token_id in books.ending_tokens
    assert request.min_new_tokens == 1


@pytest.mark.parametrize(
    ("context", "limit"), [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (512, 256), (1024, 512)]
)
def test_default_lengths_are_the_authors(context, limit):
    assert default_max_length(context) == limit


def test_the_default_length_follows_the_extension(books):
    config = LongBench(model="books-5m")
    assert prompt_limit(books, config) == 256
    extended = load_language_model(RuntimeConfig(model="books-5m", device="cpu"), "dynamic", 8.0)
    assert prompt_limit(extended, config) == 3500
    assert prompt_limit(books, dataclasses.replace(config, max_length=77)) == 77
    assert prompt_limit(books, dataclasses.replace(config, memory="window")) is None


# --- scores -----------------------------------------------------------------------------------------------------------


def test_only_the_first_line_of_a_few_shot_answer_counts():
    rows = [row(answers=("yes",))]
    assert scoring.score_rows("triviaqa", ["\n\nyes\nno"], rows, "difflib") == [1.0]
    assert scoring.score_rows("hotpotqa", ["\n\nyes\nno"], rows, "difflib") == [pytest.approx(2 / 3)]


def test_the_best_reference_counts_and_a_missing_answer_is_zero():
    rows = [row(answers=("no", "yes")), row(answers=("x",)), row(answers=("x",))]
    score = scoring.score_task("hotpotqa", ["yes", None, ""], rows, ratio="difflib", longbench_e=False)
    assert (score.score, score.num_rows, score.num_missing, score.num_empty) == (33.33, 3, 1, 1)


def test_buckets_of_longbench_e():
    lengths = (0, 3999, 4000, 7999, 8000, None)
    rows = [row(length=length, answers=("yes",)) for length in lengths]
    answers = ["yes", "no", "yes", "yes", "no", "yes"]
    score = scoring.score_task("hotpotqa", answers, rows, ratio="difflib", longbench_e=True)
    assert score.buckets == {"0-4k": 50.0, "4-8k": 100.0, "8k+": 0.0}
    assert score.score is None and score.num_unplaced == 1
    short = scoring.score_task("hotpotqa", answers[:2], rows[:2], ratio="difflib", longbench_e=True)
    assert short.buckets == {"0-4k": 50.0, "4-8k": None, "8k+": None}


def averages(scores, **settings):
    """The means of tasks without spread, as records hold them."""
    made = [
        scoring.TaskScore(task=name, score=score, low=score, high=score, **NO_ROWS) for name, score in scores.items()
    ]
    return scoring.average_entries(made, **settings)["averages"]


def test_averages_are_means_of_categories():
    scores = {name: 10.0 for name in TASKS}
    scores |= {"narrativeqa": 40.0, "lcc": 20.0, "multifieldqa_zh": 100.0}
    means = averages(scores, longbench_e=False)
    assert means["english"] == {
        "single": 20.0,
        "multi": 10.0,
        "summarization": 10.0,
        "few-shot": 10.0,
        "code": 15.0,
        "synthetic": 10.0,
        "average": 12.5,
    }
    assert means["chinese"]["single"] == 100.0 and means["chinese"]["code"] == 15.0
    assert means["chinese"]["average"] == 25.83
    del scores["musique"]
    assert averages(scores, longbench_e=False)["english"]["multi"] is None
    assert averages(scores, longbench_e=False)["english"]["average"] is None


def test_longbench_e_averages_its_own_tasks():
    names = [name for name in TASKS if TASKS[name].is_in_e]
    assert len(names) == 13
    means = scoring.averages(dict.fromkeys(names, (10.0, 10.0, 10.0)), longbench_e=True)
    assert means == {"english": {**dict.fromkeys(means["english"], (10.0, 10.0, 10.0))}}


def test_the_table_of_tasks():
    assert len(TASKS) == 21 and sum(TASKS[name].num_rows for name in TASKS) == 4750
    assert sum(TASKS[name].language == "zh" for name in TASKS) == 5
    assert {name for name in TASKS if TASKS[name].first_line} == {"trec", "triviaqa", "samsum", "lsht"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("hotpot",)}, "Did you mean 'hotpotqa'"),
        ({"tasks": ("hotpotqa", "hotpotqa")}, "twice"),
        ({"tasks": ("musique",), "longbench_e": True}, "LongBench-E has no task 'musique'"),
        ({"code_similarity": "difflip"}, "Did you mean 'difflib'"),
        ({"backend": "lm-eval"}, "longext eval harness MODEL --tasks longbench_hotpotqa"),
        ({"backend": "offical"}, "Unknown --backend 'offical'. Did you mean 'official'"),
        ({"factor": 2.0}, "needs a --method"),
        ({"fail_under": ("hotpotqa",)}, "takes TASK=SCORE"),
        ({"fail_under": ("hotpotqa=x",)}, "takes TASK=SCORE"),
        ({"fail_under": ("hotpotqa=101",)}, "0 to 100"),
        ({"fail_under": ("hotpot=1",)}, "Did you mean 'hotpotqa'"),
        ({"fail_under": ("hotpotqa=1",), "longbench_e": True}, "one for each length"),
        ({"fail_under": ("hotpotqa=1",), "tasks": ("lcc",)}, "not among --tasks lcc"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        LongBench(model="m", **changes).check()


def test_tasks_that_need_jieba_are_refused_or_left_out(monkeypatch):
    monkeypatch.setattr(suite, "has_jieba", lambda: False)
    with pytest.raises(ConfigError, match="dureader is scored on the words that jieba finds"):
        LongBench(model="m", tasks=("hotpotqa", "dureader")).check()
    names = LongBench(model="m").wanted
    assert len(names) == 18 and not {"multifieldqa_zh", "dureader", "vcsum"} & set(names)
    monkeypatch.setattr(suite, "has_jieba", lambda: True)
    assert len(LongBench(model="m").wanted) == 21


GOOD = {"input": "q", "context": "c", "answers": ["a"], "length": 3, "all_classes": None, "_id": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"hotpotqa.jsonl, line 2 is not valid JSON"),
        ("[]", r"line 2 must hold a JSON object, found a list"),
        (json.dumps({**GOOD, "context": None}), r"line 2: no text under 'context'"),
        (json.dumps({**GOOD, "answers": "a"}), r"line 2: 'answers' must be a list"),
        (json.dumps({**GOOD, "answers": []}), r"line 2: 'answers' must be a list"),
        (json.dumps({**GOOD, "all_classes": "a"}), r"line 2: 'all_classes' must be"),
        (json.dumps({**GOOD, "length": "3"}), r"line 2: 'length' must be"),
    ],
)
def test_broken_rows_are_named(tmp_path, line, message):
    file = tmp_path / "hotpotqa.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_longbench(file)
    assert read_longbench(file, limit=1) == [LongBenchRow("x", "q", "c", ("a",), 3, ())]
    file.write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        read_longbench(file)


def test_the_hub_holds_an_archive(tmp_path, monkeypatch):
    import zipfile

    import huggingface_hub

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps(GOOD) + "\n{")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "data.zip"))
    files = longbench_files("hub", ["hotpotqa", "qasper"])
    assert list(files) == ["hotpotqa"]
    assert read_longbench(files["hotpotqa"], limit=1)[0].id == "x"
    with pytest.raises(DataError, match=r"data/hotpotqa.jsonl, line 2 is not valid JSON"):
        read_longbench(files["hotpotqa"])
    with pytest.raises(DataError, match="No folder 'nowhere'.*data.zip of the Hub dataset"):
        longbench_files("nowhere", [])


def test_without_the_hub_it_is_said_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DataError, match=r"cannot be fetched from the Hub \(offline\).*--data DIR/data"):
        longbench_files("hub", [])


# --- limits that end the asking ---------------------------------------------------------------------------------------


def average_of(scores, language):
    return scoring.averages({name: (float(own.mean()), 0.0, 1.0) for name, own in scores.items()})[language]["average"][
        0
    ]


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_weighted_rows_give_the_average_of_the_authors_tables(language):
    rng = np.random.default_rng(0)
    counts = {name: int(rng.integers(1, 30)) for name in TASKS}
    scores = {name: rng.random(count) for name, count in counts.items()}
    weights = row_weights(language, counts)
    total = sum(weights[name] * scores[name].sum() for name in weights)
    mean = total / sum(weights[name] * counts[name] for name in weights)
    wanted = scoring.averages({name: (float(own.mean()), 0.0, 1.0) for name, own in scores.items()})[language][
        "average"
    ]
    assert mean == pytest.approx(wanted[0], abs=1e-12)
    assert max(weights.values()) == 1 and row_weights("lcc", counts) == {"lcc": 1.0}


@pytest.mark.parametrize("limit", [0, 33.33, 66.67, 66.666, 50, 99.999, 100])
def test_a_mean_reaches_a_limit_as_its_rounded_score_does(limit):
    means = np.arange(0, 100_001, 7) / 100_000 + 1.3e-6  # no ties
    assert [mean >= least_mean(limit) for mean in means] == [round(100 * mean, 2) >= limit for mean in means]


def test_an_average_is_decided_as_by_all_rows_in_at_least_ninety_five_percent_of_orders():
    """Tasks of one row to 40, scores between 0 and 1, limits on both sides of the average and at it."""
    rng = np.random.default_rng(2)
    counts = {name: int(rng.choice([1, 8, 40])) for name in TASKS}
    scores = {name: rng.beta(0.6, 0.9, count) for name, count in counts.items()}
    places = [bench._Place(name, number) for name, count in counts.items() for number in range(count)]
    weights = row_weights("english", counts)
    average = scoring.averages({name: (float(own.mean()), 0.0, 1.0) for name, own in scores.items()})["english"][
        "average"
    ][0]
    wrong, asked = [0, 0], 0
    for seed in range(40):
        limits = [PlaceLimit("english", "english", None, average + off) for off in (-0.1, 0.003)]
        decisions = Decisions(
            limits, places, error=0.05, seed=seed, weigh=lambda limit, place: weights.get(place.task, 0.0)
        )
        decisions.ask(8, lambda some: [scores[place.task][place.number] for place in some])
        wrong = [
            count + (passed != right) for count, passed, right in zip(wrong, decisions.passed, (1, 0), strict=True)
        ]
        asked += decisions.rows()[0]["num_asked"] / sum(counts[name] for name in weights)
        low, value, high = (decisions.rows()[0][key] for key in ("low", "value", "high"))
        assert 0 <= low <= value <= high <= 1
    assert max(wrong) <= 2 and asked / 40 < 0.7


def test_a_verdict_shows_a_score_rounded_as_it_is_compared():
    """59.996 is the score 60, which reaches a limit of 60."""
    limit, places = PlaceLimit("trec", "trec", None, 60), [bench._Place("trec", number) for number in range(2500)]
    decided = [dataclasses.replace(limit, limit=least_mean(60))]
    decisions = Decisions(decided, places, error=0, seed=0, weigh=lambda limit, place: 1.0)
    decisions.ask(2500, lambda some: [float(place.number < 1499) + 0.9 * (place.number == 1499) for place in some])
    (row,) = bench._bars([limit], decisions)
    assert row["passed"] and row["value"] >= row["limit"] == 60


def test_longbench_stops_once_its_limits_are_decided_and_goes_on_from_its_answers(books, tmp_path):
    lines = [
        {"input": f"Who is {n}?", "context": "The sea is deep.", "answers": ["7"], "length": 5, "all_classes": None}
        for n in range(24)
    ]
    for name in ("hotpotqa", "trec"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = make_eval(
        "longbench", "books-5m", data=str(tmp_path), fail_under=("hotpotqa=60",), error_rate=0.05, max_length=60
    )
    first = run_eval(task, books, answers=tmp_path / "rounds")
    (bar,) = first.record["bars"]
    assert (bar["name"], bar["limit"], bar["passed"]) == ("hotpotqa", 60, False)
    assert bar["num_asked"] < bar["num_planned"] == 24 and bar["low"] <= bar["value"] <= bar["high"] <= 100
    (row,) = first.record["results"]  # nothing is asked of trec
    assert "Not asked, since the verdicts did not need them: trec." in first.notes
    assert bar["num_asked"] <= row["num_rows"] < 24
    assert row["score"] == pytest.approx(bar["value"]) or row["num_rows"] > bar["num_asked"]
    assert first.record["protocol"]["error_rate"] == 0.05 and "stopping" in first.record["protocol"]
    assert len(first.files["predictions/hotpotqa.jsonl"].splitlines()) == row["num_rows"]
    kept = sorted((tmp_path / "rounds").iterdir())
    assert kept[0].name == "hotpotqa.00000.jsonl"
    before = [file.read_bytes() for file in kept]
    again = run_eval(task, books, answers=tmp_path / "rounds").record
    assert [again[key] for key in ("results", "bars")] == [first.record[key] for key in ("results", "bars")]
    assert [file.read_bytes() for file in kept] == before
    with pytest.raises(ConfigError, match="--fail-under is decided"):
        make_eval("longbench", "books-5m", data=str(tmp_path), error_rate=0.05).check()
    with pytest.raises(ConfigError, match="--error-rate is for LongBench's single scores"):
        make_eval("longbench", "books-5m", data=str(tmp_path), error_rate=0.05, longbench_e=True).check()
