"""Perplexity of the tokens that need far text (LongPPL), beside that of all tokens.

Key tokens are those that an evaluator, a model that reads the whole text well, predicts with far text in view and not
without. --key-tokens takes those of an earlier result, so that many models are measured with one evaluation of it.

Example: longext eval longppl books-5m --method yarn --factor 8 --evaluator out/books-4k --data books/ --lengths 4096
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.long_short import (
    MAX_LOSS,
    MIN_GAIN,
    is_key,
    long_short,
    short_context,
    short_step,
    short_windows,
)
from longext.errors import ConfigError, DataError
from longext.evals.base import Advance, Eval, Outcome, ReadingConfig, Work, register, silent
from longext.evals.limits import FAIL_OVER, PlaceLimit, check_lengths, perplexity_limits
from longext.evals.views import SEVERAL, TOKENIZER, TOKENS, Detail, Lines, Section
from longext.manifest import result_record
from longext.models.answer_file import score_each
from longext.models.methods import check_method
from longext.options import DataConfig, RuntimeConfig
from longext.settings import LENGTH, MANY, option

if TYPE_CHECKING:
    from longext.data.documents import Document
    from longext.models.protocol import LanguageModel

Spans = list[tuple[int, int]]  # characters first .. last - 1 of a text
KEY_FILE, KEY_SCHEMA = "key_tokens.json", "longext.key-tokens/1"
SUMS = ("key_nll", "num_key_tokens", "nll", "num_tokens")  # of a text or document
_CHARACTERS = 8  # of a token, to begin with, where a document is cut


@dataclass(frozen=True)
class Piece:
    """A stretch of a document and its key tokens.

    Attributes:
        document: its number.
        start, stop: characters of the document.
        sha256: of the text.
        spans: of the key tokens, in characters from `start`; neighbours are joined.
    """

    document: int
    start: int
    stop: int
    sha256: str
    spans: Spans


Keys = dict[int, list[Piece]]  # by length in tokens of the evaluator


@register("longppl")
@dataclass(frozen=True, kw_only=True)
class LongPPL(ReadingConfig, DataConfig, Eval):
    """LongPPL (arXiv 2410.23771): exp of the mean loss over key tokens, those that far text makes likely."""

    kind: ClassVar[str] = "longppl"
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="longppl",
            title="LongPPL",
            must_agree=TOKENIZER,
            views=(
                Lines(
                    "Perplexity of tokens that need far text",
                    of="results.longppl",
                    unit="perplexity",
                    lower_is_better=True,
                    axis=TOKENS,
                    value="LongPPL",
                    details=(
                        Detail("all tokens", "ppl", "{:.2f}"),
                        Detail("key tokens", "num_key_tokens", "{:,}"),
                        Detail("of", "num_tokens", "{:,}"),
                    ),
                ),
                Lines(
                    "Perplexity of all tokens of the same text",
                    of="results.ppl",
                    name="all",
                    unit="perplexity",
                    lower_is_better=True,
                    axis=TOKENS,
                    table=SEVERAL,
                    picture=SEVERAL,
                ),
            ),
        ),
    )
    limit_option: ClassVar[str] = FAIL_OVER
    limits_are_most: ClassVar[bool] = True

    evaluator: str | None = option(
        None, "Directory or Hub id of the model that finds key tokens: one that was trained at such lengths."
    )
    evaluator_method: str | None = option(
        None, "Apply this extension method to the evaluator in memory first, as --method to MODEL."
    )
    evaluator_factor: float | None = option(None, "Factor of --evaluator-method.", le=MANY)
    key_tokens: str | None = option(None, f"{KEY_FILE} of an earlier result, in place of --evaluator.")
    lengths: tuple[int, ...] = option((4096,), "Text lengths in tokens of the evaluator, comma-separated.", le=LENGTH)
    short_context: int | None = option(
        None, "Tokens in view without far text (default: a quarter of the shortest length, at most 4096).", ge=1
    )
    min_gain: float = option(MIN_GAIN, "Nats that far text takes off the loss of a key token, at least.")
    max_loss: float = option(MAX_LOSS, "Nats that the loss of a key token is below, with all text in view.")
    num_windows: int = option(1, "Texts of the largest length read of each document.", ge=1)
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)
    fail_over: tuple[str, ...] = option(
        (), "LENGTH=LONGPPL: exit with 1 if it is above that; may be repeated.", repeats=True, panel="Output"
    )

    def check(self) -> None:
        """Raise ConfigError without a source of key tokens, or for lengths that leave no far text."""
        check_method(self.method, self.factor)
        check_method(self.evaluator_method, self.evaluator_factor)
        check_lengths(self.lengths, minimum=8)
        if (self.evaluator is None) == (self.key_tokens is None):
            raise ConfigError(
                "Give --evaluator MODEL, which finds the tokens that need far text (a model trained at such lengths), "
                f"or --key-tokens {KEY_FILE} of an earlier result; not both."
            )
        context = self.context
        if context + short_step(context) >= min(self.lengths):
            raise ConfigError(
                f"--short-context {context} leaves no far text at {min(self.lengths)} tokens: give at most "
                f"{max(1, min(self.lengths) // 2)}, or longer --lengths."
            )

    @property
    def context(self) -> int:
        """Return the tokens that short windows have in view."""
        return short_context(min(self.lengths), self.short_context)

    def load_data(self) -> list[Document]:
        """Return the documents."""
        from longext.data.documents import load_documents

        return load_documents(self)

    def limits(self, data: Any) -> list[PlaceLimit]:
        """Return the limits of --fail-over."""
        return perplexity_limits(self.fail_over, self.lengths, form="LENGTH=LONGPPL")

    def open_model(self) -> None:
        """Return None: the model is opened once the evaluator is done, since memory may not hold both."""

    def find_keys(self, data: Sequence[Document], work: Work) -> tuple[Keys, dict[str, Any]]:
        """Return the key tokens by length, and what the record says of who found them."""
        if self.key_tokens is not None:
            return read_keys(Path(self.key_tokens).expanduser(), data, self)
        from longext.models.hf import load_language_model

        names = [field.name for field in dataclasses.fields(RuntimeConfig)]
        settings = {name: getattr(self, name) for name in names} | {"model": self.evaluator, "revision": None}
        model = load_language_model(RuntimeConfig(**settings), self.evaluator_method, self.evaluator_factor)
        texts = cut_texts(model, data, self)
        work.expect(
            model, [text for length, own in texts.items() for _ in own for text in self._read(length)], 0, False
        )
        with work.progress("key tokens", sum(length * len(texts[length]) for length in texts), "tokens") as advance:
            keys = {length: self._keys_of(model, data, texts[length], advance) for length in texts}
        found = model.describe()
        told = ("id", "config_sha256", "tokenizer_sha256", "remapping")
        return keys, {name: found[name] for name in told if name in found}

    def _read(self, length: int) -> list[range]:
        """Return what the evaluator reads of a text, as texts of these lengths: all of it, and the short windows."""
        windows = short_windows(length, self.context, self.step)
        return [range(length), *(range(stop - start) for start, _, stop in windows if start)]

    def _keys_of(
        self, model: LanguageModel, data: Sequence[Document], pieces: Sequence[Piece], advance: Advance
    ) -> list[Piece]:
        """Return pieces with the key tokens that the evaluator finds in them."""
        import torch

        texts = [tokens_of(model, data[piece.document].text[piece.start : piece.stop]) for piece in pieces]

        def answer(number: int) -> dict[str, Any]:
            row = torch.tensor([texts[number][0]])
            gain, loss = long_short(lambda own, first: model.score(own, first).nll, row, self.context, self.step)
            return {"is_key": is_key(gain, loss, self.min_gain, self.max_loss)[0].tolist()}

        rule = (self.context, self.step, self.min_gain, self.max_loss)
        items = [(*rule, ids) for ids, _ in texts]
        rows = score_each(model, "key tokens", items, answer, advance, [len(ids) for ids, _ in texts])
        found = (
            joined(tile for tile, key in zip(tiles[1:], row["is_key"], strict=True) if key)
            for (_, tiles), row in zip(texts, rows, strict=True)
        )
        return [dataclasses.replace(piece, spans=spans) for piece, spans in zip(pieces, found, strict=True)]

    @property
    def step(self) -> int:
        """Return the tokens by which short windows move."""
        return short_step(self.context)

    def measure(self, model: Any, data: list[Document], work: Work) -> Outcome:
        """Return the record: key tokens by the evaluator, then their loss under the model."""
        from longext.evals.models import open_model

        keys, who = self.find_keys(data, work)
        model = model if model is not None else open_model(self)
        work.expect(model, [range(length) for length in sorted(keys) for _ in keys[length]], 0, False)
        with work.progress("longppl", sum(length * len(keys[length]) for length in keys), "tokens") as advance:
            rows = [measure_keys(model, data, length, keys[length], self, advance) for length in sorted(keys)]
        text = keys_text(keys, who, data, self)
        by_length = {str(row["length"]): row["longppl"] for row in rows}
        return Outcome(
            record=longppl_record(model.describe(), who, data, rows, self),
            score_at=lambda _, length: by_length[str(length)],
            notes=[] if self.key_tokens else [f"{KEY_FILE} holds the key tokens, for --key-tokens of other models."],
            files={KEY_FILE: text},
        )


# --- key tokens -------------------------------------------------------------------------------------------------------


def tokens_of(model: LanguageModel, text: str) -> tuple[list[int], Spans]:
    """Return the tokens of a text, prefix included, and the characters of each; (0, 0) for the prefix.

    Tokens tile the text: what a tokenizer leaves out between two (spaces) belongs to the second.

    Raises:
        ConfigError: the tokenizer does not say where its tokens are.
    """
    from longext.models.tokens import with_offsets

    if not getattr(model.tokenizer, "is_fast", False):
        raise ConfigError(f"{model.name} has a slow tokenizer, which does not say where in a text its tokens are.")
    ids, offsets = with_offsets(model.tokenizer, text)
    tiles, end = [], 0
    for _, stop in offsets:
        tiles.append((end, max(end, stop)))
        end = max(end, stop)
    begun = len(model.prefix)
    return [*model.prefix, *ids], [(0, 0)] * begun + tiles


def cut_texts(model: LanguageModel, documents: Sequence[Document], config: LongPPL) -> dict[int, list[Piece]]:
    """Return pieces of documents by length, as long in tokens of the evaluator, prefix included, without keys yet.

    All lengths cover the same text: `num_windows` of the largest one of each document that fills it.

    Raises:
        DataError: no document does.
    """
    begun, longest = len(model.prefix), max(config.lengths)
    most = min(config.num_windows * (longest - begun), config.max_tokens or LENGTH)
    pieces: dict[int, list[Piece]] = {length: [] for length in sorted(config.lengths)}
    seen = 0
    for number, document in enumerate(documents):
        size = _CHARACTERS * most
        tiles = tokens_of(model, document.text[:size])[1][begun:]
        while len(tiles) < most and size < len(document.text):
            size *= 2
            tiles = tokens_of(model, document.text[:size])[1][begun:]
        seen = max(seen, len(tiles))
        covered = len(tiles[:most]) // (longest - begun) * (longest - begun)
        for length, found in pieces.items():
            for first in range(0, covered - (length - begun) + 1, length - begun):
                start, stop = tiles[first][0], tiles[first + length - begun - 1][1]
                found.append(Piece(number, start, stop, sha256_of(document.text[start:stop]), []))
    if not pieces[longest]:
        raise DataError(
            f"No document of {config.data} has {longest - begun} tokens: the longest has {seen}. Give longer "
            "documents, or --lengths within that."
        )
    return pieces


def joined(spans: Any) -> Spans:
    """Return spans in order with neighbours that touch joined; those without characters are left out."""
    found: Spans = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif stop > start:
            found.append((start, stop))
    return found


def keys_among(text: str, tiles: Spans, spans: Spans) -> list[bool]:
    """Return which tokens are key tokens: those whose characters, less the spaces around them, lie in one span."""
    found, place = [], 0
    for start, stop in tiles:
        own = text[start:stop]
        if own.strip():
            start, stop = start + len(own) - len(own.lstrip()), stop - (len(own) - len(own.rstrip()))
        while place < len(spans) and spans[place][1] < stop:
            place += 1
        found.append(stop > start and place < len(spans) and spans[place][0] <= start and stop <= spans[place][1])
    return found


def sha256_of(text: str) -> str:
    """Return the hash that tells one piece of text from another."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def keys_text(keys: Keys, who: Mapping[str, Any], documents: Sequence[Document], config: LongPPL) -> str:
    """Return the file of key tokens."""
    pieces = {str(length): [dataclasses.asdict(piece) for piece in own] for length, own in keys.items()}
    return json.dumps({"schema": KEY_SCHEMA, "evaluator": who, **definition(config), "lengths": pieces}) + "\n"


def definition(config: LongPPL) -> dict[str, Any]:
    """Return what decides which tokens are key tokens, beside the evaluator and the text."""
    return {name: getattr(config, name) for name in ("context", "step", "min_gain", "max_loss")}


def read_keys(path: Path, documents: Sequence[Document], config: LongPPL) -> tuple[Keys, dict[str, Any]]:
    """Return the key tokens of a file for the lengths of `config`, and who found them.

    Raises:
        DataError: it is no such file, of other texts or other settings, or lacks a length.
    """
    from longext.untrusted import read_json

    advice = f"Give the {KEY_FILE} of a result of `longext eval longppl --evaluator`."
    try:
        value: dict[str, Any] = read_json(path, DataError, want=dict, advice=advice)
        if value.get("schema") != KEY_SCHEMA:
            raise DataError(f"{path} holds no key tokens. {advice}")
        keys = {int(length): [_piece(own) for own in pieces] for length, pieces in value["lengths"].items()}
        who = {**value["evaluator"]}
        other = [name for name, wanted in definition(config).items() if value[name] != wanted]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {advice}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} holds no key tokens ({type(error).__name__}: {error}). {advice}") from error
    if other or not set(config.lengths) <= set(keys):
        asked = ", ".join(f"{name} {value[name]}" for name in definition(config))
        raise DataError(
            f"{path} was made for lengths {', '.join(map(str, sorted(keys)))} with {asked}: ask for these, or give an "
            "--evaluator."
        )
    keys = {length: keys[length] for length in sorted(config.lengths)}
    for piece in (piece for own in keys.values() for piece in own):
        known = 0 <= piece.document < len(documents)
        if not known or sha256_of(documents[piece.document].text[piece.start : piece.stop]) != piece.sha256:
            raise DataError(f"{path} is of other texts than {config.data}: give the same --data.")
    return keys, who


def _piece(value: Mapping[str, Any]) -> Piece:
    document, start, stop = (int(value[name]) for name in ("document", "start", "stop"))
    spans = [(int(first), int(last)) for first, last in value["spans"]]
    return Piece(document, start, stop, str(value["sha256"]), spans)


# --- measured ---------------------------------------------------------------------------------------------------------


def measure_keys(
    model: LanguageModel,
    documents: Sequence[Document],
    length: int,
    pieces: Sequence[Piece],
    config: LongPPL,
    advance: Advance = silent,
) -> dict[str, Any]:
    """Return the row of one length: LongPPL and perplexity of the same texts, with intervals.

    Means are over all key tokens, and over all tokens; the interval resamples documents, or texts where documents are
    few.

    Raises:
        DataError: there is no key token.
    """
    import numpy as np
    import torch

    texts = [documents[piece.document].text[piece.start : piece.stop] for piece in pieces]
    tokens = [tokens_of(model, text) for text in texts]

    def answer(number: int) -> dict[str, Any]:
        return {"nll": model.score(torch.tensor([tokens[number][0]]), 1).nll[0].cpu().numpy()}

    rows = score_each(model, "text", [ids for ids, _ in tokens], answer, advance, [length] * len(texts))
    sums = np.zeros((len(pieces), len(SUMS)))
    for number, (text, (_, tiles), piece, row) in enumerate(zip(texts, tokens, pieces, rows, strict=True)):
        nll = row["nll"].astype(np.float64)
        key = np.array(keys_among(text, tiles, piece.spans)[1:])
        sums[number] = nll[key].sum(), key.sum(), nll.sum(), len(nll)
    if not sums[:, 1].any():
        raise DataError(
            f"No token of {config.data} at {length} tokens gains {config.min_gain:g} nats from text beyond "
            f"{config.context} tokens: give an --evaluator that reads such lengths, more text, or a lower --min-gain."
        )
    owners = np.array([piece.document for piece in pieces])
    whole, key_row = summarise(sums[:, 2:], owners, config), summarise(sums[:, :2], owners, config)
    totals = {documents[i].id: sums[owners == i].sum(0).tolist() for i in dict.fromkeys(owners.tolist())}
    return {
        "length": length,
        **{f"longppl{name}": value for name, value in key_row.items()},
        **{f"ppl{name}": value for name, value in whole.items()},
        "num_key_tokens": int(sums[:, 1].sum()),
        "num_tokens": int(sums[:, 3].sum()),
        "num_windows": len(pieces),
        "per_document": [{"id": name, **dict(zip(SUMS, own, strict=True))} for name, own in totals.items()],
    }


def summarise(sums: Any, owners: Any, config: LongPPL) -> dict[str, float | None]:
    """Return the perplexity "" of loss and count [texts, 2], and its 95 % interval "_low" and "_high"."""
    import numpy as np

    from longext.evals.statistics import MIN_DOCUMENTS, bootstrap_mean

    names = np.unique(owners)
    units = np.stack([sums[owners == i].sum(0) for i in names]) if len(names) >= MIN_DOCUMENTS else sums
    units = units[units[:, 1] > 0]
    # without a key token there is nothing to resample: a unit of none changes no mean
    interval = bootstrap_mean(units[:, 0], units[:, 1], num_samples=config.num_bootstrap, seed=config.seed)
    low, high = (math.exp(bound) for bound in interval) if interval else (None, None)
    return {"": math.exp(sums[:, 0].sum() / sums[:, 1].sum()), "_low": low, "_high": high}


def longppl_record(
    model: dict[str, Any],
    who: Mapping[str, Any],
    documents: Sequence[Document],
    rows: Sequence[Mapping[str, Any]],
    config: LongPPL,
) -> dict[str, Any]:
    """Return the JSON record."""
    from longext.data.documents import documents_facts

    read = {entry["id"] for row in rows for entry in row["per_document"]}
    return result_record(
        LongPPL.kind,
        model,
        {
            "id": "longppl",
            "definition": "exp of the mean loss over key tokens: those whose loss under the evaluator is below "
            "max_loss nats with the whole text before them in view, and above that by more than min_gain with the last "
            "`context` to context + step - 1 tokens alone; across tokenizers, tokens within their characters",
            "reference": "LongPPL, arXiv 2410.23771",
            "evaluator": dict(who),
            **definition(config),
            "num_windows": config.num_windows,
            "seed": config.seed,
        },
        documents_facts(config, documents, num_documents=len(read), num_too_short=len(documents) - len(read)),
        results=list(rows),
    )
