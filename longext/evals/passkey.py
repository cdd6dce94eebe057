"""Passkey retrieval by length and depth, under named protocols."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.errors import ConfigError, DataError
from longext.evals.base import Advance, GivenAnswers, Outcome, Work, silent
from longext.evals.passkey_prompts import (
    FILLER,
    NeedlePrompt,
    PromptTokens,
    exact_prompt,
    longlora_prompt,
    yarn_prompt,
)
from longext.evals.ranks import Choices, Rank, grouped, rank_questions, ranked_tables
from longext.evals.retrieval import (
    ANSWERS,
    BOTH,
    GENERATE,
    LIKELIHOOD,
    QuestionScore,
    answer_files,
    answer_line,
    mean_at,
    told_note,
)
from longext.evals.sequential.asking import Decisions, ask_questions, stopping_facts
from longext.evals.statistics import wilson_interval
from longext.manifest import result_record
from longext.models.answer_file import hash_of, score_each, tokens_hash
from longext.models.batching import batch_size
from longext.models.continuations import begun_text, first_choices
from longext.models.protocol import LanguageModel
from longext.untrusted import read_text

if TYPE_CHECKING:
    from longext.evals.suites.passkey import Passkey

_YARN_NEW_TOKENS = 10


class Trial(NamedTuple):
    """One prompt to make: of a length, depth (None if the protocol draws it) and seed."""

    length: int
    depth: float | None
    seed: int
    task: str = "passkey"


class Prompts:
    """The prompts of an evaluation with the tokens of one model, made when they are asked."""

    def __init__(self, model: LanguageModel, config: Passkey) -> None:
        self.model, self.config = model, config
        self.tokens, self.filler = _prompt_tokens(model), _filler_ids(model, config)
        self.trials = [
            Trial(length, depth, config.seed + number)
            for length in sorted(config.lengths)
            for depth in config.places
            for number in range(config.num_trials)
        ]

    def make(self, trial: Trial) -> NeedlePrompt:
        """Return a prompt; the same seeds give the same keys and depths for every model."""
        if trial.depth is None:
            make = longlora_prompt if self.config.protocol == "longlora" else yarn_prompt
            return make(self.tokens, length=trial.length, seed=trial.seed)
        return exact_prompt(
            self.tokens,
            self.filler,
            length=trial.length,
            depth=trial.depth,
            # the depth enters the seed so that cells do not share their keys
            seed=trial.seed * 1_000 + round(trial.depth * 100),
            num_needles=self.config.num_needles,
            num_digits=self.config.num_digits,
        )

    def input_ids(self) -> list[tuple[int, ...]]:
        """Return the tokens of all prompts."""
        return [self.make(trial).input_ids for trial in self.trials]


class Tried(NamedTuple):
    """A prompt that was asked: how it was answered (tokens: landmark's with the answer), its line, its hash."""

    score: QuestionScore
    line: dict[str, Any]
    sha256: str


def check_prompts(model: LanguageModel, config: Passkey) -> None:
    """Raise ConfigError or DataError if a prompt cannot be built: the length is too short, or too little filler."""
    prompts = Prompts(model, config)
    for length in (min(config.lengths), max(config.lengths)):
        prompts.make(Trial(length, config.places[0], config.seed))


def evaluate_passkey(model: LanguageModel, config: Passkey, advance: Advance = silent) -> list[dict[str, Any]]:
    """Return one cell per length and depth; the same seeds, keys and depths for every model.

    A cell is a row of the record: `length`; `depth`, None if the protocol draws it; `num_correct` of `num_trials`,
    their `accuracy` with its 95 % Wilson interval `low` to `high`; `num_tokens`, the mean of prompt and answer
    (landmark), the prompt alone (the published protocols).

    Args:
        advance: called with the number of prompts just answered.
    """
    prompts = Prompts(model, config)
    return cells_of([each.score for each in try_prompts(prompts, prompts.trials, advance)])


def try_prompts(prompts: Prompts, trials: Sequence[Trial], advance: Advance = silent) -> list[Tried]:
    """Ask, and return what came of it in the order of `trials`."""
    model, config = prompts.model, prompts.config
    made = [prompts.make(trial) for trial in trials]
    if config.rules.scoring == "exact":
        size = batch_size(config.batch_tokens, max(trial.length for trial in trials), model.device)
        rows = first_choices(model, [(each.input_ids, each.answer_ids) for each in made], size, advance)
        answers = [begun_text(model, each.answer_ids, row) for each, row in zip(made, rows, strict=True)]
        right = [bool(row.all()) for row in rows]
    else:
        answers = _short_answers(model, made, advance)
        right = [config.rate("", (str(each.key),), text) == 1 for each, text in zip(made, answers, strict=True)]
    return [_tried(config, *each) for each in zip(trials, made, answers, right, strict=True)]


def _tried(config: Passkey, trial: Trial, prompt: NeedlePrompt, answer: str, is_right: bool) -> Tried:
    name = f"{trial.length}/{'random' if trial.depth is None else f'{trial.depth:g}'}/{trial.seed}"
    size, counts_answer = len(prompt.input_ids), config.rules.has_depths  # the published protocols report the prompt
    line = answer_line(trial, name, [str(prompt.key)], answer, float(is_right), num_prompt_tokens=size)
    num_tokens = size + len(prompt.answer_ids) * counts_answer
    score = QuestionScore(trial.task, trial.length, trial.depth, float(is_right), num_tokens)
    return Tried(score, line, tokens_hash(prompt.input_ids))


def cells_of(scores: Sequence[QuestionScore]) -> list[dict[str, Any]]:
    """Return one cell per length and depth, sorted."""
    return [
        _cell(length, depth, sum(each.score == 1 for each in own), len(own), sum(s.num_tokens for s in own) / len(own))
        for (_, length, depth), own in grouped(scores, by_task=False)
    ]


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
    path = SAMPLE_DOCUMENT if config.filler == "book" else Path(config.filler).expanduser()
    if not path.exists():
        raise ConfigError(f"--filler must be landmark, book (the bundled story) or a text file, got '{config.filler}'.")
    ids = model.encode(read_text(path), add_bos=False)
    if len(ids) < longest:
        raise DataError(f"--filler {config.filler} has {len(ids)} tokens, the longest prompt needs {longest}.")
    return ids


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


def _short_answers(model: LanguageModel, prompts: Sequence[NeedlePrompt], advance: Advance) -> list[str]:
    """Return the greedy answer to each prompt, as many tokens as YaRN's script writes."""

    def answer(number: int) -> dict[str, Any]:
        return {"tokens": model.greedy(prompts[number].input_ids, _YARN_NEW_TOKENS)}

    items = [prompt.input_ids for prompt in prompts]
    rows = score_each(model, f"greedy {_YARN_NEW_TOKENS}", items, answer, advance)
    ends = model.ending_tokens
    return [model.decode([token for token in row["tokens"] if token not in ends]) for row in rows]


def accuracy_by_length(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of all depths together (`depth` None), one per length, each with its Wilson interval."""
    pooled = []
    for length in sorted({cell["length"] for cell in cells}):
        same = [cell for cell in cells if cell["length"] == length]
        trials = sum(cell["num_trials"] for cell in same)
        tokens = sum(cell["num_tokens"] * cell["num_trials"] for cell in same) / trials
        pooled.append(_cell(length, None, sum(cell["num_correct"] for cell in same), trials, tokens))
    return pooled


def _protocol(config: Passkey, hashes: Iterable[str]) -> dict[str, Any]:
    protocol = config.rules
    return {
        "id": f"passkey/{config.protocol}",
        "definition": protocol.summary,
        "reference": protocol.reference,
        "scoring": protocol.scoring,
        "filler": config.filler,
        "num_needles": config.num_needles,
        "num_digits": config.num_digits,
        "seed": config.seed,
        "prompts_sha256": hash_of(hashes) if config.predictions is None else None,
        **stopping_facts(config.error_rate),
    }


def rank_passkey(prompts: Prompts, trials: Sequence[Trial], advance: Advance = silent) -> list[Rank]:
    """Return how likely each key is found beside other keys of its kind."""
    tokens, questions = prompts.tokens, []
    for trial in trials:
        prompt = prompts.make(trial)
        wrong = tuple(tokens.answer(prompt.question, key) for key in prompt.wrong)
        choices = Choices(prompt.input_ids, (prompt.answer_ids,), wrong)
        questions.append(RankedKey(trial.task, trial.length, trial.depth, choices))
    return rank_questions(prompts.model, questions, advance)


class RankedKey(NamedTuple):
    """A question for `rank_questions`."""

    task: str
    length: int
    depth: float | None
    choices: Choices


class _Asking:
    """Prompts asked, all at once or in rounds: what came of them, and the ranks of their keys."""

    def __init__(self, prompts: Prompts, answers: str, advance: Advance) -> None:
        self._prompts, self._answers, self._advance = prompts, answers, advance
        self.tried: list[Tried] = []
        self.ranks: list[Rank] = []

    def ask(self, trials: Sequence[Trial]) -> list[float]:
        """Return the score of each prompt: right or wrong, or (likelihood alone) whether the key is first."""
        tried = try_prompts(self._prompts, trials, self._advance) if self._answers != LIKELIHOOD else []
        ranks = rank_passkey(self._prompts, trials, self._advance) if self._answers != GENERATE else []
        self.tried += tried
        self.ranks += ranks
        return [each.score.score for each in tried] or [each.score for each in ranks]


def answer_lines(
    model: LanguageModel, config: Passkey, advance: Advance, decide: Callable[[Sequence[Any]], Decisions] | None = None
) -> list[dict[str, Any]]:
    """Return what was answered, as lines of answers.jsonl: to all prompts, or until `decide` has its verdict."""
    prompts = Prompts(model, config)
    asking = _Asking(prompts, GENERATE, advance)
    size = batch_size(config.batch_tokens, max(config.lengths), model.device)
    number = ask_questions(decide(prompts.trials) if decide else None, prompts.trials, size, asking.ask)
    return [each.line for each in asking.tried[:number]]


def _expect(task: Passkey, model: LanguageModel, prompts: Prompts, work: Work) -> None:
    texts = prompts.input_ids()
    is_exact = task.rules.scoring == "exact"
    if task.answers != LIKELIHOOD:
        work.expect(model, texts, 0 if is_exact else len(texts) * _YARN_NEW_TOKENS, is_exact)
    if task.answers != GENERATE:
        work.expect(model, texts, 0)


def measure_passkey(task: Passkey, model: LanguageModel, work: Work) -> Outcome:
    """Return the record of `passkey`."""
    started = time.perf_counter()
    prompts, decisions = Prompts(model, task), None
    _expect(task, model, prompts, work)
    if task.error_rate is not None:
        grain = 0 if task.answers == LIKELIHOOD else 1
        decisions = Decisions(task.limits(None), prompts.trials, error=task.error_rate, seed=task.seed, grain=grain)
    with work.progress(
        f"passkey {task.protocol}", len(prompts.trials) * (2 if task.answers == BOTH else 1), "prompts"
    ) as advance:
        asking = _Asking(prompts, task.answers, advance)
        size = batch_size(task.batch_tokens, max(task.lengths), model.device)
        ask_questions(decisions, prompts.trials, size, asking.ask)
    tried, ranks = asking.tried, asking.ranks
    hashes = [each.sha256 for each in tried] or [tokens_hash(ids) for ids in prompts.input_ids()]
    protocol, tables = _protocol(task, hashes), {}
    if ranks:
        protocol.update(answers=task.answers, answers_definition=ANSWERS[task.answers])
        tables = ranked_tables(ranks, ("by_length",))
    facts = {"model": model.describe(), "protocol": protocol, "seconds": time.perf_counter() - started}
    outcome = _outcome([each.score for each in tried], {**facts, **tables}, mean_at(ranks))
    told: dict[str, Any] = {"notes": [decisions.note("prompts")], "bars": decisions.rows()} if decisions else {}
    return dataclasses.replace(outcome, files=answer_files([each.line for each in tried]), **told)


def score_given(task: Passkey, given: GivenAnswers) -> Outcome:
    """Return the record of answers that are given."""
    protocol = _protocol(task, ())
    outcome = _outcome(given.scores, {**task.given_facts(given), "protocol": protocol})
    return dataclasses.replace(outcome, notes=told_note(task, protocol))


def _outcome(scores: Sequence[QuestionScore], facts: Mapping[str, Any], ranked_at: Any = None) -> Outcome:
    """Return the record; without scores the limits are of the ranks."""
    cells = cells_of(scores)
    record = result_record("passkey", **facts, results=cells, by_length=accuracy_by_length(cells))
    return Outcome(record=record, score_at=mean_at(scores) if scores else ranked_at)
