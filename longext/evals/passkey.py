"""Passkey retrieval by length and depth, under named protocols."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.errors import ConfigError, DataError
from longext.evals.base import Advance, Outcome, Work, silent
from longext.evals.passkey_prompts import (
    FILLER,
    NeedlePrompt,
    PromptTokens,
    exact_prompt,
    longlora_prompt,
    yarn_prompt,
)
from longext.evals.ranks import Choices, Rank, rank_questions, ranked_tables
from longext.evals.retrieval import ANSWERS, BOTH, GENERATE, LIKELIHOOD, first_choices, mean_at
from longext.evals.statistics import wilson_interval
from longext.manifest import result_record
from longext.models.answer_file import hash_of, tokens_hash
from longext.models.protocol import LanguageModel
from longext.untrusted import read_text

if TYPE_CHECKING:
    from longext.evals.suites.passkey import Passkey

_YARN_NEW_TOKENS = 10


def check_prompts(model: LanguageModel, config: Passkey) -> None:
    """Raise ConfigError or DataError if a prompt cannot be built: the length is too short, or too little filler."""
    tokens, filler = _prompt_tokens(model), _filler_ids(model, config)
    for length in (min(config.lengths), max(config.lengths)):
        _prompts(config, tokens, filler, length, config.places[0])


def evaluate_passkey(model: LanguageModel, config: Passkey, advance: Advance = silent) -> list[dict[str, Any]]:
    """Return one cell per length and depth; the same seeds, keys and depths for every model.

    A cell is a row of the record: `length`; `depth`, None if the protocol draws it; `num_correct` of `num_trials`,
    their `accuracy` with its 95 % Wilson interval `low` to `high`; `num_tokens`, the mean of prompt and answer
    (landmark), the prompt alone (the published protocols).

    Args:
        advance: called with the number of prompts just answered.
    """
    places, prompts = _grid(model, config)
    found = iter(_found(model, config, [each for cell in prompts for each in cell], advance))
    return [
        _evaluate_cell(config, *place, cell, [next(found) for _ in cell])
        for place, cell in zip(places, prompts, strict=True)
    ]


def _grid(model: LanguageModel, config: Passkey) -> tuple[list[tuple[int, float | None]], list[list[NeedlePrompt]]]:
    """Return every length and depth, and the prompts of each."""
    tokens, filler = _prompt_tokens(model), _filler_ids(model, config)
    places = [(length, depth) for length in sorted(config.lengths) for depth in config.places]
    return places, [_prompts(config, tokens, filler, *place) for place in places]


def _prompt_tokens(model: LanguageModel) -> PromptTokens:
    return PromptTokens(lambda text: model.encode(text, add_bos=False), model.prefix)


def _filler_ids(model: LanguageModel, config: Passkey) -> list[int]:
    """Return filler tokens for the longest prompt: the landmark sentence repeated, the bundled story or a text file."""
    longest = max(config.lengths)
    if config.filler == "landmark":
        repeats, ids = longest // len(FILLER) + 1, list[int]()
        while len(ids) < longest:
            repeats *= 2
            ids = model.encode(" ".join([FILLER] * repeats), add_bos=False)
        return ids
    path = SAMPLE_DOCUMENT if config.filler == "book" else Path(config.filler)
    if not path.exists():
        raise ConfigError(f"--filler must be landmark, book (the bundled story) or a text file, got '{config.filler}'.")
    ids = model.encode(read_text(path), add_bos=False)
    if len(ids) < longest:
        raise DataError(f"--filler {config.filler} has {len(ids)} tokens, the longest prompt needs {longest}.")
    return ids


def _prompts(
    config: Passkey, tokens: PromptTokens, filler: Sequence[int], length: int, depth: float | None
) -> list[NeedlePrompt]:
    seeds = [config.seed + trial for trial in range(config.num_trials)]
    if depth is None:
        make: Callable[..., NeedlePrompt] = longlora_prompt if config.protocol == "longlora" else yarn_prompt
        return [make(tokens, length=length, seed=seed) for seed in seeds]
    # the depth enters the seed so that cells do not share their keys
    return [
        exact_prompt(
            tokens,
            filler,
            length=length,
            depth=depth,
            seed=seed * 1_000 + round(depth * 100),
            num_needles=config.num_needles,
            num_digits=config.num_digits,
        )
        for seed in seeds
    ]


def _found(model: LanguageModel, config: Passkey, prompts: Sequence[NeedlePrompt], advance: Advance) -> list[bool]:
    """Return which keys are found."""
    if config.rules.scoring != "exact":
        return [_first_integer(model, prompt, advance) for prompt in prompts]
    pairs = [(each.input_ids, each.answer_ids) for each in prompts]
    return [bool(row.all()) for row in first_choices(model, pairs, config.batch_tokens, advance)]


def _evaluate_cell(
    config: Passkey, length: int, depth: float | None, prompts: Sequence[NeedlePrompt], found: Sequence[bool]
) -> dict[str, Any]:
    counts_answer = config.rules.has_depths  # the published protocols report the prompt alone
    num_tokens = sum(len(p.input_ids) + (len(p.answer_ids) if counts_answer else 0) for p in prompts) / len(prompts)
    return _cell(length, depth, sum(found), len(prompts), num_tokens)


def _cell(length: int, depth: float | None, num_correct: int, num_trials: int, num_tokens: float) -> dict[str, Any]:
    low, high = wilson_interval(num_correct, num_trials)
    return {
        "length": length,
        "depth": depth,
        "num_correct": num_correct,
        "num_trials": num_trials,
        "num_tokens": num_tokens,
        "low": low,
        "high": high,
        "accuracy": num_correct / num_trials,
    }


def _first_integer(model: LanguageModel, prompt: NeedlePrompt, advance: Advance) -> bool:
    ends = model.ending_tokens
    text = model.decode([t for t in model.greedy(prompt.input_ids, _YARN_NEW_TOKENS) if t not in ends])
    number = re.search(r"\d+", text)
    advance(1)
    return number is not None and int(number.group()) == prompt.key


def accuracy_by_length(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of all depths together (`depth` None), one per length, each with its Wilson interval."""
    pooled = []
    for length in sorted({cell["length"] for cell in cells}):
        same = [cell for cell in cells if cell["length"] == length]
        trials = sum(cell["num_trials"] for cell in same)
        tokens = sum(cell["num_tokens"] * cell["num_trials"] for cell in same) / trials
        pooled.append(_cell(length, None, sum(cell["num_correct"] for cell in same), trials, tokens))
    return pooled


def _prompts_hash(model: LanguageModel, config: Passkey) -> str:
    return hash_of(tokens_hash(prompt.input_ids) for cell in _grid(model, config)[1] for prompt in cell)


def _record(
    model: LanguageModel, config: Passkey, cells: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    protocol = config.rules
    return result_record(
        "passkey",
        model.describe(),
        {
            "id": f"passkey/{config.protocol}",
            "definition": protocol.summary,
            "reference": protocol.reference,
            "scoring": protocol.scoring,
            "filler": config.filler,
            "num_needles": config.num_needles,
            "num_digits": config.num_digits,
            "seed": config.seed,
            "prompts_sha256": _prompts_hash(model, config),
        },
        None,
        seconds=seconds,
        results=cells,
        by_length=accuracy_by_length(cells),
    )


def rank_passkey(model: LanguageModel, config: Passkey, advance: Advance = silent) -> list[Rank]:
    """Return how likely each key is found beside other keys of its kind."""
    tokens, filler = _prompt_tokens(model), _filler_ids(model, config)
    questions = [
        RankedKey(
            "passkey",
            length,
            depth,
            Choices(
                prompt.input_ids,
                (prompt.answer_ids,),
                tuple(tokens.answer(prompt.question, key) for key in prompt.wrong),
            ),
        )
        for length in sorted(config.lengths)
        for depth in config.places
        for prompt in _prompts(config, tokens, filler, length, depth)
    ]
    return rank_questions(model, questions, advance)


class RankedKey(NamedTuple):
    """A question for `rank_questions`."""

    task: str
    length: int
    depth: float | None
    choices: Choices


def measure_passkey(task: Passkey, model: LanguageModel, work: Work) -> Outcome:
    """Return the record of `passkey`."""
    started = time.perf_counter()
    cells: list[dict[str, Any]] = []
    ranks: list[Rank] = []
    num_prompts = len(task.lengths) * len(task.places) * task.num_trials * (2 if task.answers == BOTH else 1)
    prompts = [prompt.input_ids for cell in _grid(model, task)[1] for prompt in cell]
    num_new = len(prompts) * _YARN_NEW_TOKENS if task.rules.scoring != "exact" else 0
    for _ in range(num_prompts // len(prompts)):
        work.expect(model, prompts, num_new if task.answers != LIKELIHOOD else 0, not num_new)
    with work.progress(f"passkey {task.protocol}", num_prompts, "prompts") as advance:
        if task.answers != LIKELIHOOD:
            cells = evaluate_passkey(model, task, advance)
        if task.answers != GENERATE:
            ranks = rank_passkey(model, task, advance)

    def accuracy(_: str | None, length: str | None) -> float:
        if not cells:
            return mean_at(ranks)(None, length) or 0.0
        chosen = [cell for cell in cells if length in (None, str(cell["length"]))]
        correct: int = sum(cell["num_correct"] for cell in chosen)
        trials: int = sum(cell["num_trials"] for cell in chosen)
        return correct / trials

    record = _record(model, task, cells, time.perf_counter() - started)
    if ranks:
        record["protocol"].update(answers=task.answers, answers_definition=ANSWERS[task.answers])
        record.update(ranked_tables(ranks, ("by_length",)))
    return Outcome(record=record, score_at=accuracy)
