"""Greedy answers to many prompts: batched, written as they come, and taken up again if a run was cut off."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.models.answer_file import Journal, fingerprint_of, tokens_hash
from longext.models.batching import default_batch_tokens
from longext.models.chat import control_baseline, stripped_marks
from longext.models.decode import generate
from longext.models.hf import HFLanguageModel
from longext.models.protocol import LanguageModel
from longext.models.turns import control_tokens, split_thought
from longext.processes.dealing import deal, workers_of

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
    """

    id: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0


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

    The longest prompts go first. A plain model takes several at once (left padding, KV cache); other models take them
    one by one. Batches depend on all requests, not on those still open, so a run that was cut off and taken up again
    computes what an uninterrupted one computes.

    Args:
        path: JSON-lines file that every finished batch is appended to; answers that it holds are not made again.
        on_progress: called with the number of requests just answered, those found in `path` first.
        batch_tokens: prompt and new tokens of a batch (default: one prompt on a CPU, 32,768 tokens on an accelerator).
        is_chat: the prompts are messages in the chat template; None: control tokens in them are not looked for.

    Raises:
        ConfigError: `path` holds answers to other requests or of another model.
        DataError: `path` is no file of predictions, or a line of it cannot be read.
    """
    assert len({request.id for request in requests}) == len(requests), "two requests share an id"
    assert all(request.input_ids for request in requests), "a prompt needs a token"
    control = _control_counts(model, is_chat)
    numbers = {request.id: number for number, request in enumerate(requests)}

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(each) for each in _answer(model, [requests[i] for i in batch], control)]

    rows = deal(
        list(numbers),
        [[numbers[request.id] for request in batch] for batch in _batches(model, requests, batch_tokens)],
        answer,
        keeper=None if path is None else _journal(model, requests, path),
        on_progress=on_progress,
        workers=workers_of(model),
    )
    return [Prediction(**row) for row in rows]


def _control_counts(model: LanguageModel, is_chat: bool | None) -> dict[int, int]:
    """Return for every control token how often a prompt has it of itself; nothing for None."""
    if is_chat is None:
        return {}
    counts = Counter(control_baseline(model, is_chat))
    return {token: counts[token] for token in control_tokens(model.tokenizer).values()}


# --- batches ----------------------------------------------------------------------------------------------------------


def _batches(model: LanguageModel, requests: Sequence[Request], batch_tokens: int | None) -> Iterator[list[Request]]:
    """Yield requests that can share a tensor, longest first."""
    is_plain = isinstance(model, HFLanguageModel)

    def key(request: Request) -> Hashable:
        # one rotation holds for a batch, and every prompt has that of its own length when it is alone
        length = len(request.input_ids) + request.max_new_tokens if model.follows_length else None
        return request.max_new_tokens, request.stop_ids, request.min_new_tokens, length

    budget = (batch_tokens or default_batch_tokens(model.device)) if is_plain else 1
    open_batches: dict[Hashable, list[Request]] = {}
    for request in sorted(requests, key=lambda r: (-len(r.input_ids), r.id)):
        batch = open_batches.setdefault(key(request), [])
        if batch and (len(batch) + 1) * (len(batch[0].input_ids) + batch[0].max_new_tokens) > budget:
            yield batch
            batch = open_batches[key(request)] = []
        batch.append(request)
    yield from open_batches.values()


def _answer(model: LanguageModel, batch: Sequence[Request], control: Mapping[int, int]) -> list[Prediction]:
    reading = _Reading.of(model)
    if batch[0].max_new_tokens < 1:
        rows: list[list[int]] = [[] for _ in batch]
    elif isinstance(model, HFLanguageModel):
        rows = _greedy_batch(model, batch, reading)
    else:
        rows = [model.greedy(request.input_ids, request.max_new_tokens) for request in batch]
    return [reading.prediction(request, row, control) for request, row in zip(batch, rows, strict=True)]


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
            spells_control=any(n > control.get(t, 0) for t, n in Counter(request.input_ids).items() if t in control),
        )


def begins_thought(model: LanguageModel, prompt: Sequence[int], marks: tuple[str, str]) -> bool:
    """Return True if a prompt ends with the beginning of a thought."""
    end = model.tokenizer.decode(list(prompt[-_MARK_TOKENS:]), skip_special_tokens=False)
    return str(end).rstrip().endswith(marks[0])


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    places = [text.find(string) for string in stop]
    return min((place for place in places if place >= 0), default=None)


def _greedy_batch(model: HFLanguageModel, batch: Sequence[Request], reading: _Reading) -> list[list[int]]:
    """Return the new tokens of each request; what follows a row's end is only there to fill."""
    prompts, first = [request.input_ids for request in batch], batch[0]
    longest = max(map(len, prompts))
    return generate(
        model,
        prompts,
        first.max_new_tokens,
        reading.ends | set(first.stop_ids),
        min_new_tokens=first.min_new_tokens or None,
        stopping_criteria=_stopping(reading, batch, longest) if any(request.stop for request in batch) else None,
    )


def _stopping(reading: _Reading, batch: Sequence[Request], longest: int) -> Any:
    """Return transformers' stopping criterion that ends a row once its text holds one of its stop strings.

    A thought is no text of the answer: stop strings in it end nothing.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class _StopStrings(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            rows = zip(batch, input_ids[:, longest:].tolist(), strict=True)
            is_stopped = [
                _first_stop(reading.visible(request, row)[2], request.stop) is not None for request, row in rows
            ]
            return torch.tensor(is_stopped, device=input_ids.device)

    return StoppingCriteriaList([_StopStrings()])


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
    return Journal(path, fingerprint, check=lambda row: Prediction(**row))
