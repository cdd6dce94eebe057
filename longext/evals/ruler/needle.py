"""RULER's needle tasks at exact token lengths: what is asked, how it is scored, what is recorded."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.errors import ConfigError, DataError
from longext.evals.config import NeedleConfig
from longext.evals.limits import check_lengths
from longext.evals.passkey_prompts import PromptTokens
from longext.evals.retrieval import Outcome, Progress, answers_to, cell_rows, cells_of, pooled_cells
from longext.evals.ruler.haystacks import (
    NAME_TYPES,
    NEEDLE_TASKS,
    NEEDLES,
    NOISE,
    TEXT,
    HaystackPrompt,
    NeedleSetup,
    Sentences,
    haystack_prompt,
    needle_sentences,
    noise_sentences,
    text_sentences,
)
from longext.manifest import result_record
from longext.models.answer_file import tokens_hash
from longext.models.answers import Prediction, answer_notes
from longext.models.batching import batch_size, batched_by
from longext.models.chat import asked_facts, chat_frame, user_text, uses_template
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel
from longext.registry import Registry
from longext.untrusted import read_text

BOOK = "book"
PASS_BAR = 0.856  # Llama-2-7B-chat at 4K over RULER's 13 tasks: the length up to which a model reaches it is effective
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")

SCORINGS: Registry[str] = Registry("scoring")
SCORINGS.register(
    "match",
    "greedy answer of up to max_new_tokens; score: the share of the expected values that stand in it, case ignored "
    "(RULER string_match_all); part: at least one stands in it (string_match_part)",
)
SCORINGS.register(
    "exact",
    "one forward pass over prompt and expected answer; score: the share of the expected values all of whose tokens are "
    "the first choice, given the prompt and the values before; whole: greedy decoding gives exactly the answer",
)


@dataclass(frozen=True)
class Question:
    """One prompt and its place in the results."""

    id: str
    task: str
    length: int
    depth: float | None
    prompt: HaystackPrompt


def check_needle_config(config: NeedleConfig) -> None:
    """Raise ConfigError for an unknown task, scoring or type, or a value out of range."""
    for task in config.tasks:
        NEEDLE_TASKS[task]
    for kind in (config.key_type, config.value_type):
        NAME_TYPES[kind]
    SCORINGS[config.scoring]
    check_lengths(config.lengths, minimum=64)
    check_method(config.method, config.factor)
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ConfigError(f"--tasks must name different tasks, got {','.join(config.tasks) or 'none'}.")
    if not all(0 <= depth <= 1 for depth in config.depths):
        raise ConfigError(f"--depths must be numbers from 0 (start) to 1 (end), got {list(config.depths)}.")
    if len({round(1000 * depth) for depth in config.depths}) < len(config.depths):
        raise ConfigError(f"--depths must differ by at least 0.001, got {list(config.depths)}.")
    for name in ("num_trials", "num_needles", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(config, name)}.")


def make_questions(model: LanguageModel, config: NeedleConfig) -> list[Question]:
    """Return every prompt of an evaluation; the same seeds give the same prompts for every model of one tokenizer.

    Raises:
        ConfigError, DataError: a length is too short for a task, there is no such haystack, or no chat template.
    """
    tokens = _prompt_tokens(model, config)
    haystacks: dict[str, Sentences] = {}
    questions = []
    for task in config.tasks:
        setup = _setup(task, config, tokens, haystacks, lambda text: user_text(model, text))
        for length in sorted(config.lengths):
            for depth in config.depths or (None,):
                for trial in range(config.num_trials):
                    prompt = haystack_prompt(
                        tokens,
                        setup,
                        length=length,
                        seed=config.seed + trial,
                        depth=depth,
                        max_new_tokens=config.max_new_tokens if config.scoring == "match" else None,
                    )
                    place = "random" if depth is None else f"{depth:g}"
                    questions.append(Question(f"{task}/{length}/{place}/{trial}", task, length, depth, prompt))
    return questions


def _prompt_tokens(model: LanguageModel, config: NeedleConfig) -> PromptTokens:
    """Return the tokenizer of prompts, with what the chat template puts around them."""

    def encode(text: str) -> list[int]:
        return model.encode(text, add_bos=False)

    opens = has_answer_prefix(model, config)
    if not uses_template(model, config.chat_template):
        return PromptTokens(encode, model.prefix, opens=opens)
    frame = chat_frame(model)
    return PromptTokens(encode, () if frame.begins else model.prefix, frame.before, frame.after, opens)


def has_answer_prefix(model: LanguageModel, config: NeedleConfig) -> bool:
    """Return True where a prompt ends with the beginning of the answer: as asked, but never inside a thought.

    Raises:
        ConfigError: exact scoring, and the chat template opens a thought where the answer would stand.
    """
    if not (config.answer_prefix and uses_template(model, config.chat_template) and chat_frame(model).thinks):
        return config.answer_prefix
    if config.scoring == "exact":
        raise ConfigError(
            f"--scoring exact reads the answer right behind the assistant's header, and the chat template of "
            f"{model.name} opens a thought there: close it (--template-arg enable_thinking=false, if the template "
            "knows that), or take --scoring match or --no-chat-template."
        )
    return False


def needle_notes(model: LanguageModel, config: NeedleConfig, answers: Collection[Prediction]) -> list[str]:
    """Return what a reader of the scores has to know."""
    left_out = config.answer_prefix and not has_answer_prefix(model, config)
    notes = ["The chat template opens a thought: prompts do not end with the beginning of the answer."]
    return [*(notes if left_out else []), *(answer_notes(answers) if answers else [])]


def _setup(
    name: str,
    config: NeedleConfig,
    tokens: PromptTokens,
    haystacks: dict[str, Sentences],
    written: Callable[[str], str],
) -> NeedleSetup:
    task = NEEDLE_TASKS[name]
    given = config.haystack
    haystack = task.haystack or given
    if haystack == TEXT:
        haystack = BOOK if given in (NOISE, NEEDLES) else given
    value_type = task.value_type or config.value_type
    spelled = f"{haystack}/{value_type}"
    if spelled not in haystacks:
        haystacks[spelled] = _sentences(haystack, value_type, tokens, written)
    return NeedleSetup(
        name=name,
        keys=task.keys or config.num_needles,
        values=task.values or config.num_needles,
        queries=task.queries or config.num_needles,
        key_type=task.key_type or config.key_type,
        value_type=value_type,
        sentences=haystacks[spelled],
    )


def _sentences(haystack: str, value_type: str, tokens: PromptTokens, written: Callable[[str], str]) -> Sentences:
    if haystack == NOISE:
        return noise_sentences(tokens.encode)
    if haystack == NEEDLES:
        return needle_sentences(tokens.encode, value_type)
    path = SAMPLE_DOCUMENT if haystack == BOOK else Path(haystack).expanduser()
    if not path.exists():
        raise ConfigError(f"--haystack must be noise, needles, book (the bundled story) or a text file: '{haystack}'.")
    text = read_text(path)
    if not text.strip():
        raise DataError(f"--haystack {path} is empty.")
    return text_sentences(tokens.encode, written(text))


# --- scores -----------------------------------------------------------------------------------------------------------


def match_share(answer: str, expected: Sequence[str]) -> float:
    """Return the share of `expected` that stands in `answer`, case ignored (RULER's string_match_all of one prompt)."""
    text = _UNPRINTABLE.sub("\n", answer.strip()).lower()
    return sum(value.lower() in text for value in expected) / len(expected)


def evaluate_needles(
    model: LanguageModel,
    questions: Sequence[Question],
    config: NeedleConfig,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[list[Outcome], dict[str, Prediction]]:
    """Return how each question was answered, and the generated answers by id (none for exact scoring).

    Args:
        path: where generated answers are kept, for a run that is cut off.
        on_progress: called with the number of prompts just answered.
    """
    if config.scoring == "exact":
        return _score_exactly(model, questions, config, on_progress), {}
    prompts = {question.id: question.prompt.input_ids for question in questions}
    answers = answers_to(
        model,
        prompts,
        config.max_new_tokens,
        path=path,
        on_progress=on_progress,
        batch_tokens=config.batch_tokens,
        is_chat=uses_template(model, config.chat_template),
    )
    return [_outcome(own, match_share(answers[own.id].text, own.prompt.answers)) for own in questions], answers


def _score_exactly(
    model: LanguageModel, questions: Sequence[Question], config: NeedleConfig, on_progress: Progress | None
) -> list[Outcome]:
    outcomes = []
    size = batch_size(config.batch_tokens, max(config.lengths), model.device)
    for batch in batched_by(questions, size, lambda own: (len(own.prompt.input_ids), len(own.prompt.answer_ids))):
        ids = torch.tensor([[*own.prompt.input_ids, *own.prompt.answer_ids] for own in batch])
        right = model.score(ids, len(batch[0].prompt.input_ids)).is_top1.cpu()
        for question, row in zip(batch, right, strict=True):
            starts = (0, *question.prompt.ends)
            found = [bool(row[a:b].all()) for a, b in zip(starts, question.prompt.ends, strict=False)]
            outcomes.append(_outcome(question, sum(found) / len(found)))
        if on_progress:
            on_progress(len(batch))
    return outcomes


def _outcome(question: Question, score: float) -> Outcome:
    return Outcome(question.task, question.length, question.depth, score, len(question.prompt.input_ids))


def timed_needles(
    model: LanguageModel,
    questions: Sequence[Question],
    config: NeedleConfig,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[list[Outcome], dict[str, Prediction], float]:
    """Return (outcomes, answers, wall seconds)."""
    started = time.perf_counter()
    return *evaluate_needles(model, questions, config, path, on_progress), time.perf_counter() - started


def needle_record(
    model: LanguageModel,
    config: NeedleConfig,
    outcomes: Sequence[Outcome],
    seconds: float,
    questions: Sequence[Question] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the JSON record of a needle evaluation; `questions` are hashed into it."""
    is_chat = uses_template(model, config.chat_template)
    return result_record(
        "needle",
        model.describe(),
        {
            "id": "needle/ruler",
            "definition": "RULER's needle prompts; prompt and budget of new tokens (exact: the answer) have exactly "
            "the length; keys and values never repeat",
            "reference": "RULER, arXiv 2404.06654",
            "scoring": config.scoring,
            "scoring_definition": SCORINGS[config.scoring],
            "tasks": {name: asdict(NEEDLE_TASKS[name]) for name in config.tasks},
            "haystack": config.haystack,
            "num_needles": config.num_needles,
            "key_type": config.key_type,
            "value_type": config.value_type,
            "max_new_tokens": config.max_new_tokens if config.scoring == "match" else None,
            "chat_template": is_chat,
            "answer_prefix": has_answer_prefix(model, config),
            "seed": config.seed,
            **asked_facts(model, is_chat, (tokens_hash(own.prompt.input_ids) for own in questions)),
        },
        None,
        seconds=seconds,
        results=cell_rows(cells_of(outcomes)),
        by_task=cell_rows(cells_of(outcomes, by_depth=False)),
        by_length=cell_rows(pooled_cells(outcomes)),
        notes=list(notes),
    )
