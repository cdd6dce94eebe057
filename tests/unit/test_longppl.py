"""LongPPL on models whose loss is known: key tokens and means against loops over tokens."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from longext.data.documents import Document
from longext.errors import ConfigError, DataError
from longext.evals.base import Work
from longext.evals.runner import run_eval
from longext.evals.suites import longppl
from longext.evals.suites.longppl import LongPPL, joined, keys_among, measure_keys, tokens_of
from longext.models.protocol import TokenScores


class Letters:
    """A fast tokenizer of pieces of `size` letters; spaces are left out of every token."""

    is_fast = True

    def __init__(self, size=1):
        self.size = size

    def __call__(self, text, **_):
        ids, offsets, start = [], [], 0
        for word in text.split(" "):
            for i in range(0, len(word), self.size):
                part = word[i : i + self.size]
                ids.append(sum(ord(c) * 31**k for k, c in enumerate(part)) % 9973)
                offsets.append((start + i, start + i + len(part)))
            start += len(word) + 1
        return {"input_ids": ids, "offset_mapping": offsets}


class Known:
    """A token costs 0.5 nats if the same token is among the `far` before it, else 4; with an offset per model."""

    device = torch.device("cpu")

    def __init__(self, extra=0.0, size=1, bos=(1,), far=10_000):
        self.name, self.tokenizer, self.prefix, self.extra, self.far = "known", Letters(size), bos, extra, far

    def loss(self, ids, p):
        return (0.5 if ids[p] in ids[max(0, p - self.far) : p] else 4.0) + self.extra * (ids[p] % 3)

    def score(self, ids, first):
        nll = [[self.loss(row, p) for p in range(first, len(row))] for row in ids.tolist()]
        return TokenScores(torch.tensor(nll, dtype=torch.float64), torch.tensor(nll) < 1)

    def describe(self):
        return {"id": self.name, "config_sha256": "c", "tokenizer_sha256": str(self.tokenizer.size), "prefix": []}


TEXTS = [Document(f"d{i}", "".join(chr(97 + (i * 5 + j * j * 7 + j // 9) % 26) for j in range(100))) for i in range(9)]
TEXTS[1] = Document("spaced", " ".join(TEXTS[1].text[i : i + 7] for i in range(0, 95, 7)))
TEXTS.append(Document("short", "abc"))


@pytest.fixture
def measured(monkeypatch):
    """measured(tested, evaluator, **settings): (outcome record, files) of a run on TEXTS."""

    def run(tested, evaluator=None, **settings):
        monkeypatch.setattr("longext.models.hf.load_language_model", lambda *_: evaluator or Known())
        monkeypatch.setattr(LongPPL, "load_data", lambda self: TEXTS)
        settings = {"lengths": (32, 64), "short_context": 8, "num_bootstrap": 50, **settings}
        if "key_tokens" not in settings:
            settings["evaluator"] = "strong"
        found = run_eval(LongPPL(model="m", **settings), tested)
        return found.record, found.files

    return run


def dense(tested, evaluator, length, context, step):
    """(key sum, keys, sum, tokens) over all texts by the definition, one token at a time; one token a letter."""
    totals = [0.0, 0, 0.0, 0]
    for document in TEXTS:
        letters = [c for c in document.text if c != " "]
        size, most = length - 1, 64 // 63 * 63
        for start in range(0, most - size + 1, size):
            if len(letters) < most:
                continue
            ids = [1, *(ord(c) for c in letters[start : start + size])]
            for p in range(1, length):
                full = evaluator.loss(ids, p)
                block = (p - 1) // step * step + 1
                begin = max(0, block - context)
                short = evaluator.loss(ids[begin:], p - begin)
                value = tested.loss(ids, p)
                totals[2] += value
                totals[3] += 1
                if short - full > 2 and full < 2:
                    totals[0] += value
                    totals[1] += 1
    return totals


@pytest.mark.parametrize("length", [32, 64])
def test_longppl_is_the_mean_over_key_tokens(measured, length):
    tested = Known(extra=0.3, far=20)
    record, _ = measured(tested)
    row = next(row for row in record["results"] if row["length"] == length)
    key, keys, total, tokens = dense(tested, Known(), length, 8, 2)
    assert (row["num_key_tokens"], row["num_tokens"], keys > 50) == (keys, tokens, True)
    assert row["longppl"] == pytest.approx(math.exp(key / keys), rel=1e-12)
    assert row["ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-12)
    assert row["longppl_low"] < row["longppl"] < row["longppl_high"]
    assert sum(own["num_key_tokens"] for own in row["per_document"]) == keys
    assert record["data"]["num_too_short"] == 1


def test_kept_key_tokens_give_the_same_result_without_the_evaluator(measured, tmp_path):
    tested = Known(extra=0.2, far=20)
    record, files = measured(tested)
    path = tmp_path / "key_tokens.json"
    path.write_text(files["key_tokens.json"])
    again, _ = measured(tested, key_tokens=str(path))
    assert again["results"] == record["results"]
    assert again["protocol"] == record["protocol"]
    for changed, text in (
        ({"short_context": 12}, "ask for these"),
        ({"lengths": (32, 48)}, "made for lengths 32, 64"),
    ):
        with pytest.raises(DataError, match=text):
            measured(tested, key_tokens=str(path), **changed)
    value = json.loads(path.read_text())
    value["lengths"]["32"][0]["sha256"] = "other"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="other texts"):
        measured(tested, key_tokens=str(path))
    for broken in ("{}", '{"schema": "longext.key-tokens/1"}', "[]"):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"key_tokens\.json"):
            measured(tested, key_tokens=str(path))


def test_another_tokenizer_counts_the_tokens_within_key_characters(measured):
    """Tokens of two letters count if both letters are key tokens of the evaluator, and neighbours."""
    tested = Known(size=2)
    record, files = measured(tested, lengths=(64,))
    found = json.loads(files["key_tokens.json"])["lengths"]["64"]
    expected = 0
    for piece in found:
        text = TEXTS[piece["document"]].text[piece["start"] : piece["stop"]]
        keyed = {i for start, stop in piece["spans"] for i in range(start, stop)}
        offsets = Letters(2)(text)["offset_mapping"]
        expected += sum(all(i in keyed for i in range(*offset)) for offset in offsets)
    assert record["results"][0]["num_key_tokens"] == expected > 5


def test_spans_of_characters():
    assert joined([(0, 3), (3, 5), (6, 7), (7, 7), (9, 9)]) == [(0, 5), (6, 7)]
    assert tokens_of(Known(), "ab c")[1] == [(0, 0), (0, 1), (1, 2), (2, 4)]  # a space belongs to the token behind it
    text = "one two  three"
    assert keys_among(text, [(0, 3), (3, 7), (7, 14)], [(0, 7)]) == [True, True, False]
    assert keys_among(text, [(0, 5), (5, 14)], [(0, 7)]) == [True, False]
    assert keys_among(text, [(0, 3), (3, 4), (4, 7), (7, 14)], [(4, 14)]) == [False, False, True, True]
    assert keys_among(text, [(0, 0), (0, 3)], [(0, 3)]) == [False, True]  # no characters, no key


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="Give --evaluator MODEL"):
        LongPPL(model="m").check()
    with pytest.raises(ConfigError, match="not both"):
        LongPPL(model="m", evaluator="e", key_tokens="k").check()
    with pytest.raises(ConfigError, match="--short-context 30 leaves no far text at 32 tokens: give at most 16"):
        LongPPL(model="m", evaluator="e", lengths=(32, 64), short_context=30).check()
    LongPPL(model="m", evaluator="e", lengths=(32,)).check()
    config = LongPPL(model="m", evaluator="e", lengths=(64,))
    with pytest.raises(DataError, match="No document of sample has 64 tokens: the longest has 3"):
        longppl.cut_texts(Known(bos=()), [Document("d", "abc")], config)
    pieces = longppl.cut_texts(Known(), TEXTS, config)[64]
    many = longppl.cut_texts(Known(), [Document("d", "ab" * 2000)], replace(config, num_windows=40))[64]
    assert (len(pieces), len(many), many[-1].stop) == (9, 40, 40 * 63)
    with pytest.raises(DataError, match="No token of sample at 64 tokens gains 2 nats"):
        measure_keys(Known(), TEXTS, 64, pieces, config)
    slow = Known()
    slow.tokenizer.is_fast = False
    with pytest.raises(ConfigError, match="slow tokenizer"):
        tokens_of(slow, "abc")
    assert Work().answers is None


@pytest.mark.usefixtures("no_pictures")
def test_a_model_from_the_command_line(run, tmp_path):
    """The bundled model as its own evaluator, cut off from far text: what the file and the table hold."""
    args = (
        "--evaluator",
        "books-5m",
        "--lengths",
        128,
        "--short-context",
        16,
        "--max-tokens",
        600,
        "--min-gain",
        0.5,
        "--max-loss",
        6,
    )
    result = run("eval", "longppl", "books-5m", *args, "--num-bootstrap", 5, "-o", "out", "--fail-over", "128=1")
    assert result.exit_code == 1, result.output
    record = json.loads((tmp_path / "out/result.json").read_text())
    row = record["results"][0]
    assert 0 < row["num_key_tokens"] < row["num_tokens"] == 127 * row["num_windows"]
    again = run(
        "eval", "longppl", "books-5m", *args[2:], "--key-tokens", "out/key_tokens.json", "--num-bootstrap", 5, "--json"
    )
    assert json.loads(again.stdout)["results"] == record["results"]
    read, own = record["cost"]["num_read_tokens"], json.loads(again.stdout)["cost"]["num_read_tokens"]
    # the evaluator reads each text whole, then its tokens from the 17th on in steps of 4 behind 16 others
    assert (own, read - own) == (128 * row["num_windows"], (128 + 27 * 20 + 19) * row["num_windows"])
