"""Greedy answers to many prompts: batched, written as they come, and taken up again where a run was cut off."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.errors import DataError
from longext.evaluation.answer_file import append_answers, fingerprint_of, open_answers
from longext.evaluation.batching import default_batch_tokens
from longext.evaluation.model import LENGTH_DEPENDENT, HFLanguageModel, NanWatch, plain_generation
from longext.evaluation.protocol import LanguageModel


@dataclass(frozen=True)
class Request:
    """One prompt to be continued greedily.

    Attributes:
        id: its name, unique among the requests of a run.
        input_ids: the prompt, BOS included where it has one.
        max_new_tokens: where the answer ends at the latest.
        stop: strings that end the answer; the answer is what stands before the first of them.
        stop_ids: tokens that end the answer, beside those that the model itself ends with.
        min_new_tokens: ending tokens are not chosen before this many (a model read by segments: not heeded there).
    """

    id: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Prediction:
    """The answer to one request; `num_new_tokens` counts what was generated, the ending token included."""

    id: str
    text: str
    num_prompt_tokens: int
    num_new_tokens: int


Progress = Callable[[int], None]


def generate_predictions(
    model: LanguageModel,
    requests: Sequence[Request],
    path: Path | None,
    on_progress: Progress | None = None,
    batch_tokens: int | None = None,
) -> list[Prediction]:
    """Return the greedy answer to every request, in the order of `requests`.

    The longest prompts go first. A plain model takes several at once (left padding, KV cache); other models take them
    one by one. Batches depend on all requests, not on those still open, so a run that was cut off and taken up again
    computes what an uninterrupted one computes.

    Args:
        path: JSON-lines file that every finished batch is appended to; answers that it holds are not made again.
        on_progress: called with the number of requests just answered, those found in `path` first.
        batch_tokens: prompt and new tokens of a batch (default: one prompt on a CPU, 32,768 tokens on an accelerator).

    Raises:
        ConfigError: `path` holds answers to other requests or of another model.
        DataError: `path` is no file of predictions, or a line of it cannot be read.
    """
    assert len({request.id for request in requests}) == len(requests), "two requests share an id"
    assert all(request.input_ids for request in requests), "a prompt needs a token"
    done: dict[str, Prediction] = {}
    if path is not None:
        done = _kept(model, requests, path)
    if done and on_progress:
        on_progress(len(done))
    for batch in _batches(model, requests, batch_tokens):
        if all(request.id in done for request in batch):
            continue
        made = [prediction for prediction in _answer(model, batch) if prediction.id not in done]
        if path is not None:
            append_answers(path, [dataclasses.asdict(prediction) for prediction in made])
        done.update({prediction.id: prediction for prediction in made})
        if on_progress:
            on_progress(len(made))
    return [done[request.id] for request in requests]


# --- batches ----------------------------------------------------------------------------------------------------------


def _batches(model: LanguageModel, requests: Sequence[Request], batch_tokens: int | None) -> Iterator[list[Request]]:
    """Yield requests that can share a tensor, longest first."""
    is_plain = isinstance(model, HFLanguageModel)
    follows_length = isinstance(model, HFLanguageModel) and model.rope_type in LENGTH_DEPENDENT

    def key(request: Request) -> Hashable:
        # one rotation holds for a batch, and every prompt has that of its own length when it is alone
        length = len(request.input_ids) + request.max_new_tokens if follows_length else None
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


def _answer(model: LanguageModel, batch: Sequence[Request]) -> list[Prediction]:
    if batch[0].max_new_tokens < 1:
        rows: list[list[int]] = [[] for _ in batch]
    elif isinstance(model, HFLanguageModel):
        rows = _greedy_batch(model, batch)
    else:
        rows = [model.greedy(request.input_ids, request.max_new_tokens) for request in batch]
    return [_prediction(model, request, row) for request, row in zip(batch, rows, strict=True)]


def _prediction(model: LanguageModel, request: Request, new: Sequence[int]) -> Prediction:
    """Cut what a model generated where the request says that its answer ends."""
    end = next((i for i, t in enumerate(new) if t in request.stop_ids and i >= request.min_new_tokens), None)
    kept = list(new if end is None else new[:end])
    num_new = len(new) if end is None else end + 1
    text = model.decode(kept)
    first = _first_stop(text, request.stop)
    if first is not None:
        text = text[:first]
        counts = range(1, len(kept) + 1)
        num_new = next(n for n in counts if _first_stop(model.decode(kept[:n]), request.stop) is not None)
    return Prediction(request.id, text, len(request.input_ids), num_new)


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    places = [text.find(string) for string in stop]
    return min((place for place in places if place >= 0), default=None)


@torch.no_grad()
def _greedy_batch(model: HFLanguageModel, batch: Sequence[Request]) -> list[list[int]]:
    """Return the new tokens of each request, what follows a row's end cut off."""
    longest = max(len(request.input_ids) for request in batch)
    first = batch[0]
    pad = model.pad_token() or 0  # masked: which token fills is without effect
    rows = [[pad] * (longest - len(request.input_ids)) + list(request.input_ids) for request in batch]
    mask = [[0] * (longest - len(request.input_ids)) + [1] * len(request.input_ids) for request in batch]
    ends = sorted({*_ending_tokens(model), *first.stop_ids})
    is_ended = _stopping(model, batch, longest) if any(request.stop for request in batch) else None
    with model.frozen_rope(longest + first.max_new_tokens), plain_generation(model.model):
        output = model.model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=first.max_new_tokens,
            min_new_tokens=first.min_new_tokens or None,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=ends or None,
            stopping_criteria=is_ended,
            logits_processor=[watch := NanWatch()],
        )
    watch.check()
    # rows that end early are filled up
    return [_until(row, ends, first.min_new_tokens) for row in output[:, longest:].tolist()]


def _until(row: list[int], ends: Sequence[int], least: int) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in ends and i >= least), None)
    return row if end is None else row[: end + 1]


def _ending_tokens(model: HFLanguageModel) -> frozenset[int]:
    named = model.model.generation_config.eos_token_id
    named = model.model.config.get_text_config().eos_token_id if named is None else named
    return frozenset([named] if isinstance(named, int) else named or ())


def _stopping(model: HFLanguageModel, batch: Sequence[Request], longest: int) -> Any:
    """Return transformers' stopping criterion that ends a row once its text holds one of its stop strings."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class _StopStrings(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            texts = [model.decode(row) for row in input_ids[:, longest:].tolist()]
            found = [_first_stop(text, request.stop) is not None for text, request in zip(texts, batch, strict=True)]
            return torch.tensor(found, device=input_ids.device)

    return StoppingCriteriaList([_StopStrings()])


# --- the file ---------------------------------------------------------------------------------------------------------


def _kept(model: LanguageModel, requests: Sequence[Request], path: Path) -> dict[str, Prediction]:
    """Return the predictions in `path` by id."""
    fingerprint = fingerprint_of(model, (json.dumps(dataclasses.astuple(request)) for request in requests))
    done = {}
    for number, row in open_answers(path, fingerprint):
        try:
            prediction = Prediction(**row)
        except TypeError as error:
            raise DataError(f"{path}:{number} is no prediction that longext wrote. Remove the file.") from error
        done[prediction.id] = prediction
    return done
