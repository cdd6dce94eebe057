"""Greedy answers to many prompts: batched, written as they come, and taken up again if a run was cut off."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.models.answer_file import PACE, Journal, fingerprint_of, tokens_hash
from longext.models.batching import default_batch_tokens
from longext.models.chat import control_baseline, stripped_marks
from longext.models.hf import HFLanguageModel
from longext.models.protocol import LanguageModel
from longext.models.throughput.caches import join_rows, row_of
from longext.models.throughput.pace import Load, Pace, is_out_of_memory, measured_pace, release_memory
from longext.models.throughput.prefixes import (
    PrefixReader,
    is_worth_it,
    kept_prefix,
    num_tokens,
    sharing_order,
    stretches_of,
)
from longext.models.throughput.rows import write_rows
from longext.models.turns import control_tokens, split_thought
from longext.processes.dealing import deal, share, workers_of
from longext.processes.launcher import is_main_process

_MARK_TOKENS = 16  # of a prompt's end: more than any mark of a thought has


@dataclass(frozen=True)
class Request:
    """One prompt to be continued greedily.

    Attributes:
        id: its name, unique among the requests of a run.
        input_ids: the prompt, BOS included if it has one.
        max_new_tokens: where the answer ends at the latest.
        stop: strings that end the answer; the answer is what comes before the first of them.
        stop_ids: tokens that end the answer, besides those that end every answer of the model.
        min_new_tokens: ending tokens are not chosen before this many (ignored by a model read by segments).
        frame_ids: a prompt of several turns without its texts, whose control tokens are its own; empty for one turn.
    """

    id: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    frame_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The answer to one request.

    Attributes:
        text: without what ended it, and without a thought if those are taken off; "" if a thought has no end.
        num_new_tokens: what was generated, the ending token included.
        is_cut: the budget ended it.
        num_thought_tokens: tokens of the thought that was taken off.
        is_thought_open: that thought has no end.
        prompt_sha256: of the prompt's tokens.
        spells_control: the question spells control tokens, which the model reads as such.
    """

    id: str
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    is_cut: bool = False
    num_thought_tokens: int = 0
    is_thought_open: bool = False
    prompt_sha256: str = ""
    spells_control: bool = False


Progress = Callable[[int], None]


def load_of(requests: Sequence[Request]) -> Load:
    """Return what there is to read and to write."""
    return Load(prompts=[each.input_ids for each in requests], num_new=sum(each.max_new_tokens for each in requests))


def generate_predictions(
    model: LanguageModel,
    requests: Sequence[Request],
    path: Path | None,
    on_progress: Progress | None = None,
    batch_tokens: int | None = None,
    *,
    is_chat: bool | None = False,
) -> list[Prediction]:
    """Return the greedy answer to every request, in the order of `requests`.

    A plain model reads what prompts share once and writes several answers together; readers by segments take prompts of
    one length together. Batches depend on all requests and on what was measured, which `path` holds, and not on those
    still open: a run that was cut off and taken up again computes what an uninterrupted one computes.

    Args:
        path: JSON-lines file that every finished batch is appended to; answers that it holds are not made again.
        on_progress: called with the number of requests just answered, those found in `path` first.
        batch_tokens: prompt and new tokens of a batch (default: as measured on this device; for runs that are not worth
            it one prompt on a CPU, 32,768 tokens on an accelerator).
        is_chat: the prompts are messages in the chat template; None: control tokens in them are not looked for.

    Raises:
        ConfigError: `path` holds answers to other requests or of another model.
        DataError: `path` is no file of predictions, or a line of it cannot be read.
    """
    assert len({request.id for request in requests}) == len(requests), "two requests share an id"
    assert all(request.input_ids for request in requests), "a prompt needs a token"
    keeper = None if path is None else _journal(model, requests, path)
    pace = _agreed_pace(model, requests, keeper) if batch_tokens is None else None
    writer = _Writer(model, requests, batch_tokens, pace, _control_counts(model, is_chat))
    rows = deal(
        [request.id for request in requests],
        writer.stretches(),
        writer.answer,
        keeper=keeper,
        on_progress=on_progress,
        workers=workers_of(model),
    )
    return [Prediction(**row) for row in rows]


def _agreed_pace(model: LanguageModel, requests: Sequence[Request], keeper: Journal | None) -> Pace | None:
    """Return what was measured, by the run that this one goes on with if there is one, the same in all processes."""
    # the main process's file counts: another machine may not have it
    kept = share().agreed(None if keeper is None else keeper.read().get(PACE))
    if kept is not None:
        found = Pace(**kept["pace"])
    else:
        found = share().agreed(measured_pace(model, load_of(requests)))
        if keeper is not None and found is not None and is_main_process():
            keeper.add({PACE: {"pace": dataclasses.asdict(found)}})
    return found


def _control_counts(model: LanguageModel, is_chat: bool | None) -> dict[int, int]:
    """Return for every control token how often a prompt has it of itself; nothing for None."""
    if is_chat is None:
        return {}
    counts = Counter(control_baseline(model, is_chat))
    return {token: counts[token] for token in control_tokens(model.tokenizer).values()}


# --- batches ----------------------------------------------------------------------------------------------------------


class _Writer:
    """Makes the answers of a run: which prompts go together, in what order, and what is kept of one for the next.

    Prompts that begin alike follow each other, if that saves enough, and their common beginning is read once; else the
    longest go first. Each prompt is read by itself and answers are written together, unless reading together is faster
    too. All of it follows from all requests, not from those still open.

    Args:
        batch_tokens: prompt and new tokens of a batch; None: as `pace` says, else one prompt on a CPU.
        pace: what was measured.
    """

    def __init__(
        self,
        model: LanguageModel,
        requests: Sequence[Request],
        batch_tokens: int | None,
        pace: Pace | None,
        control: Mapping[int, int],
    ) -> None:
        self._model, self._control, self._reading = model, control, _Reading.of(model)
        self._is_plain = isinstance(model, HFLanguageModel)
        self._most = pace.rows if pace else None
        self._budget = 1  # a prompt at a time
        if self._is_plain or hasattr(model, "greedy_rows"):
            self._budget = pace.most_tokens if pace else batch_tokens or default_batch_tokens(model.device)
        self._requests = requests
        texts = [request.input_ids for request in requests]
        together = pace.together if pace else 1.0  # what reading prompts in one tensor gains
        order, kept = sharing_order(texts) if self._is_plain else ([], [])
        shares = is_worth_it(texts, kept) and num_tokens(texts) > together * (num_tokens(texts) - sum(kept))
        apart = shares or (self._most or 1) > 1 and together == 1
        self._reader = PrefixReader.of(model) if self._is_plain and apart else None
        if self._is_plain and self._reader is None and pace and together == 1:
            self._most = 1
        longest = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), requests[i].id))
        self._shares = shares and self._reader is not None
        self._order = order if self._shares else longest

    def stretches(self) -> list[list[int]]:
        """Return requests that are answered one after the other, whatever was answered before, by number."""
        longest = max((len(request.input_ids) for request in self._requests), default=0)

        def key(number: int) -> Hashable:
            request = self._requests[number]
            # one rotation holds for a batch, and every prompt has that of its own length when it is alone
            length = len(request.input_ids) + request.max_new_tokens if self._model.follows_length else None
            # padding is read too, and keys that only fill with every token, so lengths in a batch are alike
            parts = 0 if self._most == 1 else 4 if self._reader is None else 1  # of an octave
            size = int(parts * math.log2(longest / len(request.input_ids)))
            if not self._is_plain:
                size = len(request.input_ids)
            return request.max_new_tokens, request.stop_ids, request.min_new_tokens, length, size

        groups: dict[Hashable, list[int]] = {}
        for number in self._order:
            groups.setdefault(key(number), []).append(number)
        if not self._shares:
            return [batch for group in groups.values() for batch in self._batches(group)]
        texts = [request.input_ids for request in self._requests]
        found = []
        for group in groups.values():
            kept = [0, *(kept_prefix(texts[a], texts[b], len(texts[b]) - 1) for a, b in itertools.pairwise(group))]
            found += stretches_of(group, kept, self._most or 0)
        return found

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yield requests whose answers are written together."""
        batch: list[int] = []
        for number in numbers:
            members = [self._requests[each] for each in (*batch, number)]
            size = max(len(each.input_ids) for each in members) + members[0].max_new_tokens
            if batch and (len(members) * size > self._budget or len(batch) == self._most):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def answer(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the answers of a stretch."""
        if self._reader is not None:
            self._reader.forget()
        batches = ([self._requests[number] for number in batch] for batch in self._batches(numbers))
        return [dataclasses.asdict(each) for batch in batches for each in self._answers(batch)]

    def _answers(self, batch: Sequence[Request]) -> list[Prediction]:
        """Return the answers of a batch; where memory ends, those of its halves."""
        try:
            rows = self._write(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            rows = None
        if rows is None:  # outside the handler, which holds on to what the batch needed
            self._forget()
            middle = len(batch) // 2
            return [*self._answers(batch[:middle]), *self._answers(batch[middle:])]
        return [self._reading.prediction(request, row, self._control) for request, row in zip(batch, rows, strict=True)]

    def _forget(self) -> None:
        if self._reader is not None:
            self._reader.forget()
        release_memory(self._model.device)

    def _write(self, batch: Sequence[Request]) -> list[list[int]]:
        first, model = batch[0], self._model
        if first.max_new_tokens < 1:
            return [[] for _ in batch]
        if not isinstance(model, HFLanguageModel):
            if len(batch) == 1:
                return [model.greedy(first.input_ids, first.max_new_tokens)]
            reader: Any = model
            rows: list[list[int]] = reader.greedy_rows([each.input_ids for each in batch], first.max_new_tokens)
            return rows
        return write_rows(
            model,
            [request.input_ids for request in batch],
            first.max_new_tokens,
            self._reading.ends | set(first.stop_ids),
            min_new_tokens=first.min_new_tokens,
            is_stopped=self._stopped(batch),
            cache=self._read(batch),
        )

    def _read(self, batch: Sequence[Request]) -> Any:
        """Return the keys and values of prompts without their last tokens; None if they are read as they are written.

        The cache of one prompt is the reader's own, which goes back to the prompt when the next one is read.
        """
        reader = self._reader
        if reader is None or any(len(request.input_ids) < 2 for request in batch):
            return None
        rows = []
        for request in batch:
            reader.read(request.input_ids[:-1])
            rows.append(row_of(reader.cache))
        return reader.cache if len(batch) == 1 else join_rows(reader.model, rows, batch[0].max_new_tokens + 1)

    def _stopped(self, batch: Sequence[Request]) -> Callable[[int, list[int]], bool] | None:
        """Return what tells that an answer holds one of its stop strings; a thought is no text of the answer."""
        if not any(request.stop for request in batch):
            return None
        reading = self._reading
        return lambda i, new: _first_stop(reading.visible(batch[i], new)[2], batch[i].stop) is not None


@dataclass(frozen=True)
class _Reading:
    """How generated tokens become an answer.

    Attributes:
        ends: tokens that end every answer.
        marks: texts around a thought that is taken off, None for none.
    """

    model: LanguageModel
    ends: frozenset[int]
    marks: tuple[str, str] | None

    @staticmethod
    def of(model: LanguageModel) -> _Reading:
        """Return how the answers of a model are read."""
        return _Reading(model, model.ending_tokens, stripped_marks(model))

    def raw(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, control tokens included."""
        return str(self.model.tokenizer.decode(list(ids), skip_special_tokens=False))

    def visible(self, request: Request, ids: Sequence[int]) -> tuple[int, bool, str]:
        """Return (tokens of the thought, the thought has no end, the text behind it)."""
        if self.marks is None:
            return 0, False, self.model.decode(ids)
        is_begun = begins_thought(self.model, request.input_ids, self.marks)
        thought, is_open = split_thought(self.raw, ids, self.marks, is_begun)
        text = self.model.decode(ids[thought:])
        return thought, is_open, text.lstrip() if thought else text

    def prediction(self, request: Request, new: Sequence[int], control: Mapping[int, int]) -> Prediction:
        """Cut what a model generated where its answer ends."""
        last, least = len(new) - 1, request.min_new_tokens
        ends = (i for i, t in enumerate(new) if (t in self.ends | set(request.stop_ids) and i >= least))
        # a model read by segments knows no minimum: there an ending token may be the last at any place
        end = next(ends, last if new and new[last] in self.ends else None)
        tokens = list(new if end is None else new[:end])
        num_new = len(new) if end is None else end + 1
        thought, is_open, text = self.visible(request, tokens)
        first = _first_stop(text, request.stop)
        own = Counter(request.frame_ids) if request.frame_ids else control
        if first is not None:
            text = text[:first]
            counts = range(thought, len(tokens) + 1)
            num_new = next(
                n for n in counts if _first_stop(self.visible(request, tokens[:n])[2], request.stop) is not None
            )
        return Prediction(
            request.id,
            text,
            len(request.input_ids),
            num_new,
            is_cut=end is None and first is None and num_new >= request.max_new_tokens,
            num_thought_tokens=thought,
            is_thought_open=is_open,
            prompt_sha256=tokens_hash(request.input_ids),
            spells_control=any(n > own.get(t, 0) for t, n in Counter(request.input_ids).items() if t in control),
        )


def begins_thought(model: LanguageModel, prompt: Sequence[int], marks: tuple[str, str]) -> bool:
    """Return True if a prompt ends with the beginning of a thought."""
    end = model.tokenizer.decode(list(prompt[-_MARK_TOKENS:]), skip_special_tokens=False)
    return str(end).rstrip().endswith(marks[0])


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    places = [text.find(string) for string in stop]
    return min((place for place in places if place >= 0), default=None)


# --- what a reader of answers has to know -----------------------------------------------------------------------------


def answer_notes(predictions: Collection[Prediction], *, empty: bool = True) -> list[str]:
    """Return what may spoil answers: cut by the budget, empty, thoughts taken off, control tokens in questions.

    Args:
        empty: tell of empty answers.
    """
    cut = sum(answer.is_cut for answer in predictions)
    none = sum(not answer.text.strip() for answer in predictions)
    thoughts = sum(answer.num_thought_tokens > 0 for answer in predictions)
    opened = sum(answer.is_thought_open for answer in predictions)
    spelled = sum(answer.spells_control for answer in predictions)
    notes = []
    if cut:
        notes.append(f"{_share(cut, predictions)} ended at the budget of new tokens, not at their own end.")
    if none and empty:
        notes.append(f"{_share(none, predictions)} are empty.")
    if thoughts:
        without = f"; {opened} had no end within the budget, and these answers count as empty" if opened else ""
        notes.append(
            f"A thought was taken off {_share(thoughts, predictions)} (--no-strip-thinking keeps it){without}."
        )
    if spelled:
        notes.append(
            f"The texts of {spelled} of {len(predictions)} prompts spell control tokens, which the model reads as "
            "such: --neutralise-control-tokens makes text of them."
        )
    return notes


def _share(count: int, predictions: Collection[Prediction]) -> str:
    return f"{count} of {len(predictions)} answers ({count / len(predictions):.0%})"


# --- the file ---------------------------------------------------------------------------------------------------------


def _journal(model: LanguageModel, requests: Sequence[Request], path: Path) -> Journal:
    """Return the file of predictions at `path`."""
    fingerprint = fingerprint_of(model, (json.dumps(dataclasses.astuple(request)) for request in requests))
    return Journal(path, fingerprint, check=lambda row: Pace(**row["pace"]) if row["id"] == PACE else Prediction(**row))
