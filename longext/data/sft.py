"""Supervised examples: rows of a source become token ids with a mask of the answers.

An example is rendered to one text with the character spans of its answers and tokenised once; offsets carry the spans
to tokens, so no token is lost or doubled at the border of a prompt and an answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longext.data.cache import TokenizedText
from longext.data.config import RowsConfig
from longext.data.conversations import Conversation, read_conversation
from longext.data.documents import Row
from longext.data.prompts import ControlTokens, RenderedExample, Span, make_prompt, resolve_prompt, whole_offsets
from longext.errors import ConfigError, DataError

_KEEP = 32  # tokens of a shortened text that stay at either end: where the task and the question are
_BATCH = 32  # examples tokenised at a time


@dataclass(frozen=True, kw_only=True)
class SftReport:
    """How many examples there are to train on, how many of them were shortened, and how many were left out.

    Attributes:
        num_dropped_long: the answers and the least prompt do not fit the length.
        num_dropped_empty: nothing to train on.
        num_split: conversations that became an example for each answer, since the template rewrites earlier turns.
    """

    num_examples: int = 0
    num_truncated: int = 0
    num_dropped_long: int = 0
    num_dropped_empty: int = 0
    num_split: int = 0


def shorten(trained: NDArray[np.bool_], material: Sequence[Span], length: int, keep: int) -> NDArray[np.intp] | None:
    """Return which tokens stay so that at most `length` do, int [<= length] rising, or None if that cannot be.

    Tokens go from the middle of the longest material (token spans), then of the next longest, `keep` tokens of each
    staying at either end; trained tokens and those outside the material never go.
    """
    excess = len(trained) - length
    stays = np.ones(len(trained), dtype=bool)
    for start, end in sorted(material, key=lambda span: span[0] - span[1]):
        number = min(excess, end - start - 2 * keep)
        if number > 0:
            first = start + (end - start - number + 1) // 2
            stays[first : first + number] = False
            excess -= number
    if excess > 0 or (trained & ~stays).any():
        return None
    return np.flatnonzero(stays)


class ExampleEncoder:
    """Turns rows into token ids with a mask, and counts what it shortens and leaves out.

    Args:
        tokenizer: a fast tokenizer (offsets are needed).
        length: the most tokens of an example; `config.max_tokens` if that is less.
        config: `prompt` and `max_tokens` are read.

    Raises:
        ConfigError: unknown prompt, or a tokenizer without offsets.
    """

    def __init__(self, tokenizer: Any, length: int, config: RowsConfig) -> None:
        if not tokenizer.is_fast:
            raise ConfigError("Task sft needs a fast tokenizer (a tokenizer.json); this one gives no offsets.")
        self.tokenizer = tokenizer
        self.length = min(length, config.max_tokens or length)
        self.prompt = resolve_prompt(config.prompt, tokenizer)
        self.data = config.data
        self.counts = dataclasses.asdict(SftReport())
        self._controls = ControlTokens.of(tokenizer)
        self._prompts = {name: make_prompt(name, tokenizer, self._controls) for name in {self.prompt, "plain"}}
        self._raw_prompt = "plain" if config.prompt == "auto" else self.prompt
        self._notes: dict[str, None] = {}  # a set in order
        self._unused: Counter[str] = Counter()
        self._spelled: list[tuple[str, str]] = []  # of each row with control tokens: its place and the first of them
        self._digest = hashlib.sha256()

    @property
    def settings(self) -> dict[str, Any]:
        """What the tokens depend on besides data and tokenizer."""
        return {"prompt": self.prompt, "raw_prompt": self._raw_prompt, "length": self.length}

    @property
    def report(self) -> SftReport:
        """The counts so far."""
        return SftReport(**self.counts)

    def meta(self) -> dict[str, Any]:
        """Return what a token cache notes of the examples: counts, hash of the rows and the token rows end with."""
        pad = padding_token(self.tokenizer)
        return {**self.counts, "notes": self.notes(), "data_sha256": self._digest.hexdigest(), "pad_token_id": pad}

    def notes(self) -> list[str]:
        """Return what a user should know of the rows so far, a sentence each."""
        long, empty, split = (self.counts[f"num_{name}"] for name in ("dropped_long", "dropped_empty", "split"))
        where, token = self._spelled[0] if self._spelled else ("", "")
        unused = ", ".join(f"{name} ({number:,})" for name, number in self._unused.most_common())
        facts = (
            (long, f"Examples left out because their answers do not fit {self.length:,} tokens: {long:,}."),
            (empty, f"Rows left out because they have no answer to train on (empty, or weight 0): {empty:,}."),
            (
                split,
                f"Rows that became an example for each answer, as the chat template rewrites earlier turns: {split:,}.",
            ),
            (
                where,
                f"Rows that spell control tokens, which they become: {len(self._spelled):,} ('{token}' in {where}).",
            ),
            (unused, f"Fields of rows that are not used: {unused}."),
        )
        return [*self._notes, *(text for is_so, text in facts if is_so)]

    def encode(self, rows: Iterable[Row]) -> Iterator[TokenizedText]:
        """Yield the examples of `rows` that can be trained on, in order, each of at most `length` tokens.

        Raises:
            DataError: a row is no example (names it), or none is left.
        """
        examples = (example for row in rows for example in self._examples(row))
        while batch := list(itertools.islice(examples, _BATCH)):
            encoded = self.tokenizer(
                [example.text for _, example in batch],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            parts = zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for (name, example), ids, offsets in parts:
                text = self._mask(name, example, np.asarray(ids), whole_offsets(offsets))
                if text is not None:
                    yield text
        if not self.counts["num_examples"]:
            raise DataError(self._nothing_left())

    def _examples(self, row: Row) -> list[tuple[str, RenderedExample]]:
        """Return the examples of one row with their names."""
        self._digest.update(json.dumps(row.value, sort_keys=True, default=str).encode() + b"\0")
        conversation = read_conversation(row, self._unused)
        self._look_for_control_tokens(conversation, row.where)
        if not conversation.has_answer:
            self.counts["num_dropped_empty"] += 1
            return []
        render = self._prompts[self._raw_prompt if conversation.is_raw else self.prompt]
        try:
            examples = render(conversation)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        self._notes.update(dict.fromkeys(note for example in examples for note in example.notes))
        self.counts["num_split"] += len(examples) > 1
        if len(examples) == 1:
            return [(row.id, examples[0])]
        return [(f"{row.id}#{number}", example) for number, example in enumerate(examples, 1)]

    def _look_for_control_tokens(self, conversation: Conversation, where: str) -> None:
        matches = (self._controls.special.search(turn.content) for turn in conversation.turns)
        spelled = next((match.group() for match in matches if match), None)
        if spelled is not None:
            self._spelled.append((where, spelled))

    def _mask(
        self, name: str, example: RenderedExample, ids: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> TokenizedText | None:
        trained = np.zeros(len(ids), dtype=bool)
        is_added = np.isin(ids, list(self._controls.ids))
        for start, end in example.answers:
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
            # A token that joins prompt and answer is of the answer; a control token that swallows white space is not.
            trained |= inside & ~(is_added & (offsets[:, 0] < start))
        trained[:1] = False  # nothing comes before the first token to predict it from
        if not trained.any():
            self.counts["num_dropped_empty"] += 1
            return None
        stays: NDArray[np.intp] | None = np.arange(len(ids))
        if len(ids) > self.length:
            stays = shorten(
                trained, _token_spans(example.material(), offsets), self.length, min(_KEEP, self.length // 8)
            )
        if stays is None:
            self.counts["num_dropped_long"] += 1
            return None
        self.counts["num_examples"] += 1
        self.counts["num_truncated"] += len(stays) < len(ids)
        return TokenizedText(id=name, input_ids=ids[stays].tolist(), trained=trained[stays].tolist())

    def _nothing_left(self) -> str:
        long, empty = self.counts["num_dropped_long"], self.counts["num_dropped_empty"]
        advice = f" Train at more than {self.length:,} tokens, or shorten the answers." if long else ""
        return f"No answer tokens left in {self.data}: {long:,} examples too long, {empty:,} without an answer.{advice}"


def _token_spans(spans: Sequence[Span], offsets: NDArray[np.int64]) -> list[Span]:
    """Return the runs of tokens that are wholly inside each character span."""
    runs = []
    for start, end in spans:
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0]))
        if len(inside):
            runs.append((int(inside[0]), int(inside[-1]) + 1))
    return runs


def padding_token(tokenizer: Any) -> int:
    """Return the token that fills rows: the padding token if it is in the base vocabulary, else EOS, else 0.

    A padding token added on top may have no row in the embedding, which longext never resizes.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad < tokenizer.vocab_size:
        return int(pad)
    return int(eos) if eos is not None else 0
