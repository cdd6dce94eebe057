"""What the retrieval suites share: outcomes of single prompts, cells with intervals, generated answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longext.evals.limits import PlaceLimit, place_verdicts
from longext.evals.statistics import share_interval
from longext.models.answers import Prediction, Request, generate_predictions
from longext.models.protocol import LanguageModel

ALL = "all"  # the pseudo-task of what several tasks give together
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """How one prompt was answered.

    Attributes:
        task: its kind.
        length: what the suite orders by: tokens, lines, topics.
        depth: where the needle stands, None where that is drawn.
        score: share of the expected answers that were found, 0 to 1.
        num_tokens: tokens of the prompt.
    """

    task: str
    length: int
    depth: float | None
    score: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class RetrievalCell:
    """The prompts of one task, length and depth together.

    Attributes:
        score: mean share of the expected answers that were found.
        part: share of the prompts where at least one was found.
        whole: share of the prompts where all were found.
        low, high: 95 % interval of `score`: Wilson's where prompts are right or wrong, else a bootstrap over prompts.
        num_tokens: mean tokens of the prompts.
    """

    task: str
    length: int
    depth: float | None
    num_trials: int
    score: float
    low: float
    high: float
    part: float
    whole: float
    num_tokens: float


def cells_of(outcomes: Sequence[Outcome], *, by_depth: bool = True) -> list[RetrievalCell]:
    """Return one cell per task, length and (where `by_depth`) depth, sorted; tasks stay in their order."""
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    groups: dict[tuple[str, int, float | None], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.task, outcome.length, outcome.depth if by_depth else None), []).append(outcome)
    order = sorted(groups, key=lambda key: (tasks.index(key[0]), key[1], -1 if key[2] is None else key[2]))
    return [_cell(task, length, depth, groups[task, length, depth]) for task, length, depth in order]


def pooled_cells(outcomes: Sequence[Outcome]) -> list[RetrievalCell]:
    """Return one cell per length over all tasks, every prompt counted once."""
    lengths = sorted({outcome.length for outcome in outcomes})
    return [_cell(ALL, length, None, [own for own in outcomes if own.length == length]) for length in lengths]


def _cell(task: str, length: int, depth: float | None, outcomes: Sequence[Outcome]) -> RetrievalCell:
    scores = np.array([outcome.score for outcome in outcomes])
    low, high = share_interval(scores)
    return RetrievalCell(
        task=task,
        length=length,
        depth=depth,
        num_trials=len(outcomes),
        score=float(scores.mean()),
        low=low,
        high=high,
        part=float((scores > 0).mean()),
        whole=float((scores == 1).mean()),
        num_tokens=sum(outcome.num_tokens for outcome in outcomes) / len(outcomes),
    )


def cell_rows(cells: Sequence[RetrievalCell]) -> list[dict[str, Any]]:
    """Return cells as JSON."""
    return [asdict(cell) for cell in cells]


def outcome_verdicts(
    bars: Sequence[PlaceLimit], outcomes: Sequence[Outcome], label: Callable[[int], str] = str
) -> list[dict[str, Any]]:
    """Return the bars of --fail-under with the mean score of the prompts that each is on.

    Args:
        label: how users spell a length.
    """

    def mean(task: str | None, length: str | None) -> float | None:
        own = [o.score for o in outcomes if task in (None, o.task) and length in (None, label(o.length))]
        return float(np.mean(own)) if own else None

    return place_verdicts(bars, mean)


# --- generated answers ------------------------------------------------------------------------------------------------


def partial_predictions(output: Path) -> Path:
    """Return where the answers of a run lie until its results are written."""
    return output.with_name(f"{output.name}.predictions.jsonl")


def answers_to(
    model: LanguageModel,
    prompts: Mapping[str, Sequence[int]],
    max_new_tokens: int | Mapping[str, int],
    *,
    stop: tuple[str, ...] = (),
    path: Path | None = None,
    on_progress: Progress | None = None,
    batch_tokens: int | None = None,
    is_chat: bool = False,
) -> dict[str, Prediction]:
    """Return the greedy answer to each prompt by id; see `generate_predictions`.

    Args:
        max_new_tokens: one budget for all, or that of each prompt by id.
        is_chat: the prompts are messages in the chat template.
    """
    budgets = dict.fromkeys(prompts, max_new_tokens) if isinstance(max_new_tokens, int) else max_new_tokens
    requests = [Request(name, tuple(ids), budgets[name], stop) for name, ids in prompts.items()]
    found = generate_predictions(model, requests, path, on_progress, batch_tokens, is_chat=is_chat)
    return {prediction.id: prediction for prediction in found}


def window_notes(model: LanguageModel, outcomes: Sequence[Outcome], config: Any) -> list[str]:
    """Return a note where prompts are longer than the model has positions (and no memory reads them by segments).

    Args:
        config: what the suite was asked for; its method and factor extend the positions.
    """
    longest, window = max(outcome.num_tokens for outcome in outcomes), model.context_length
    if config.memory or longest <= window:
        return []
    over = sum(outcome.num_tokens > window for outcome in outcomes)
    return [f"{over} of {len(outcomes)} prompts are longer than the model's {window:,} positions, up to {longest:,}."]


def text_hash(texts: Iterable[str]) -> str:
    """Return a SHA-256 over texts, so that two results can be told to be on the same data."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def answer_lines(
    outcomes: Sequence[Outcome], expected: Mapping[str, Sequence[str]], answers: Mapping[str, Prediction]
) -> str:
    """Return JSON lines: what was expected, the answer, its score; `outcomes` are in the order of `expected`."""
    rows = [
        {
            "id": name,
            "expected": list(wanted),
            "answer": answers[name].text,
            "score": outcome.score,
            "num_prompt_tokens": answers[name].num_prompt_tokens,
            "num_new_tokens": answers[name].num_new_tokens,
            "num_thought_tokens": answers[name].num_thought_tokens,
            "is_cut": answers[name].is_cut,
        }
        for (name, wanted), outcome in zip(expected.items(), outcomes, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
