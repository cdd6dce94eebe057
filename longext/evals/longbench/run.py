"""A run of LongBench under its authors' protocol (Bai et al., arXiv 2308.14508): rows in, record out.

Prompts longer than `max_length` lose their middle, by tokens; few-shot and code prompts never go through a chat
template; answers are greedy.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from longext.evals.base import Outcome, Work
from longext.evals.limits import PlaceLimit
from longext.evals.longbench.cutting import cut_middle, prompt_limit
from longext.evals.longbench.rows import LongBenchRow, TaskRun, references_hash, rows_hash
from longext.evals.longbench.scores import TaskScore, average_entries, least_mean, row_weights, score_rows, score_task
from longext.evals.longbench.tasks import TASKS, fill_prompt, prompt_hash, read_prompt
from longext.evals.models import told_positions
from longext.evals.sequential.asking import Decisions, ask_questions, stopping_facts
from longext.manifest import result_record
from longext.models.answers import Prediction, Request, answer_notes, generate_predictions
from longext.models.batching import batch_size
from longext.models.chat import asked_facts, chat_tokens, user_text, uses_template
from longext.models.protocol import LanguageModel

if TYPE_CHECKING:
    from longext.evals.suites.longbench import LongBench

_REFERENCE = "Bai et al., LongBench, arXiv 2308.14508; pred.py, eval.py and metrics.py of THUDM/LongBench"
_SAMSUM = "samsum"  # ends at a line feed, which may not come first


def measure_longbench(
    task: LongBench, model: LanguageModel | None, data: tuple[list[TaskRun], list[str]], work: Work
) -> Outcome:
    """Return the record of `eval longbench`, and new answers as files; `model` is None if the answers are given."""
    started = time.perf_counter()
    (runs, notes), decisions = data, None
    if model is not None:
        runs, decisions = _ask(task, model, runs, work)
        asked = [] if decisions is None else [decisions.note("prompts"), *_unasked_note(data[0], runs)]
        notes = [*asked, *notes, *_model_notes(model, runs, task)]
    scores = [_score(run, task) for run in runs]
    notes = [*notes, *_score_notes(scores, task)]
    record = _record(model, runs, scores, task, notes, time.perf_counter() - started)
    # English and Chinese have averages, LongBench-E has no limits
    means = {language: mean.get("average") for language, mean in record["averages"].items()}
    known = {**means, **{score.task: score.score for score in scores}}
    return Outcome(
        record=record,
        score_at=lambda name, _: known.get(str(name)),
        notes=notes,
        files={f"predictions/{run.name}.jsonl": _prediction_lines(run) for run in runs if run.predictions},
        bars=None if decisions is None else _bars(task.limits(data), decisions),
    )


# --- prompts and answers ----------------------------------------------------------------------------------------------


def build_requests(
    model: LanguageModel, name: str, rows: Sequence[LongBenchRow], max_length: int | None, chat: bool
) -> tuple[list[Request], list[bool]]:
    """Return the prompts of one task as they go into the model, and which of them lost their middle.

    The cut comes before the chat template, so the template stays whole, and what is read may be longer than
    `max_length` by it.
    """
    task, prompt = TASKS[name], read_prompt(name)
    stop = (model.encode("\n", add_bos=False)[-1],) if name == _SAMSUM else ()
    requests, all_cut = [], []
    for index, row in enumerate(rows):
        text = fill_prompt(prompt, user_text(model, row.context), user_text(model, row.question))
        text, is_cut = cut_middle(text, max_length, model.encode, model.decode)
        all_cut.append(is_cut)
        ids = chat_tokens(model, text) if chat and task.has_chat else model.encode(text)
        requests.append(
            Request(f"{name}:{index}", tuple(ids), task.max_new_tokens, stop_ids=stop, min_new_tokens=1 if stop else 0)
        )
    return requests, all_cut


def _ask(
    config: LongBench, model: LanguageModel, runs: Sequence[TaskRun], work: Work
) -> tuple[list[TaskRun], Decisions | None]:
    """Return tasks with the rows that were asked and the answers: all, or until every limit had its verdict.

    Answers are kept, each task's in a file of its own (in rounds in one for each); those there are not made again.
    """
    limit, chat = prompt_limit(model, config), uses_template(model, config.chat_template)
    weights = {} if config.error_rate is None else _weights(config, runs)
    runs = [run for run in runs if config.error_rate is None or any(run.name in own for own in weights.values())]
    for run in runs:
        run.requests, run.is_cut = build_requests(model, run.name, run.rows, limit, chat)
    places = [_Place(run.name, number) for run in runs for number in range(len(run.rows))]
    requests = [request for run in runs for request in run.requests]
    work.expect(model, [each.input_ids for each in requests], sum(each.max_new_tokens for each in requests))
    decisions = None if config.error_rate is None else _decisions(config, runs, places, weights)
    num_round, made = itertools.count(), dict[_Place, Prediction]()
    with work.progress("longbench", len(places), "answers") as advance:

        def answer(asked: Sequence[_Place]) -> list[float]:
            ending = "" if decisions is None else f".{next(num_round):05d}"
            scores: dict[_Place, float] = {}
            for run in runs:
                own = [each for each in asked if each.task == run.name]
                path = work.answers / f"{run.name}{ending}.jsonl" if work.answers else None
                if own:
                    some, has_chat = [run.requests[each.number] for each in own], chat and TASKS[run.name].has_chat
                    found = generate_predictions(model, some, path, advance, config.batch_tokens, is_chat=has_chat)
                    made.update(zip(own, found, strict=True))
                    rows = [run.rows[each.number] for each in own]
                    texts = [each.text for each in found]
                    scores.update(zip(own, score_rows(run.name, texts, rows, config.code_similarity), strict=True))
            return [scores[place] for place in asked]

        longest = max(len(each.input_ids) + each.max_new_tokens for each in requests)
        ask_questions(decisions, places, batch_size(config.batch_tokens, longest, model.device), answer)
    answered = [run.answered({each.number: made[each] for each in made if each.task == run.name}) for run in runs]
    return [run for run in answered if run.rows], decisions


# --- limits that end the asking ---------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A prompt: its task, and its number among the rows of that."""

    task: str
    number: int


def _weights(config: LongBench, runs: Sequence[TaskRun]) -> dict[str, dict[str, float]]:
    """Return for each limit what a row of each task counts in its score."""
    counts = {run.name: len(run.rows) for run in runs}
    return {each.name: row_weights(each.name, counts) for each in config.limits((list(runs), []))}


def _decisions(
    config: LongBench, runs: Sequence[TaskRun], places: Sequence[_Place], weights: Mapping[str, Mapping[str, float]]
) -> Decisions:
    assert config.error_rate is not None
    return Decisions(
        [dataclasses.replace(each, limit=least_mean(each.limit)) for each in config.limits((list(runs), []))],
        places,
        error=config.error_rate,
        seed=config.seed,
        weigh=lambda limit, place: weights[limit.name].get(place.task, 0.0),
    )


def _bars(limits: Sequence[PlaceLimit], decisions: Decisions) -> list[dict[str, Any]]:
    """Return the verdicts on limits, in points, rounded as scores are."""
    pairs = zip(limits, decisions.rows(), strict=True)
    in_points = ("value", "low", "high")
    return [
        {**row, "limit": each.limit, **{key: round(100 * row[key], 2) for key in in_points if row[key] is not None}}
        for each, row in pairs
    ]


# --- answers, scores, notes, record -----------------------------------------------------------------------------------


def _prediction_lines(run: TaskRun) -> str:
    """Return the answers in the authors' schema (pred, answers, all_classes, length), which their eval.py reads too."""
    lines = [
        {
            "pred": prediction.text,
            "answers": row.answers,
            "all_classes": row.all_classes or None,
            "length": row.length,
            "_id": row.id,
            "num_prompt_tokens": prediction.num_prompt_tokens,
            "num_new_tokens": prediction.num_new_tokens,
        }
        for prediction, row in zip(run.predictions, run.rows, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _score(run: TaskRun, config: LongBench) -> TaskScore:
    of_prompts: dict[str, Any] = {}
    if run.predictions:
        tokens = sum(prediction.num_prompt_tokens for prediction in run.predictions) / len(run.predictions)
        of_prompts = {"num_truncated": sum(run.is_cut), "num_prompt_tokens": tokens}
    ratio = config.code_similarity
    return score_task(run.name, run.answers, run.rows, ratio=ratio, longbench_e=config.longbench_e, **of_prompts)


def _model_notes(model: LanguageModel, runs: Sequence[TaskRun], config: LongBench) -> list[str]:
    """Return what may spoil answers: prompts beyond the model's positions, cut answers, thoughts, control tokens."""
    notes = []
    positions = told_positions(model)
    beyond = sum(len(r.input_ids) + r.max_new_tokens > positions for run in runs for r in run.requests)
    if beyond and not config.memory:
        notes.append(f"Prompts that with their answers go beyond the model's {positions:,} positions: {beyond}.")
    return [*notes, *answer_notes([prediction for run in runs for prediction in run.predictions], empty=False)]


def _unasked_note(planned: Sequence[TaskRun], runs: Sequence[TaskRun]) -> list[str]:
    """Return a note if the verdicts needed no prompt of some tasks."""
    missing = [run.name for run in planned if run.name not in {run.name for run in runs}]
    return [f"Not asked, since the verdicts did not need them: {', '.join(missing)}."] if missing else []


def _score_notes(scores: Sequence[TaskScore], config: LongBench) -> list[str]:
    """Return what a reader of the scores has to know: answers that are missing or empty, rows that are."""
    place = f" in {config.predictions}" if config.predictions else ""
    notes = []
    for count, what, meaning in (
        ("num_missing", f"no answer{place}", "scored 0"),
        ("num_empty", f"an empty answer{place}", "scored as they are: 0 in nearly every metric"),
        ("num_unplaced", "no length", "in no bucket"),
    ):
        numbers = [(getattr(score, count), score) for score in scores]
        listed = ", ".join(f"{number} of the {score.num_rows} of {score.task}" for number, score in numbers if number)
        notes += [f"Rows with {what}: {listed} ({meaning})."] if listed else []
    fewer = [score.task for score in scores if score.num_rows < TASKS[score.task].num_rows]
    if fewer and not config.longbench_e:
        which = "every task here" if len(fewer) == len(scores) else ", ".join(fewer)
        notes.append(f"Fewer rows than LongBench has: {which}. These scores are not comparable with published ones.")
    return notes


def _record(
    model: LanguageModel | None,
    runs: Sequence[TaskRun],
    scores: Sequence[TaskScore],
    config: LongBench,
    notes: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "id": f"longbench{'-e' if config.longbench_e else ''}-official",
        "definition": "answers to the authors' prompts, greedy; the best score over the references, mean x 100",
        "reference": _REFERENCE,
        "code_similarity": config.code_similarity,
        "limit": config.limit,
    }
    if model:
        chat = uses_template(model, config.chat_template)
        protocol |= {
            "max_length": prompt_limit(model, config),
            "truncation": "the first and the last half of max_length tokens, decoded, joined and encoded again",
            "chat_template": chat,
            **stopping_facts(config.error_rate),
            **asked_facts(model, chat, (answer.prompt_sha256 for run in runs for answer in run.predictions)),
            "prompts": {run.name: prompt_hash(read_prompt(run.name)) for run in runs},
            "prompts_from": f"lm-eval {importlib.metadata.version('lm-eval')}, white space as published",
        }
    return result_record(
        "longbench",
        model.describe() if model else config.given_model,
        protocol,
        {
            "source": config.predictions or config.data,
            "sha256": {run.name: rows_hash(run.rows) for run in runs},
            "references_sha256": {run.name: references_hash(run.rows) for run in runs},
        },
        seconds=seconds,
        results=[score.entry() for score in scores],
        **average_entries(scores, config.longbench_e),
        notes=list(notes),
    )
