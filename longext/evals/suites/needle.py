"""Hide one or several sentences in a haystack and ask for them: score by task and length, heat map, JSON.

Example: longext eval needle MODEL --lengths 4096,16384 --haystack essays.txt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.errors import ConfigError, DataError
from longext.evals.base import Advance, check_tasks, register, silent
from longext.evals.limits import check_depths, check_lengths
from longext.evals.passkey_prompts import PromptTokens
from longext.evals.ranks import Choices, ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, answer_line, score_of
from longext.evals.ruler.haystacks import (
    NAME_TYPES,
    NEEDLE_TASKS,
    NEEDLES,
    NOISE,
    HaystackPrompt,
    NeedleTask,
    Sentences,
    haystack_prompt,
    needle_sentences,
    noise_sentences,
    text_sentences,
)
from longext.evals.ruler.tasks import match_all
from longext.evals.sequential.asking import Decisions, ask_questions
from longext.evals.views import NEVER, ONE, SEVERAL, Section, by_task, depth_map, depths_of, pooled, task_map
from longext.models.batching import batch_size
from longext.models.chat import chat_frame, user_text
from longext.registry import Registry
from longext.settings import LENGTH, MANY, option
from longext.untrusted import read_text

if TYPE_CHECKING:
    import torch

    from longext.models.answers import Prediction
    from longext.models.protocol import LanguageModel

_BOOK = "book"

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


@dataclass(frozen=True, kw_only=True)
class NeedleQuestion(Question):
    """One question, with the tokens of its answer for exact scoring."""

    prompt: HaystackPrompt


@register("needle")
@dataclass(frozen=True, kw_only=True)
class Needle(RetrievalEval):
    """RULER's needle tasks (arXiv 2404.06654) by length, at exact token lengths."""

    kind: ClassVar[str] = "needle"
    pools: ClassVar[tuple[str, ...]] = ("by_task", "by_length")
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="needle",
            title="Needles (RULER)",
            measured=depths_of,
            views=(
                by_task("Needles found by prompt length", "by_task.score", picture=SEVERAL),
                pooled(
                    "Needles found by prompt length, all tasks together",
                ),
                task_map("Needles found by prompt length", "by_task.score"),
                depth_map(
                    "Needles found by length and depth",
                    of="results.score",
                    panel="task",
                    table=NEVER,
                    picture=ONE,
                ),
                ranked_view(),
            ),
        ),
    )

    tasks: tuple[str, ...] = option(
        ("single", "multikey", "multivalue", "multiquery"),
        "single, multikey, multivalue, multiquery, comma-separated (RULER's own: `eval ruler`).",
    )
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048, 4096), "Tokens of prompt and answer budget together, comma-separated.", le=LENGTH
    )
    depths: tuple[float, ...] = option(
        (), "Depths of the needle asked for, 0 to 1, comma-separated (default: random).", ge=0, le=1
    )
    num_trials: int = option(10, "Prompts per length and depth.", ge=1, le=MANY)
    num_needles: int = option(4, "Needles of multikey, multivalue and multiquery.", ge=1, le=MANY)
    haystack: str = option(_BOOK, "noise, needles (more of their kind), book (the bundled story) or a text file.")
    key_type: str = option("words", "Keys are", names=lambda: NAME_TYPES)
    value_type: str = option("numbers", "Values are", names=lambda: NAME_TYPES)
    scoring: str = option(
        "match", "match is RULER's (generate, find the values), exact one forward pass:", names=lambda: SCORINGS
    )
    max_new_tokens: int = option(128, "Answer budget of match.", ge=1)
    answer_prefix: bool = option(
        True,
        "End prompts with the beginning of the answer, as RULER (never inside a thought).",
        "--answer-prefix",
        "--no-answer-prefix",
    )

    def check(self) -> None:
        """Raise ConfigError for an unknown task, scoring or type, or lengths and depths that are too close."""
        check_tasks(self.tasks, NEEDLE_TASKS)
        for kind in (self.key_type, self.value_type):
            NAME_TYPES[kind]
        SCORINGS[self.scoring]
        if self.predictions is not None and self.scoring == "exact":
            raise ConfigError("--scoring exact is of a model's choice at every token: score --predictions by match.")
        check_lengths(self.lengths, minimum=64)
        check_depths(self.depths, 0.001)
        super().check()

    def answers_path(self, output: Path) -> Path | None:
        """Return where answers are kept, None if none are generated (exact scoring)."""
        return super().answers_path(output) if self.scoring == "match" else None

    def questions(self, model: LanguageModel, data: Any) -> list[NeedleQuestion]:
        """Return every prompt; the same seeds give the same prompts for every model of one tokenizer.

        Raises:
            ConfigError, DataError: a length is too short for a task, there is no such haystack, or no chat template.
        """
        tokens = self._tokens(model)
        haystack = cache(partial(_sentences, model, tokens))  # a long text is tokenised once
        questions = []
        for name in self.tasks:
            task = self._filled(name)
            for length in sorted(self.lengths):
                for depth in self.depths or (None,):
                    place = f"{name}/{length}/{'random' if depth is None else f'{depth:g}'}"
                    for trial in range(self.num_trials):
                        prompt = haystack_prompt(
                            tokens,
                            name,
                            task,
                            haystack(str(task.haystack), str(task.value_type)),
                            length=length,
                            seed=self.seed + trial,
                            depth=depth,
                            max_new_tokens=self.max_new_tokens if self.scoring == "match" else None,
                        )
                        questions.append(
                            NeedleQuestion(
                                id=f"{place}/{trial}",
                                task=name,
                                length=length,
                                depth=depth,
                                input_ids=prompt.input_ids,
                                expected=prompt.answers,
                                max_new_tokens=self.max_new_tokens,
                                prompt=prompt,
                                choices=self._choices(tokens, prompt),
                            )
                        )
        return questions

    def _choices(self, tokens: PromptTokens, prompt: HaystackPrompt) -> Choices | None:
        """Return the values asked for and others, behind the beginning of the answer; None if nothing is ranked."""
        if not self.ranks:
            return None
        right, wrong = (
            tuple(tokens.answer(prompt.question, value) for value in values)
            for values in (prompt.answers, prompt.wrong)
        )
        return Choices(prompt.opened_ids, right, wrong)

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return RULER's string_match_all of one prompt: the share of `expected` in the answer, case ignored."""
        return match_all(expected, answer)

    def _tokens(self, model: LanguageModel) -> PromptTokens:
        """Return the tokenizer of prompts, with what the chat template puts around them."""
        encode, opens = partial(model.encode, add_bos=False), self.opens_answer(model)
        if not self.uses_chat(model):
            return PromptTokens(encode, model.prefix, opens=opens)
        frame = chat_frame(model)
        return PromptTokens(encode, () if frame.begins else model.prefix, frame.before, frame.after, opens)

    def opens_answer(self, model: LanguageModel) -> bool:
        """Return True if a prompt ends with the beginning of the answer: by --answer-prefix, but never in a thought.

        Raises:
            ConfigError: exact scoring, and the chat template opens a thought in front of the answer.
        """
        if not (self.answer_prefix and self.uses_chat(model) and chat_frame(model).thinks):
            return self.answer_prefix
        if self.scoring == "exact":
            raise ConfigError(
                f"--scoring exact reads the answer right behind the assistant's header, and the chat template of "
                f"{model.name} opens a thought there: close it (--template-arg enable_thinking=false, if the template "
                "knows that), or take --scoring match or --no-chat-template."
            )
        return False

    def _filled(self, name: str) -> NeedleTask:
        """Return a task with the options in place of what it leaves open."""
        task = NEEDLE_TASKS[name]
        haystack = task.haystack or self.haystack
        return replace(
            task,
            keys=task.keys or self.num_needles,
            values=task.values or self.num_needles,
            queries=task.queries or self.num_needles,
            haystack=haystack,
            key_type=task.key_type or self.key_type,
            value_type=task.value_type or self.value_type,
        )

    def num_new(self, question: NeedleQuestion) -> int:
        """Return the tokens that are written at most: none for exact scoring."""
        return question.max_new_tokens if self.scoring == "match" else 0

    def ask(
        self,
        model: LanguageModel,
        questions: Sequence[NeedleQuestion],
        path: Path | None = None,
        advance: Advance = silent,
    ) -> tuple[list[QuestionScore], dict[str, Prediction]]:
        """Return how each question was answered, and the generated answers by id (none for exact scoring)."""
        if self.scoring == "match":
            return super().ask(model, questions, path, advance)
        scores = []
        for question, row in zip(questions, self._first_choices(model, questions, advance), strict=True):
            ends = question.prompt.ends
            values = [bool(row[start:end].all()) for start, end in zip((0, *ends), ends, strict=False)]
            scores.append(score_of(question, sum(values) / len(values)))
        return scores, {}

    def protocol(self, model: LanguageModel) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "needle/ruler",
            "definition": "RULER's needle prompts; prompt and budget of new tokens (exact: the answer) have exactly "
            "the length; keys and values never repeat",
            "reference": "RULER, arXiv 2404.06654",
            "scoring": self.scoring,
            "scoring_definition": SCORINGS[self.scoring],
            "tasks": {name: asdict(NEEDLE_TASKS[name]) for name in self.tasks},
            "haystack": self.haystack,
            "num_needles": self.num_needles,
            "key_type": self.key_type,
            "value_type": self.value_type,
            "max_new_tokens": self.max_new_tokens if self.scoring == "match" else None,
            "answer_prefix": self.answer_prefix if model is None else self.opens_answer(model),
            "seed": self.seed,
        }

    def prompt_ids(self, model: LanguageModel) -> list[tuple[int, ...]]:
        """Return the tokens of every prompt; raises as `questions`."""
        return [question.input_ids for question in self.questions(model, None)]

    def answer_lines(
        self,
        model: LanguageModel,
        advance: Advance,
        decide: Callable[[Sequence[Any]], Decisions] | None = None,
    ) -> list[dict[str, Any]]:
        """Return what was answered under exact scoring in the order of asking, as lines of answers.jsonl.

        Args:
            decide: makes of all questions what says which to ask, and when enough were; None: all are asked.
        """
        from longext.models.continuations import begun_text

        questions = self.questions(model, None)
        lines: list[dict[str, Any]] = []

        def answer(asked: Sequence[NeedleQuestion]) -> list[float]:
            for each, row in zip(asked, self._first_choices(model, asked, advance), strict=True):
                text = begun_text(model, each.prompt.answer_ids, row)
                lines.append(answer_line(each, each.id, each.expected, text, float(row.all())))
            return [line["score"] for line in lines[-len(asked) :]]

        size = batch_size(self.batch_tokens, max(self.lengths), model.device)
        return lines[: ask_questions(decide(questions) if decide else None, questions, size, answer)]

    def _first_choices(
        self, model: LanguageModel, questions: Sequence[NeedleQuestion], advance: Advance
    ) -> list[torch.Tensor]:
        from longext.models.continuations import first_choices

        size = batch_size(self.batch_tokens, max(self.lengths), model.device)
        prompts = [(question.input_ids, question.prompt.answer_ids) for question in questions]
        return first_choices(model, prompts, size, advance)

    def notes(self, model: LanguageModel, data: Any, scores: Sequence[QuestionScore]) -> list[str]:
        """Return a note if prompts do not end as RULER's."""
        if self.answer_prefix == self.opens_answer(model):
            return []
        return ["The chat template opens a thought: prompts do not end with the beginning of the answer."]

    def window_notes(self, model: LanguageModel, scores: Sequence[Any]) -> list[str]:
        """Return nothing: lengths are exact, and tables have them."""
        return []


def _sentences(model: LanguageModel, tokens: PromptTokens, haystack: str, value_type: str) -> Sentences:
    if haystack == NOISE:
        return noise_sentences(tokens.encode)
    if haystack == NEEDLES:
        return needle_sentences(tokens.encode, value_type)
    path = SAMPLE_DOCUMENT if haystack == _BOOK else Path(haystack).expanduser()
    if not path.exists():
        raise ConfigError(f"--haystack must be noise, needles, book (the bundled story) or a text file: '{haystack}'.")
    text = read_text(path)
    if not text.strip():
        raise DataError(f"--haystack {path} is empty.")
    return text_sentences(tokens.encode, user_text(model, text))
