"""Greedy answers to many prompts: batches, stops, and a file that survives a kill."""

from __future__ import annotations

import json

import pytest
import torch

from longext.errors import ConfigError, DataError
from longext.models.answer_file import holds_answers, tokens_hash
from longext.models.answers import Prediction, Request, generate_predictions
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

STORY = "It was the best of times, it was the worst of times. The old man walked slowly down the road, and then "


@pytest.fixture
def requests(books):
    ids = books.encode(STORY * 8)
    lengths = (11, 64, 37, 120, 64, 5, 90)
    return [Request(f"r{i}", tuple(ids[i : i + n]), 16) for i, n in enumerate(lengths)]


class OneByOne:
    """A model that is no HFLanguageModel: `generate_predictions` may only use the protocol."""

    def __init__(self, model):
        self._inner, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def greedy(self, input_ids, max_new_tokens):
        self.calls += 1
        return self._inner.greedy(input_ids, max_new_tokens)


def test_batches_equal_one_by_one_equal_greedy(books, requests):
    alone = generate_predictions(books, requests, None, batch_tokens=1)
    together = generate_predictions(books, requests, None, batch_tokens=100_000)
    some = generate_predictions(books, requests, None, batch_tokens=250)
    other = generate_predictions(OneByOne(books), requests, None)
    assert alone == together == some == other
    assert [p.id for p in alone] == [r.id for r in requests]
    for request, prediction in zip(requests, alone, strict=True):
        new = books.greedy(request.input_ids, 16)
        has_end = new[-1] == books.tokenizer.eos_token_id
        expected = Prediction(
            request.id,
            books.decode(new),
            len(request.input_ids),
            len(new),
            is_cut=not has_end,
            prompt_sha256=tokens_hash(request.input_ids),
        )
        assert prediction == expected


def test_length_dependent_rope_is_that_of_each_prompt():
    model = load_language_model(RuntimeConfig(model="books-5m", device="cpu"), "dynamic", 4.0)
    ids = model.encode(STORY * 40)
    requests = [Request(str(n), tuple(ids[:n]), 6) for n in (520, 700, 900, 700 - 1)]
    together = generate_predictions(model, requests, None, batch_tokens=100_000)
    assert [p.text for p in together] == [model.decode(model.greedy(r.input_ids, 6)) for r in requests]


def test_stop_strings_and_tokens(books, requests):
    plain = generate_predictions(books, requests, None)
    stop = (" the", ",")
    stopped = [Request(r.id, r.input_ids, 16, stop) for r in requests]
    for size in (1, 100_000):
        cut = generate_predictions(books, stopped, None, batch_tokens=size)
        for before, after in zip(plain, cut, strict=True):
            first = min((before.text.find(s) for s in stop if s in before.text), default=None)
            assert after.text == (before.text if first is None else before.text[:first])
            assert after.num_new_tokens <= before.num_new_tokens
        assert cut == generate_predictions(OneByOne(books), stopped, None)
    token = books.greedy(requests[0].input_ids, 4)[2]
    one = Request("x", requests[0].input_ids, 16, stop_ids=(token,))
    new = books.greedy(one.input_ids, 16)
    for model in (books, OneByOne(books)):
        (prediction,) = generate_predictions(model, [one], None)
        assert prediction.text == books.decode(new[: new.index(token)])
        assert prediction.num_new_tokens == new.index(token) + 1


def test_an_ending_token_cannot_come_first_where_a_minimum_says_so(books, requests):
    first = books.greedy(requests[1].input_ids, 1)[0]
    banned = Request("x", requests[1].input_ids, 5, stop_ids=(first,), min_new_tokens=1)
    (prediction,) = generate_predictions(books, [banned], None)
    with torch.no_grad():
        logits = books.model(torch.tensor([list(banned.input_ids)])).logits[0, -1]
    logits[[first, books.tokenizer.eos_token_id]] = -torch.inf
    assert prediction.text.startswith(books.decode([int(logits.argmax())]))


def test_penalties_of_a_checkpoint_do_not_touch_greedy_answers(books, requests):
    plain = generate_predictions(books, requests, None)
    alone = [books.greedy(request.input_ids, 16) for request in requests]
    own = books.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 1.5, 2, 2
    assert generate_predictions(books, requests, None, batch_tokens=100_000) == plain
    assert [books.greedy(request.input_ids, 16) for request in requests] == alone
    assert books.model.generation_config is own and own.repetition_penalty == 1.5


def test_what_is_in_the_file_is_not_made_again(books, requests, tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    whole = generate_predictions(books, requests, path, batch_tokens=250)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 1 + len(requests)
    # cut off inside a line, at every kind of place
    for size in (0, 7, len(lines[0]), len(lines[0]) + 5, sum(map(len, lines[:4])), len(content) - 3, len(content)):
        path.write_bytes(content[:size])
        counts = []
        assert generate_predictions(books, requests, path, counts.append, batch_tokens=250) == whole
        assert path.read_bytes() == content and sum(counts) == len(requests)
    model = OneByOne(books)
    path.unlink()
    generate_predictions(model, requests, path)
    assert model.calls == len(requests)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    generate_predictions(model, requests, path)
    assert model.calls == 2 * len(requests) - 3


def test_a_file_of_another_run_is_refused(books, requests, tmp_path):
    path = tmp_path / "answers.jsonl"
    generate_predictions(books, requests, path)
    with pytest.raises(ConfigError, match="other prompts or of another model"):
        generate_predictions(books, requests[:-1], path)
    own = books.model.generation_config.eos_token_id
    books.model.generation_config.eos_token_id = [own, 7]
    with pytest.raises(ConfigError, match="other prompts or of another model"):
        generate_predictions(books, requests, path)
    books.model.generation_config.eos_token_id = own
    generate_predictions(books, requests, path)
    with torch.no_grad():
        books.model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(ConfigError, match="other prompts or of another model"):
        generate_predictions(books, requests, path)


def test_a_file_with_a_measurement_and_no_answer_is_started_over(books, requests, tmp_path):
    path = tmp_path / "answers.jsonl"
    generate_predictions(books, requests, path)
    measured = b'{"id": "(pace)", "pace": {"rows": 4}}\n'
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + measured)
    assert not holds_answers(path)
    assert generate_predictions(books, requests[:-1], path) == generate_predictions(books, requests[:-1], None)
    assert holds_answers(path) and measured not in path.read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"answers.jsonl:3 is not valid JSON"),
        ('{"id": "r1"}', r"answers.jsonl:3 is no answer that longext wrote"),
        ("[1]", r"answers.jsonl:3 must hold a JSON object"),
    ],
)
def test_a_broken_line_is_named(books, requests, tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    generate_predictions(books, requests[:2], path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, lines[2]]) + "\n")
    with pytest.raises(DataError, match=message):
        generate_predictions(books, requests[:2], path)
    path.write_text(json.dumps({"pred": "x"}) + "\n")
    with pytest.raises(DataError, match="no header line"):
        generate_predictions(books, requests[:2], path)
