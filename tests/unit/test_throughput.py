"""Shared prefixes, batches, rows that leave, costs: the answers of one prompt at a time, and counts by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from families import tiny_model

from longext.errors import LongextError
from longext.evals.models import open_model
from longext.evals.runner import run_eval
from longext.evals.suites.needle import Needle
from longext.evals.suites.passkey import Passkey
from longext.models.answers import Request, generate_predictions
from longext.models.continuations import Continuations, first_choices
from longext.models.methods import RemapRequest
from longext.models.throughput import pace as pace_module
from longext.models.throughput.cost import Bill, expected_cost
from longext.models.throughput.pace import Load, Pace, measure_pace
from longext.models.throughput.prefixes import PrefixReader, common_prefix, sharing_order
from longext.models.throughput.rows import write_rows

STORY = "It was the best of times, it was the worst of times. The old man walked slowly down the road, and then "
FAST = Pace(token=1e-3, pair=0.0, step=1e-2, rows=4, together=1.0, most_tokens=100_000)


@pytest.fixture
def requests(books):
    """Prompts that share 0 to 60 tokens, of several lengths."""
    ids = books.encode(STORY * 8)
    others = [books.encode(f"{name} said: ", add_bos=False) for name in ("Anna", "Tom", "The king", "A")]
    prompts = [(*ids[:cut], *other, *ids[cut:end]) for other, cut in zip(others, (60, 60, 0, 50), strict=True)
               for end in (66, 80)]  # fmt: skip
    return [Request(f"r{i}", prompt, 8, stop=(",", ".") if i % 3 else ()) for i, prompt in enumerate(prompts)]


# --- order ------------------------------------------------------------------------------------------------------------


def test_sorted_texts_read_every_prefix_once():
    texts = [[1] * 40 + [2], [3] * 50, [1] * 40 + [4] * 60, [1] * 40 + [2] + [5] * 40, [1, 2]]
    order, kept = sharing_order(texts)
    assert common_prefix(texts[0], texts[3]) == 41 and common_prefix([1], [1]) == 1 and common_prefix([], [1]) == 0
    assert [texts[i][-1] for i in order] == [2, 5, 4, 2, 3]  # as sorted
    nodes = {tuple(text[:size]) for text in texts for size in range(1, len(text) + 1)}
    short = 1  # [1, 2] shares a token, which is not worth a mask
    assert sum(map(len, texts)) - sum(kept) == len(nodes) + short


def test_at_most_all_but_the_last_token_is_kept():
    assert sharing_order([[7] * 64, [7] * 64])[1] == [0, 63]


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [None, FAST])
def test_answers_are_those_of_one_prompt_at_a_time(books, requests, pace):
    alone = [generate_predictions(books, [request], None, batch_tokens=1)[0] for request in requests]
    books.pace = pace
    assert generate_predictions(books, requests, None) == alone


def test_rows_that_have_ended_leave_and_the_others_go_on_as_before(books, requests):
    prompts = [list(request.input_ids) for request in requests[:6]]
    alone = [books.greedy(prompt, 12) for prompt in prompts]
    ends, least = [3, 9, 1, 12, 6, 3], 3
    sizes = []
    hook = books.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rows = write_rows(
        books, prompts, 12, (), min_new_tokens=least, is_stopped=lambda i, new: len(new) >= max(ends[i], least)
    )
    hook.remove()
    for row, whole, end in zip(rows, alone, ends, strict=True):
        assert row[: max(end, least)] == whole[: max(end, least)]
    assert sizes[0] == 6 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_a_prefix_is_read_once(books, requests):
    read = []
    hook = books.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    reader = PrefixReader.of(books)
    assert reader is not None
    read.clear()
    reader.read(requests[0].input_ids)
    reader.read(requests[1].input_ids)
    hook.remove()
    assert read == [len(requests[0].input_ids), 14]
    hidden = PrefixReader(books).read(requests[1].input_ids, 70)
    assert torch.allclose(reader.read(requests[1].input_ids[:-1]), torch.empty(0))
    again = PrefixReader(books)
    again.read(requests[0].input_ids)
    assert torch.allclose(again.read(requests[1].input_ids, 70), hidden, atol=1e-4)


@pytest.mark.parametrize("scoring", ["match", "exact"])
def test_a_needle_grid_scores_as_without_sharing(books, scoring, monkeypatch):
    task = Needle(model="m", tasks=("single",), lengths=(200,), depths=(0.0, 0.5, 1.0), num_trials=1, scoring=scoring,
                  max_new_tokens=8)  # fmt: skip
    shared = run_eval(task, books)
    assert shared.record["cost"]["num_shared_tokens"] > 60
    monkeypatch.setattr(PrefixReader, "of", lambda model: None)
    alone = run_eval(task, books)
    assert shared.record["results"] == alone.record["results"] and shared.files == alone.files


def test_first_choices_and_ranks_of_a_passkey_grid_are_those_without_sharing(books, monkeypatch):
    task = Passkey(model="m", lengths=(150, 200), depths=(0.0, 1.0), num_trials=1, answers="both")
    shared = run_eval(task, books).record
    monkeypatch.setattr(PrefixReader, "of", lambda model: None)
    alone = run_eval(task, books).record
    assert shared["results"] == alone["results"] and shared["ranked"] == alone["ranked"]


def test_broken_logits_are_told_behind_a_cache_too(books):
    prompts = [(tuple(range(5, 105)), (7,)), (tuple(range(5, 104)), (7,))]
    with torch.no_grad():
        books.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(LongextError, match="not finite"):
        first_choices(books, prompts, 1)


# --- who shares -------------------------------------------------------------------------------------------------------


def test_only_plain_growing_caches_are_kept(books):
    assert PrefixReader.of(books) is not None
    assert PrefixReader.of(open_model(Passkey(model="books-5m", device="cpu", method="dynamic", factor=4.0))) is None
    assert PrefixReader.of(open_model(Passkey(model="books-5m", device="cpu", memory="window:64"))) is None
    books.model = tiny_model("gemma3")
    assert PrefixReader.of(books) is None


def test_a_remapped_model_shares_beyond_its_window(books):
    books.remap(RemapRequest("rerope", 4.0, parameters={"window": "64"}))
    reader = PrefixReader.of(books)
    assert reader is not None
    ids = books.encode(STORY * 40)[:700]
    expected = PrefixReader(books).read(ids, 600)
    reader.read(ids[:650])
    assert torch.allclose(reader.read(ids[:600] + ids[600:], 650), expected[:, 50:], atol=1e-3)


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt_neox"])
def test_batches_of_other_families(books, family):
    books.model = tiny_model(family)
    prompts = [[3 + i % 50 for i in range(size)] for size in (40, 33, 12, 50)]
    alone = [write_rows(books, [prompt], 10, ())[0] for prompt in prompts]
    ends = (2, 10, 4, 3)
    rows = write_rows(books, prompts, 10, (), is_stopped=lambda i, new: len(new) >= ends[i])
    for row, whole, end in zip(rows, alone, ends, strict=True):
        assert row[:end] == whole[:end]


@pytest.mark.parametrize("memory", ["none", "streaming:4+60", "snapkv-aware:64"])
def test_readers_by_segments_answer_prompts_of_one_length_together(books, memory):
    reader = open_model(Passkey(model="books-5m", memory=memory, segment=32, device="cpu"))
    ids = reader.encode(STORY * 8)
    requests = [Request(str(i), tuple(ids[i : i + size]), 6) for i, size in enumerate((100, 100, 90, 100))]
    alone = generate_predictions(reader, requests, None)
    assert generate_predictions(reader, requests, None, batch_tokens=1000) == alone


# --- continuations ----------------------------------------------------------------------------------------------------


def test_candidates_in_one_row_see_the_prompt_and_themselves_alone(books):
    prompt = books.encode(STORY * 3)
    others = [books.encode(text, add_bos=False) for text in (" went home", " a", " a b c d e f")]
    reader = Continuations(books)
    whole = reader._whole(prompt, others)
    assert reader._packed(prompt, others) == pytest.approx(whole, abs=1e-3)
    assert reader._one_by_one(prompt, others) == pytest.approx(whole, abs=1e-3)
    assert reader.nll(prompt, others) == pytest.approx(whole, abs=1e-3) and reader.reads_once


# --- pace and cost ----------------------------------------------------------------------------------------------------


def test_memory_that_ends_halves_a_batch(books, requests, monkeypatch):
    books.pace = FAST
    alone = generate_predictions(books, requests, None)
    import longext.models.answers as answers

    write, sizes = answers.write_rows, []

    def fails(model, prompts, *args, **keys):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("of memory")
        return write(model, prompts, *args, **keys)

    monkeypatch.setattr(answers, "write_rows", fails)
    assert generate_predictions(books, requests, None) == alone
    assert max(sizes) > 2 and min(sizes) == 1 or 2 in sizes


def test_a_run_that_goes_on_cuts_the_batches_that_were_measured(books, requests, tmp_path):
    path = tmp_path / "answers.jsonl"
    books.pace = FAST
    whole = generate_predictions(books, requests, path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[1])["pace"]["rows"] == 4 and len(lines) == 2 + len(requests)
    content = path.read_bytes()
    path.write_bytes(b"".join(lines[:5]))
    books.pace = dataclasses.replace(FAST, rows=2)
    assert generate_predictions(books, requests, path) == whole and path.read_bytes() == content


def test_rows_double_while_more_tokens_are_written(books, monkeypatch):
    load = Load(prompts=[tuple(range(5, 105))] * 64, num_new=64 * 50)
    seconds = {1: 1.0, 2: 1.1, 4: 1.5, 8: 2.8, 16: 3.0}
    monkeypatch.setattr(pace_module, "_step_seconds", lambda model, cache, row, rows: seconds[rows])
    pace = measure_pace(books, load)
    assert (pace.rows, pace.step) == (4, 1.5)  # 8 rows write 2.86 tokens a second, 4 write 2.67: not worth it
    assert pace.writing(80, 64) == 30.0 and pace.token > 0 and pace.most_tokens > 1000


def test_processes_share_the_time_and_are_all_paid(books, monkeypatch):
    books.pace = dataclasses.replace(FAST)
    load = Load(prompts=[tuple(range(5, 105))] * 3, num_new=0)
    one = expected_cost(books, load, 3.6, shares=False)
    for processes, sharing in ((2, 2), (8, 3)):  # a text is read by one process
        monkeypatch.setattr("longext.models.throughput.cost.num_processes", lambda count=processes: count)
        cost = expected_cost(books, load, 3.6, shares=False)
        assert (cost.seconds, cost.usd) == (pytest.approx(one.seconds / sharing), one.usd)


def test_costs_by_hand(books):
    prompts = [tuple(range(5, 105)), tuple(range(5, 85)) + (1,) * 20]
    cost = expected_cost(books, Load(prompts=prompts, num_new=64), 3.6)
    assert (cost.num_read_tokens, cost.num_shared_tokens, cost.num_new_tokens) == (200, 80, 64)
    assert cost.seconds is None and cost.usd is None  # too little for a probe
    books.pace = dataclasses.replace(FAST, pair=1e-6)
    seconds = (100 + 20) * 1e-3 + (2 * 100**2 - 80**2) * 1e-6 + 1e-2 * 64 / 2
    cost = expected_cost(books, Load(prompts=prompts, num_new=64), 3.6)
    assert cost.seconds == pytest.approx(seconds) and cost.usd == pytest.approx(seconds * 1e-3)
    told = []
    bill = Bill(told.append)
    bill.expect(books, prompts, 64)
    bill.expect(books, prompts, 0, shares=False)
    assert len(told) == 2 and bill.facts()["cost"]["num_read_tokens"] == 400
    assert "is_most" not in bill.facts()["cost"]


def test_the_cost_of_parts_is_one_and_at_most(books, capsys):
    from longext.report.console import say_cost

    books.pace = FAST
    told = []
    parts = [[(1,) * 900, (2,) * 900], [(1,) * 300]]  # each is too little for a probe
    bill = Bill(told.append, 3.6)
    bill.expect_at_most(books, iter(parts))
    (cost,) = told
    assert (cost.num_prompts, cost.num_read_tokens, cost.num_shared_tokens, cost.is_most) == (3, 2100, 0, True)
    assert cost.seconds == pytest.approx(2100 * FAST.token + FAST.pair * (2 * 900**2 + 300**2))
    assert bill.facts()["cost"]["is_most"] is True
    say_cost(cost)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "at most 3 texts: 2,100 tokens to read" and lines[1].startswith("at most about 2.1 s on")
