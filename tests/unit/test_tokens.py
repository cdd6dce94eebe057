"""Long texts are tokenised in windows: the tokens are those of one call, whatever the text and the tokenizer."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from longext.checkpoint.bundled import BUNDLED_MODELS, SAMPLE_DOCUMENT
from longext.errors import DataError
from longext.models import tokens
from longext.models.hf import load_tokenizer
from longext.models.tokens import control_tokens, count_controls, encode_text


def _words(rng, letters, count):
    return "".join(rng.choice(letters) for _ in range(count))


RNG = random.Random(0)
TEXTS = {
    "prose": SAMPLE_DOCUMENT.read_text()[:30_000],
    "one line": SAMPLE_DOCUMENT.read_text()[:30_000].replace("\n", " "),
    "one letter": "a" * 20_000,
    "spaces": " " * 20_000,
    "digits": _words(RNG, "0123456789", 20_000),
    "characters of several bytes": "\U0001f600\u00e9\u6f22\u5b57" * 5_000,
    "anything": "".join(chr(RNG.randrange(32, 0x3000)) for _ in range(20_000)),
    "control tokens": "hello <|endoftext|></s>x " * 1_500,
}


@pytest.fixture(scope="module")
def tokenizers():
    """A byte-level one, and one in the manner of SentencePiece that puts a space in front of a text."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    piece = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    piece.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    piece.train_from_iterator(SAMPLE_DOCUMENT.read_text()[:20_000].split("\n"), trainer)
    bundled = load_tokenizer(BUNDLED_MODELS["books-5m"], False)
    return {
        "bytes": bundled,
        "pieces": PreTrainedTokenizerFast(tokenizer_object=piece, eos_token="</s>", unk_token="<unk>"),
    }


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", TEXTS)
def test_windows_give_the_tokens_of_one_call(tokenizers, monkeypatch, kind, name):
    monkeypatch.setattr(tokens, "_WINDOW", 2_000)
    monkeypatch.setattr(tokens, "_OVERLAP", 600)
    tokenizer, text = tokenizers[kind], TEXTS[name]
    whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    assert encode_text(tokenizer, text) == whole
    assert encode_text(tokenizer, text, 1_234) == whole[:1_234]


def test_a_long_text_is_never_tokenised_in_one_piece(tokenizers, monkeypatch):
    monkeypatch.setattr(tokens, "_WINDOW", 2_000)
    monkeypatch.setattr(tokens, "_OVERLAP", 600)
    longest = []

    class Watched:
        is_fast = True

        def __call__(self, text, **options):
            longest.append(len(text))
            return tokenizers["bytes"](text, **options)

    encode_text(Watched(), TEXTS["one line"])
    assert max(longest) == 2_000 and sum(longest) < 2 * 30_000


def test_control_tokens_that_a_text_spells_out_are_counted(tokenizers):
    tokenizer = tokenizers["pieces"]
    ids = tokenizer("one </s> two</s>", add_special_tokens=False).input_ids
    assert count_controls(ids, control_tokens(tokenizer)) == 2
    plain = encode_text(tokenizer, "one </s> two</s>", split_special_tokens=True)
    assert count_controls(plain, control_tokens(tokenizer)) == 0


def test_a_text_in_another_encoding_is_one_line():
    tokenizer = load_tokenizer(BUNDLED_MODELS["books-5m"])
    with pytest.raises(DataError, match="is not UTF-8 .* at place 4"):
        encode_text(tokenizer, "abc\udcff")  # what Python makes of a byte on the command line
