"""Needles in a haystack as RULER defines them (arXiv 2404.06654, section 3 and appendix B), at exact token lengths.

"One of the special magic numbers for KEY is: VALUE." stands one or several times in noise, in a text, or among more
sentences of its own kind; the question names one or several keys. Keys and values are adjective-noun words, numbers
of seven digits or UUIDs. Departures from RULER: a prompt and its budget of new tokens have exactly the length asked
for (RULER: at most), keys and values never repeat, needles stand on a line of their own, and depths are uniform.
"""

from __future__ import annotations

import re
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise, repeat
from typing import TYPE_CHECKING

from longext.errors import ConfigError
from longext.evals.passkey_prompts import FILLER, Encode, PromptTokens
from longext.evals.ruler.words import NUM_NAMES, draw_different, draw_name
from longext.registry import Registry

if TYPE_CHECKING:
    import numpy as np

HEAD = (
    "{article} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
NEEDLE = "\nOne of the special magic {kinds} for {key} is: {value}."
QUESTION = "\nWhat {are_all} the special magic {kind} for {keys} mentioned in the provided text?"
ANSWER = " The special magic {kind} for {keys} mentioned in the provided text {verb}"
NOISE, NEEDLES = "noise", "needles"
NUM_WRONG = 9  # candidates that a right answer is ranked among, besides itself


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden and what is asked for.

    Attributes:
        keys, values, queries: needles with different keys, values of each key, keys asked for; None for --num-needles.
        haystack: noise, needles or a text; None for --haystack.
        key_type, value_type: words, numbers or uuids; None for --key-type and --value-type.
    """

    summary: str
    keys: int | None = 1
    values: int | None = 1
    queries: int | None = 1
    haystack: str | None = None
    key_type: str | None = None
    value_type: str | None = None


NEEDLE_TASKS: Registry[NeedleTask] = Registry("task")
NEEDLE_TASKS.register("single", NeedleTask("one needle, asked for"))
NEEDLE_TASKS.register("multikey", NeedleTask("several needles with different keys, one asked for", keys=None))
NEEDLE_TASKS.register("multivalue", NeedleTask("one key with several values, all asked for", values=None))
NEEDLE_TASKS.register("multiquery", NeedleTask("several keys, all asked for", keys=None, queries=None))


@dataclass(frozen=True)
class HaystackPrompt:
    """One retrieval question.

    Attributes:
        input_ids: the prompt, with BOS if the tokenizer has one; ends with the beginning of the answer (behind
            what a chat template puts in front of answers).
        answer_ids: the tokens of the expected values, comma-separated, as they would follow the prompt.
        answers: the expected values: in order of the keys asked for, values of one key in order of the text.
        ends: where in `answer_ids` each value ends.
        depth: where the first needle asked for stands, 0 (start) to 1 (end) of the haystack, before it is moved to
            the nearest end of a sentence.
        question: the text that the answer follows; `opened_ids` is the prompt that ends with it.
        wrong: values that are not asked for: others of the text first.
    """

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answers: tuple[str, ...]
    ends: tuple[int, ...]
    depth: float
    question: str
    opened_ids: tuple[int, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class HiddenSentence:
    """One hidden sentence; `depth` is where it is to stand, 0 to 1."""

    key: str
    value: str
    depth: float


# --- names and numbers ------------------------------------------------------------------------------------------------


def _number(rng: np.random.Generator) -> str:
    return str(int(rng.integers(10**6, 10**7)))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


@dataclass(frozen=True)
class NameType:
    """What keys and values can be: how one is drawn, and how many there are."""

    draw: Callable[[np.random.Generator], str]
    most: int


NAME_TYPES: Registry[NameType] = Registry("type of keys and values")
NAME_TYPES.register("words", NameType(draw_name, NUM_NAMES))
NAME_TYPES.register("numbers", NameType(_number, 9 * 10**6))
NAME_TYPES.register("uuids", NameType(_uuid, 2**122))


class Names:
    """An endless supply of keys and values that never repeat, from one generator.

    Args:
        key_type, value_type: names in `NAME_TYPES`.
    """

    def __init__(self, rng: np.random.Generator, key_type: str, value_type: str) -> None:
        self._rng, self._keys, self._values = rng, NAME_TYPES[key_type], NAME_TYPES[value_type]
        self._taken_keys: set[str] = set()
        self._taken_values: set[str] = set()

    def key(self) -> str:
        """Return a new key."""
        return draw_different(partial(self._keys.draw, self._rng), self._taken_keys, self._keys.most)

    def wrong(self, answers: Sequence[str], number: int) -> tuple[str, ...]:
        """Return values that are no answers: drawn ones in a random order, then new ones."""
        drawn = sorted(self._taken_values - set(answers))
        chosen = [drawn[i] for i in self._rng.permutation(len(drawn))[:number]]
        return (*chosen, *(self.value() for _ in range(number - len(chosen))))

    def value(self) -> str:
        """Return a new value."""
        return draw_different(partial(self._values.draw, self._rng), self._taken_values, self._values.most)


# --- haystacks --------------------------------------------------------------------------------------------------------

Sentences = Callable[[Names], Iterator[list[int]]]  # tokens of one sentence after the other, without end


def continuing(encode: Encode, text: str) -> list[int]:
    """Return the tokens of `text` as they are after a word, where a tokenizer marks beginnings otherwise."""
    word, full = encode("a"), encode(f"a{text}")
    return full[len(word) :] if full[: len(word)] == word else encode(text)


def noise_sentences(encode: Encode) -> Sentences:
    """Return RULER's noise: one line about grass and sky, over and over."""
    ids = continuing(encode, f"\n{FILLER}")
    return lambda names: repeat(ids)


def text_sentences(encode: Encode, text: str) -> Sentences:
    """Return the sentences of a text from its beginning, and from there again where it ends."""
    split = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    tokens = [continuing(encode, f" {sentence}" if i else f"\n{sentence}") for i, sentence in enumerate(split)]
    return lambda names: cycle(tokens)


def needle_sentences(encode: Encode, value_type: str) -> Sentences:
    """Return further needles, each with a key and a value that nothing else has."""

    def sentences(names: Names) -> Iterator[list[int]]:
        while True:
            yield continuing(encode, NEEDLE.format(kinds=value_type, key=names.key(), value=names.value()))

    return sentences


# --- prompts ----------------------------------------------------------------------------------------------------------


def haystack_prompt(
    tokens: PromptTokens,
    name: str,
    task: NeedleTask,
    sentences: Sentences,
    *,
    length: int,
    seed: int,
    depth: float | None = None,
    max_new_tokens: int | None = None,
) -> HaystackPrompt:
    """Return a prompt that has exactly `length` tokens together with what may follow it.

    The parts are tokenised apart and the last sentence of the haystack is cut by tokens, so the count is exact.

    Args:
        name: of the task; it enters the seed, so that tasks do not share their keys.
        task: nothing in it is None.
        sentences: the haystack.
        depth: where the first needle asked for is, 0 to 1; None draws it. All others are drawn.
        max_new_tokens: what may follow; None for the tokens of the answer.

    Raises:
        ConfigError: `length` is too short for needles, question and answer.
    """
    rng = _cell_generator(seed, length, depth, name)
    names = Names(rng, str(task.key_type), str(task.value_type))
    needles, queries = _draw_needles(rng, names, task, depth)
    answers = [needle.value for key in queries for needle in needles if needle.key == key]
    head, asking, opening = frame(str(task.value_type), queries, len(answers) == 1)
    question = f"{asking}{tokens.after}{opening}"
    opened = continuing(tokens.encode, question)
    tail = opened if tokens.opens else continuing(tokens.encode, f"{asking}{tokens.after}")
    answer_ids, ends = _answer(tokens, question, answers)
    budget = len(answer_ids) if max_new_tokens is None else max_new_tokens
    hidden = [
        continuing(tokens.encode, NEEDLE.format(kinds=task.value_type, key=needle.key, value=needle.value))
        for needle in needles
    ]
    start = [*tokens.prefix, *tokens.encode(f"{tokens.before}{head}")]
    room = length - budget - len(start) - len(tail) - sum(map(len, hidden))
    if room < 0:
        raise ConfigError(f"A prompt of the task {name} needs at least {length - room} tokens, got {length}.")
    if budget < len(answer_ids):
        raise ConfigError(f"An answer of the task {name} has {len(answer_ids)} tokens, more than {budget}.")
    body = _hide(sentences(names), room, hidden, [needle.depth for needle in needles])
    input_ids = (*start, *body, *tail)
    assert len(input_ids) + budget == length
    first = next(needle for needle in needles if needle.key == queries[0])
    return HaystackPrompt(
        input_ids,
        answer_ids,
        tuple(answers),
        ends,
        first.depth if depth is None else depth,
        question,
        (*start, *body, *opened),
        names.wrong(answers, NUM_WRONG),
    )


def _cell_generator(seed: int, length: int, depth: float | None, name: str) -> np.random.Generator:
    """Return a generator of its own for each cell: the depth enters the seed so that cells do not share their keys."""
    import numpy as np

    place = -1 if depth is None else round(1000 * depth)
    return np.random.default_rng([seed, length, place + 1, zlib.crc32(name.encode())])


def _draw_needles(
    rng: np.random.Generator, names: Names, task: NeedleTask, depth: float | None
) -> tuple[list[HiddenSentence], list[str]]:
    """Return needles in order of depth, and the keys asked for; the first of these has its first needle at `depth`."""
    assert task.keys and task.values and task.queries
    keys = [names.key() for _ in range(task.keys)]
    queries = [keys[i] for i in rng.permutation(task.keys)[: task.queries]]
    needles = [HiddenSentence(key, names.value(), float(rng.random())) for key in keys for _ in range(task.values)]
    if depth is not None:
        first = next(i for i, needle in enumerate(needles) if needle.key == queries[0])
        needles[first] = HiddenSentence(needles[first].key, needles[first].value, depth)
    return sorted(needles, key=lambda needle: needle.depth), queries


def frame(value_type: str, queries: Sequence[str], is_single: bool) -> tuple[str, str, str]:
    """Return the task line, the question, and the beginning of its answer."""
    kind, verb = (value_type.removesuffix("s"), "is") if is_single else (value_type, "are")
    keys = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    head = HEAD.format(article="A" if is_single else "Some", kind=kind, verb=verb)
    question = QUESTION.format(are_all="is" if is_single else "are all", kind=kind, keys=keys)
    return head, question, ANSWER.format(kind=kind, keys=keys, verb=verb)


def _answer(tokens: PromptTokens, question: str, answers: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of all answers, and where each ends; the last ends where the tokens do."""
    lengths = [len(tokens.answer(question, ", ".join(answers[: i + 1]))) for i in range(len(answers))]
    return tokens.answer(question, ", ".join(answers)), tuple(lengths)


def _hide(
    sentences: Iterator[list[int]], room: int, needles: Sequence[Sequence[int]], depths: Sequence[float]
) -> list[int]:
    """Return `room` tokens of haystack with the needles at the ends of sentences nearest to their depths."""
    hay: list[int] = []
    bounds = [0]
    while len(hay) < room:
        hay += next(sentences)
        bounds += [len(hay)] if len(hay) <= room else []
    cuts = [0, *(_nearest(bounds, depth * room) for depth in depths), room]
    body: list[int] = []
    for (before, cut), needle in zip(pairwise(cuts), [*needles, ()], strict=True):
        body += [*hay[before:cut], *needle]
    return body


def _nearest(bounds: Sequence[int], place: float) -> int:
    right = bisect_right(bounds, place)
    around = bounds[max(0, right - 1) : right + 1]
    return min(around, key=lambda bound: abs(bound - place))
