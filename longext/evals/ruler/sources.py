"""What RULER's samples are made of: longext's own words, a public or own text, questions; or NVIDIA's lists."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.errors import ConfigError, DataError, MissingExtraError
from longext.evals.retrieval import text_hash
from longext.evals.ruler.questions import QuestionSet, hotpot_questions, own_questions, squad_questions
from longext.evals.ruler.samples import Sources
from longext.evals.ruler.words import ADJECTIVES, NOUNS
from longext.registry import Registry
from longext.untrusted import read_text

BOOK = "book"
_WORD = re.compile(r"\b[a-z]{4,9}\b")
_SPACE = re.compile(r"\s+")
_ENDS = re.compile(r"(?<=[.!?])\s+")

WORDS: Registry[str] = Registry("word list")
WORDS.register("own", "longext's lists; a sentence ends at a full stop, exclamation or question mark")
WORDS.register("wonderwords", "as NVIDIA: the lists of the package wonderwords, sentences as NLTK's punkt finds them")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text: what ends with a full stop, exclamation or question mark before white space."""
    return _ENDS.split(text.strip())


def read_sources(
    words: str, essays: str, squad: str | None, hotpotqa: str | None, clean: Callable[[str], str] = str
) -> Sources:
    """Return what samples are made of.

    Args:
        words: a name in `WORDS`.
        essays: "book" (the bundled story), a text file, or a folder of text files.
        squad, hotpotqa: files of these; None for longext's own questions.
        clean: what is done to a text that somebody else wrote.

    Raises:
        ConfigError, DataError: no such file, or it holds nothing.
        MissingExtraError: wonderwords or NLTK's punkt is not installed.
    """
    lists, sentences = _wonderwords() if words == "wonderwords" else (_own_words(), split_sentences)
    return Sources(
        adjectives=lists[0],
        nouns=lists[1],
        verbs=lists[2],
        more_words=[f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS],
        essay=tuple(_SPACE.split(clean(read_essays(essays)))),  # as NVIDIA: an end of white space is a word
        sentences=sentences,
        questions={
            "one": own_questions("one") if squad is None else squad_questions(_file(squad, "squad")),
            "two": own_questions("two") if hotpotqa is None else hotpot_questions(_file(hotpotqa, "hotpotqa")),
        },
    )


def read_essays(essays: str) -> str:
    """Return a text: of the bundled story, of a file, or of the .txt and .md files of a folder in their order."""
    path = SAMPLE_DOCUMENT if essays == BOOK else Path(essays).expanduser()
    if not path.exists():
        raise ConfigError(f"--essays must be book (the bundled story), a text file or a folder of them: '{essays}'.")
    files = sorted(file for kind in ("txt", "md") for file in path.rglob(f"*.{kind}")) if path.is_dir() else [path]
    text = " ".join(read_text(file) for file in files)
    if not text.strip():
        raise DataError(f"--essays {path} holds no text.")
    return text


def _file(name: str, option: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"--{option} must be a file, got '{name}'.")
    return path


def _own_words() -> tuple[list[str], list[str], list[str]]:
    """Return adjectives, nouns, and the words of four to nine letters of the bundled story."""
    return list(ADJECTIVES), list(NOUNS), sorted(set(_WORD.findall(read_text(SAMPLE_DOCUMENT))))


def _wonderwords() -> tuple[tuple[list[str], ...], Callable[[str], list[str]]]:
    try:
        from nltk.tokenize import sent_tokenize  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from wonderwords import random_word  # type: ignore[import-not-found,import-untyped,unused-ignore]

        read: Any = random_word._get_words_from_text_file
        sent_tokenize("Is it there? It is.")
    except (ImportError, AttributeError, LookupError) as error:
        raise MissingExtraError(
            "--words wonderwords needs two packages and a file: pip install wonderwords nltk; "
            "python -m nltk.downloader punkt_tab"
        ) from error
    return tuple(list(read(f"{kind}list.txt")) for kind in ("adjective", "noun", "verb")), sent_tokenize


def facts_of(sources: Sources, essays: str) -> dict[str, Any]:
    """Return what a record says of the sources."""
    sets: dict[str, QuestionSet] = sources.questions
    return {
        "essays": "the bundled story" if essays == BOOK else essays,
        "essays_sha256": text_hash(sources.essay),
        "words_sha256": text_hash([*sources.adjectives, *sources.nouns, *sources.verbs]),
        "qa_1": sets["one"].name,
        "qa_2": sets["two"].name,
        "questions_sha256": text_hash(
            text for kind in ("one", "two") for each in sets[kind].questions for text in (each.text, *each.answers)
        ),
    }
