"""MRCR, GraphWalks, needles without shared words, LongBench v2: published scores by hand, budgets, files, edges."""

from __future__ import annotations

import json
import re

import pytest

from longext.errors import ConfigError, DataError
from longext.evals.base import make_eval
from longext.evals.retrieval import cut_note
from longext.evals.runner import run_eval
from longext.evals.suites.files.longbench2 import LongBench2, read_letter
from longext.evals.suites.graphwalks import GraphWalks, at_depth, parents, read_nodes, set_f1
from longext.evals.suites.mrcr import Mrcr, mrcr_score
from longext.evals.suites.nolit import HOPS, NoLit, read_facts, relative_length

# --- MRCR ---------------------------------------------------------------------------------------------------------


def test_mrcr_needs_its_string_and_compares_the_rest():
    assert mrcr_score("aB3", "abcd", "aB3abcd") == 1
    assert mrcr_score("aB3", "aB3abcd", "aB3abcd") == 1
    assert mrcr_score("aB3", "abcd", "abcd") == 0
    assert mrcr_score("aB3", "abcd", "") == 0
    assert mrcr_score("aB3", "abcd", "aB3") == 0
    assert mrcr_score("aB3", "abcd", "aB3bcde") == pytest.approx(0.75)  # 2 * 3 / 8
    assert mrcr_score("aB3", "abcd", "x aB3abcd") == 0


def test_conversations_hold_equal_requests_within_the_budget(books):
    task = Mrcr(model="m", lengths=(700, 1200), needles=(2, 4), num_trials=1, answer_words=20, answers="both")
    for question in task.questions(books, task.read_data()):
        count = int(question.task.split()[0])
        mark, answer = question.expected
        assert len(question.input_ids) + question.max_new_tokens <= question.length
        assert question.length - len(question.input_ids) - question.max_new_tokens < 250
        text = books.decode(question.input_ids)
        order, what = re.search(rf"Prepend {mark} to the (\w+) (.*)\. Do not", text).groups()
        turns = text.split("User: ")[1:-1]
        same = [turn.partition("Assistant: ")[2].strip() for turn in turns if turn.startswith(f"Write a {what}.")]
        assert len(same) == count
        assert same[["first", "second", "third", "fourth"].index(order)] == answer
        assert len(question.choices.wrong) == count - 1
        assert books.decode(question.choices.input_ids).endswith(f"Assistant: {mark}")
    again = task.questions(books, task.read_data())
    assert [q.input_ids for q in again] == [q.input_ids for q in task.questions(books, task.read_data())]
    with pytest.raises(ConfigError, match="MRCR with 8 needles does not fit 256 tokens"):
        Mrcr(model="m", lengths=(256,), needles=(8,)).questions(books, task.read_data())


def test_openais_rows_and_answers_are_read(books, tmp_path):
    talk = [("user", "Write a rhyme."), ("assistant", "One."), ("user", "Write a rhyme."), ("assistant", "Two.")]
    messages = [{"role": role, "content": text} for role, text in [*talk, ("user", "Prepend Zz to the second rhyme.")]]
    row = {"prompt": json.dumps(messages), "answer": "ZzTwo.", "random_string_to_prepend": "Zz", "n_needles": 2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = Mrcr(model="m", data=str(tmp_path / "rows.jsonl"), answers="both")
    (question,) = task.questions(books, task.read_data())
    assert task.score(question, "ZzTwo.") == 1
    assert [books.decode(ids).strip() for ids in question.choices.wrong] == ["One."]
    (tmp_path / "pred.jsonl").write_text(json.dumps({**row, "response": "ZzTwo."}) + "\n")
    (score,) = Mrcr(model="", predictions=str(tmp_path / "pred.jsonl")).load_data().scores
    assert (score.task, score.score) == ("2 needles", 1)
    (tmp_path / "bad.jsonl").write_text(json.dumps({**row, "prompt": '"x"'}) + "\n")
    with pytest.raises(DataError, match="bad.jsonl:1 is no row of MRCR"):
        Mrcr(model="m", data=str(tmp_path / "bad.jsonl")).read_data()


# --- GraphWalks ---------------------------------------------------------------------------------------------------

EDGES = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "a"), ("d", "e")]


def test_walks_by_hand():
    assert at_depth(EDGES, "a", 1) == {"b", "c"}
    assert at_depth(EDGES, "a", 2) == {"d"}
    assert at_depth(EDGES, "a", 3) == {"e"}  # a itself was there before
    assert at_depth(EDGES, "e", 1) == set()
    assert parents(EDGES, "d") == {"b", "c"}


def test_graphwalks_f1_is_the_published_one():
    utils = pytest.importorskip("lm_eval.tasks.graphwalks.utils")
    answers = ["Final Answer: [a, b]", "so\nFinal Answer: ['a']\nbye", "Final Answer: []", "none", "Final Answer: [c]"]
    for gold in (["a", "b"], ["a"], [], ["x", "y", "z"]):
        for answer in answers:
            published = utils.process_results({"answer_nodes": gold}, [answer])["flexible_f1"]
            assert set_f1(set(gold), read_nodes(answer)) == pytest.approx(published), (gold, answer)
    assert read_nodes("nothing") is None
    assert set_f1(set(), set()) == 0


def test_graphs_fit_and_the_question_has_its_answer(books):
    task = GraphWalks(model="m", lengths=(900,), num_trials=2, max_new_tokens=64, answers="both")
    for question in task.questions(books, None):
        assert 650 < len(question.input_ids) + 64 <= 900
        text = books.decode(question.input_ids).rpartition("The graph has these edges:")[2]
        edges = re.findall(r"(\w{6}) -> (\w{6})", text)
        node, depth = re.search(r"(?:from|parents of) (\w{6})(?: reach at exactly depth (\d))?", text).groups()
        right = parents(edges, node) if question.task == "parents" else at_depth(edges, node, int(depth))
        assert set(question.expected) == right
        assert task.score(question, f"Final Answer: [{', '.join(sorted(right))}]") == 1
    with pytest.raises(ConfigError, match="GraphWalks' bfs does not fit 200 tokens"):
        GraphWalks(model="m", lengths=(200,), max_new_tokens=100).questions(books, None)


def test_openais_graph_rows_are_scored(tmp_path):
    row = {"prompt": "p", "answer_nodes": ["a", "b"], "problem_type": "parents", "response": "x\nFinal Answer: [a]"}
    (tmp_path / "g.jsonl").write_text(json.dumps(row) + "\n")
    (score,) = GraphWalks(model="", predictions=str(tmp_path / "g.jsonl")).load_data().scores
    assert (score.task, score.score) == ("parents", pytest.approx(2 / 3))


def test_published_rows_have_limits_by_task_and_no_wrong_answers(books, tmp_path):
    row = {"prompt": "a -> b. Which nodes does a reach?", "answer_nodes": ["b"], "problem_type": "bfs"}
    (tmp_path / "g.jsonl").write_text(json.dumps(row) + "\n")
    given = {"data": str(tmp_path / "g.jsonl"), "max_new_tokens": 16}
    task = make_eval("graphwalks", "m", **given, fail_under=("bfs=0.5", "parents@2048=0"))
    bars = run_eval(task, books).record["bars"]
    assert [(bar["value"], bar["passed"]) for bar in bars] == [(0, False), (None, False)]
    for answers in ("likelihood", "both"):
        with pytest.raises(ConfigError, match="no question here has any: leave it out"):
            run_eval(make_eval("graphwalks", "m", **given, answers=answers), books)


# --- needles without shared words ---------------------------------------------------------------------------------

_SMALL = set("which character the a an in of to is has was on for with and from up at or no not by out who".split())


def stems(text):
    words = set(re.findall(r"[a-z]+", text.lower())) - _SMALL
    return {re.sub(r"(ing|ers|er|es|ed|s)$", "", word) if len(word) > 4 else word for word in words}


def test_facts_share_no_word_with_their_questions():
    facts = read_facts()
    assert len(facts) >= 60
    for fact in facts:
        assert fact.sentence.count("{name}") == 1
        for task in HOPS:
            assert not stems(fact.sentence.replace("{name}", "")) & stems(fact.questions[task]), fact


def test_facts_stand_at_their_depth_and_distract(books):
    task = NoLit(model="m", lengths=(600,), depths=(0.0, 0.5, 1.0), num_trials=1, answers="both")
    for question in task.questions(books, task.read_data()):
        text = books.decode(question.input_ids)
        assert 450 < len(question.input_ids) + task.max_new_tokens <= 600
        name, *others = question.expected
        assert all(text.count(each) == 1 for each in (name, *others))
        body = text[: text.index("Question:")]
        assert abs(body.index(name) / len(body) - question.depth) < 0.3
        assert task.score(question, f"It is {name}.") == 1
        assert (
            task.score(question, f"{name} or {others[0]}")
            == task.score(question, "")
            == task.score(question, f"{name}x")
            == 0
        )
    with pytest.raises(ConfigError, match="--num-distractors"):
        NoLit(model="m", num_distractors=0, answers="likelihood").check()
    with pytest.raises(ConfigError, match="do not fit 128 tokens"):
        NoLit(model="m", lengths=(128,)).questions(books, task.read_data())


def test_effective_length_is_relative_to_short_texts():
    rows = [(512, 0.6), (1024, 0.8), (2048, 0.7), (4096, 0.5)]
    table = [{"length": n, "score": s, "low": s - 0.1, "high": s + 0.2} for n, s in rows]
    assert relative_length(table) == {"base": 0.8, "tokens": 2048, "tokens_low": 1024, "tokens_high": 4096}
    assert relative_length(table[2:])["tokens"] is None


# --- LongBench v2 -------------------------------------------------------------------------------------------------


def test_letters_are_read_as_the_authors_do():
    assert read_letter("**The correct answer is (C)**.") == "C"
    assert read_letter("The correct answer is B") == "B"
    assert read_letter("the correct answer is (B)") is None
    assert read_letter("") is None


def test_questions_lose_their_middle_and_have_four_choices(books, tmp_path):
    row = {f"choice_{letter}": f"answer {letter}" for letter in "ABCD"} | {
        "_id": "q1",
        "context": "The sea is deep. " * 300,
        "question": "How is the sea?",
        "answer": "B",
        "difficulty": "easy",
        "length": "short",
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    task = LongBench2(model="m", data=str(tmp_path / "rows.json"), max_length=300, answers="both")
    (question,) = task.questions(books, task.read_data())
    assert 250 < len(question.input_ids) <= 305
    assert question.is_cut and cut_note([question]) == [
        "1 of 1 prompts were too long and lost their middle (--max-length)."
    ]
    text = books.decode(question.input_ids)
    assert text.startswith("Please read")
    assert "(D) answer D" in text
    assert task.score(question, "The correct answer is (B)") == 1
    assert books.decode(question.choices.input_ids).endswith("The correct answer is (")
    assert [books.decode(ids) for ids in (*question.choices.right, *question.choices.wrong)] == ["B", "A", "C", "D"]
    (tmp_path / "rows.json").write_text(json.dumps([row, row, {**row, "_id": "q2"}]))
    assert [each.id for each in task.questions(books, task.read_data())] == ["q1/0", "q1/1", "q2"]
    answers = [{**row, "response": "The correct answer is (B)"}, {**row, "pred": "A", "difficulty": "hard"}]
    (tmp_path / "pred.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    given = LongBench2(model="", predictions=str(tmp_path / "pred.jsonl")).load_data()
    assert [(each.task, each.length, each.score) for each in given.scores] == [("easy", 1, 1.0), ("hard", 1, 0.0)]
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "answer": "E"}]))
    with pytest.raises(DataError, match="row 0 is no row of LongBench v2"):
        task.read_data()
