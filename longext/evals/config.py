"""Settings of evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from longext.evals.base import ReadingConfig
from longext.options import ChatConfig, DataConfig
from longext.settings import LENGTH, MANY, option


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(ReadingConfig, ChatConfig):
    """`longext eval needle`: RULER's needle tasks by length."""

    tasks: tuple[str, ...] = option(
        ("single", "multikey", "multivalue", "multiquery"),
        "single, multikey, multivalue, multiquery, or RULER's own niah_single_1 ... niah_multiquery, comma-separated.",
    )
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048, 4096), "Tokens of prompt and answer budget together, comma-separated.", le=LENGTH
    )
    depths: tuple[float, ...] = option((), "Depths of the needle asked for, 0 to 1, comma-separated (default: random).")
    num_trials: int = option(10, "Prompts per length and depth.", le=MANY)
    num_needles: int = option(4, "Needles of multikey, multivalue and multiquery.", le=MANY)
    haystack: str = option("book", "noise, needles (more of their kind), book (the bundled story) or a text file.")
    key_type: str = option("words", "Keys are words, numbers or uuids.")
    value_type: str = option("numbers", "Values are words, numbers or uuids.")
    scoring: str = option(
        "match", "match (RULER's: generate, find the values) or exact (one forward pass over the answer)."
    )
    max_new_tokens: int = option(128, "Answer budget of match.", ge=0)
    answer_prefix: bool = option(
        True,
        "End prompts with the beginning of the answer, as RULER (never inside a thought).",
        "--answer-prefix",
        "--no-answer-prefix",
    )
    fail_under: tuple[str, ...] = option(
        (),
        "SCORE, TASK=SCORE, LENGTH=SCORE or TASK@LENGTH=SCORE, a share of 0 to 1 (0.9 for 90%): exit "
        "with 1 below it; may be repeated.",
        repeats=True,
        panel="Output",
    )


@dataclass(frozen=True, kw_only=True)
class LongEvalConfig(ReadingConfig, ChatConfig):
    """`longext eval longeval`: LMSYS's line and topic retrieval."""

    data: str | None = option(
        None, "Folder with <n>_lines.jsonl, <n>_topics.jsonl (default: lines are generated).", panel="Data"
    )
    predictions: str | None = option(None, "Score this file of answers; no model is run.", panel="Output")
    tasks: tuple[str, ...] = option(("lines", "topics"), "Of lines and topics, comma-separated.")
    sizes: tuple[int, ...] = option(
        (), "Numbers of lines or topics, comma-separated (default: all in --data; generated: 20,50,100)."
    )
    num_cases: int = option(50, "Cases of each size, at most.", ge=1, le=MANY)
    complete: bool = option(False, "Give the beginning of the answer, for models that only continue.")
    fail_under: tuple[str, ...] = option(
        (),
        "SCORE, TASK=SCORE, SIZE=SCORE or TASK@SIZE=SCORE, a share of 0 to 1 (0.9 for 90%): exit with 1 "
        "below it; may be repeated.",
        repeats=True,
        panel="Output",
    )


@dataclass(frozen=True, kw_only=True)
class BABILongConfig(ReadingConfig, ChatConfig):
    """`longext eval babilong`: bAbI facts in long text."""

    data: str = option("", "Folder with <length>/<task>.jsonl, as 4k/qa1.jsonl.", panel="Data")
    tasks: tuple[str, ...] = option(("qa1", "qa2", "qa3", "qa4", "qa5"), "Of qa1 to qa5, comma-separated.")
    lengths: tuple[str, ...] = option((), "Lengths as the folders name them: 0k,4k (default: all in --data).")
    num_cases: int | None = option(None, "Rows of each task and length, at most.", ge=1, le=MANY)
    max_new_tokens: int = option(20, "Tokens of an answer.", ge=0)
    prompt: str = option("examples", "examples (instruction and examples), instruction, or plain (text and question).")
    fail_under: tuple[str, ...] = option(
        (),
        "SCORE, TASK=SCORE, LENGTH=SCORE or TASK@LENGTH=SCORE, a share of 0 to 1 (0.9 for 90%): exit "
        "with 1 below it; may be repeated.",
        repeats=True,
        panel="Output",
    )


@dataclass(frozen=True, kw_only=True)
class ShortConfig(ReadingConfig, DataConfig):
    """`longext eval short`: what a model loses within the trained length of its base."""

    against: str | None = option(None, "The model it was made from (default with --memory or --method: MODEL itself).")
    tolerance: float = option(0.02, "Largest relative increase of perplexity that passes.")
    lengths: tuple[int, ...] = option(
        (), "Window lengths, comma-separated (default: the trained length, and half of it).", le=LENGTH
    )
    num_windows: int = option(8, "Windows of the largest length read of each document.")
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)


@dataclass(frozen=True, kw_only=True)
class EffectiveConfig(ReadingConfig, ChatConfig):
    """`longext eval effective`: the longest length at which retrieval reaches a bar."""

    max_length: int = option(help="Longest length to try, a multiple of 64.", ge=2, le=LENGTH)
    min_length: int = option(128, "First length to try, a multiple of 64.")
    bar: float = option(0.8, "Accuracy that counts as passed, 0 to 1.")
    test: str = option("passkey", "passkey (landmark), or needle (RULER's single needle, exact scoring).")
    depths: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Needle depths from 0 (start) to 1 (end), comma-separated."
    )
    num_trials: int = option(4, "Prompts per length and depth.", le=MANY)
    fail_under: int | None = option(None, "LENGTH: exit with 1 where no length from it on passed.", panel="Output")
