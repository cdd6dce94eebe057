"""Samples of RULER's 13 tasks, drawn as NVIDIA's generators draw them (NVIDIA/RULER, `scripts/data/synthetic`).

With the same words, essays, questions, sentences, seed and token counts the samples are theirs, byte for byte
(`--prepare_for_ns`: what a chat template and the tokenizer put around a prompt is taken off the length first). Each
kind has units (lines, words of an essay, words of a list, paragraphs); their largest number that fits is searched by
bisection, on a random sample each time, and a sample that is too long all the same is drawn again with fewer.

Where theirs would never end, ours goes on: if the first step of units does not fit, it is halved, and with it the
worked example of `vt`; `TooShort` says that nothing fits.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

from longext.errors import ConfigError
from longext.evals.passkey_prompts import FILLER
from longext.evals.ruler.haystacks import NEEDLE, NUM_WRONG, frame
from longext.evals.ruler.questions import QuestionSet
from longext.evals.ruler.tasks import RULER_TASKS, RulerTask

Count = Callable[[str, str], int]  # (what is asked, beginning of the answer) -> tokens that they add to a prompt
_DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of an essay's sentences
_SMALL = 4096  # below this length lists are shorter and steps finer
_EXAMPLE, _EXAMPLE_VALUE = 500, "12345"  # vt: tokens of the worked example, and its value before it is drawn
_TRIES = 100  # samples of the fewest units that are drawn before a length counts as too short
_ZETA_2 = math.pi**2 / 6


class TooShort(ConfigError):
    """A task does not fit a length."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What samples are made of.

    Attributes:
        adjectives, nouns, verbs: single words; `more_words` are taken for lists that are longer than all of them.
        essay: its words.
        sentences: a text -> its sentences.
        questions: by number of paragraphs that an answer needs, "one" and "two".
    """

    adjectives: Sequence[str]
    nouns: Sequence[str]
    verbs: Sequence[str]
    more_words: Sequence[str]
    essay: tuple[str, ...]
    sentences: Callable[[str], list[str]]
    questions: dict[str, QuestionSet]

    @cached_property
    def names(self) -> list[str]:
        """Every "adjective-noun", sorted."""
        return sorted({f"{adjective}-{noun}" for adjective in self.adjectives for noun in self.nouns})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample.

    Attributes:
        text, opening: what is asked, and the beginning of the answer.
        answers: the references.
        near: wrong answers that stand in the text.
        wrong: different wrong answers, `near` ones first: what likelihood is compared with.
    """

    text: str
    opening: str
    answers: tuple[str, ...]
    near: tuple[str, ...] = ()
    wrong: tuple[str, ...] = field(default=(), compare=False)


class Maker:
    """Draws samples of one kind: `make` one of so many units.

    Args:
        length: of a sample with its new tokens, what stands around a prompt taken off.
        whole: the same with what stands around it.
    """

    def __init__(self, task: RulerTask, sources: Sources, seed: int, length: int, whole: int, count: Count) -> None:
        import numpy as np

        self.task, self.sources, self.seed, self.count = task, sources, seed, count
        self.length, self.overhead, self.is_small = length, whole - length, whole < _SMALL
        self.rng, self.numbers = random.Random(seed), np.random.RandomState(seed % 2**32)
        self.first = 0

    @property
    def step(self) -> int:
        """Units that the search begins with, and that are taken off a sample that is too long."""
        raise NotImplementedError

    def make(self, units: int) -> Sample:
        """Draw a sample of so many units."""
        raise NotImplementedError

    def fresh(self, rng: random.Random) -> str:
        """Draw something that looks like an answer."""
        raise NotImplementedError

    def tokens(self, sample: Sample) -> int:
        """Return the tokens of a sample."""
        return self.count(sample.text, sample.opening)

    def samples(self, number: int, halved: int) -> Iterator[Sample]:
        """Yield samples that fit, the step of units halved so many times."""
        return self.fill(self.make, number, self.step >> halved, self.length, self.task.max_new_tokens)

    def most(self, step: int, length: int, make: Callable[[int], Sample]) -> int:
        """Return a number of units that surely does not fit."""
        return int(length / (self.tokens(make(step)) / step) * 3)

    def fill(
        self,
        make: Callable[[int], Sample],
        number: int,
        step: int,
        length: int,
        budget: int,
        extra: int = 0,
        finish: Callable[[Sample], Sample] = lambda sample: sample,
    ) -> Iterator[Sample]:
        """Yield samples of as many units as fit.

        Args:
            budget: of new tokens.
            extra: tokens that `finish` adds.
        """
        if step < 1:
            raise TooShort
        low, high, best = step, max(self.most(step, length, make), 2 * step), 0
        while low <= high:
            units = (low + high) // 2
            if self.tokens(make(units)) + extra + budget <= length:
                low, best = units + 1, units
            else:
                high = units - 1
        if not best:
            raise TooShort
        for index in range(number):
            self.first = index
            units, tries = best, 0
            while self.tokens(sample := finish(make(units))) + budget > length:
                if units > step:
                    units -= step
                else:
                    tries += 1
                if tries == _TRIES:
                    raise TooShort
            yield sample


class Niah(Maker):
    """Sentences with a key and a value, hidden in lines of noise, in essays or among more of their kind."""

    @property
    def step(self) -> int:
        """Words of an essay, lines of anything else."""
        if self.task.haystack == "essay":
            return 500
        return 5 if self.is_small else 25

    def draw(self, kind: str, rng: random.Random) -> str:
        """Draw a word, a number of seven digits or a UUID."""
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "words":
            return rng.choice(self.sources.names)
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def fresh(self, rng: random.Random) -> str:
        """Draw a value."""
        return self.draw(self.task.values, rng)

    def make(self, units: int) -> Sample:
        """Draw keys, values, places and the keys that are asked for."""
        task, rng = self.task, self.rng
        keys, values, needles = [], [], []
        for _ in range(task.num_keys):
            keys.append(self.draw(task.keys, rng))
            values.append([self.draw(task.values, rng) for _ in range(task.num_values)])
            needles += [_needle(task.values, keys[-1], value) for value in values[-1]]
        random.Random(self.seed).shuffle(needles)
        more: list[str] = []
        if task.haystack == "essay":
            context = self._in_essay(units, needles)
        else:
            lines, more = self._lines(units)
            for place in zip(sorted(rng.sample(range(units), len(needles)), reverse=True), needles, strict=True):
                lines.insert(*place)
            context = "\n".join(lines)
        asked = rng.sample(range(task.num_keys), task.num_queries)
        answers = [value for i in asked for value in values[i]]
        head, question, opening = frame(task.values, [keys[i] for i in asked], len(answers) == 1)
        near = [value for i, some in enumerate(values) if i not in asked for value in some] + more
        return Sample(text=f"{head}\n{context}{question}", opening=opening, answers=tuple(answers), near=tuple(near))

    def _lines(self, units: int) -> tuple[list[str], list[str]]:
        """Return lines of noise, or of more needles with their values."""
        if units < self.task.num_keys * self.task.num_values:
            raise TooShort
        if self.task.haystack == "noise":
            return [FILLER] * units, []
        drawn = [(self.draw(self.task.keys, self.rng), self.fresh(self.rng)) for _ in range(units)]
        return [_needle(self.task.values, *each) for each in drawn], [value for _, value in drawn]

    def _in_essay(self, units: int, needles: Sequence[str]) -> str:
        words = self.sources.essay
        repeats = -(-units // len(words))
        sentences = self.sources.sentences(" ".join([*words * repeats][:units]))
        places = sorted(int(len(sentences) * (depth / 100)) for depth in self.rng.sample(_DEPTHS, len(needles)))
        parts: list[str] = []
        for (last, place), needle in zip(pairwise([0, *places]), needles, strict=True):
            parts += [" ".join(sentences[last:place]), needle]
        return " ".join([*parts, " ".join(sentences[places[-1] :])])


def _needle(kind: str, key: str, value: str) -> str:
    return NEEDLE.format(kinds=kind, key=key, value=value).strip()


class Vt(Maker):
    """A chain of variables in noise; a small worked example stands in front."""

    hops = 4

    @property
    def step(self) -> int:
        """Lines of noise."""
        return 5 if self.is_small else 10

    def samples(self, number: int, halved: int) -> Iterator[Sample]:
        """Yield samples; first the example is drawn, of at most 500 tokens."""
        solved = partial(self.make, letters=3)
        room = max(_EXAMPLE - self.overhead, _EXAMPLE // 2)
        (drawn,) = self.fill(solved, 1, 5 >> halved, room >> halved, 0)
        example = f"{drawn.text}{drawn.opening} {' '.join(drawn.answers)}\n"
        finish = partial(self._with_example, example)
        extra = self.count(example, "")
        yield from self.fill(
            self.make, number, self.step >> halved, self.length, self.task.max_new_tokens, extra, finish
        )

    def fresh(self, rng: random.Random) -> str:
        """Draw the name of a variable."""
        return "".join(rng.choices(string.ascii_uppercase, k=5))

    def make(self, units: int, letters: int = 5) -> Sample:
        """Draw names, the value and the lines that the chain stands on."""
        count = self.hops + 1
        drawn = ["".join(self.rng.choices(string.ascii_uppercase, k=letters)) for _ in range(count)]
        while len(set(drawn)) < count:
            drawn.append("".join(self.rng.choices(string.ascii_uppercase, k=letters)))
        names = list(dict.fromkeys(drawn))
        value = _EXAMPLE_VALUE if letters == 3 else str(self.numbers.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
        lines = [FILLER] * units
        for i, place in enumerate(sorted(self.rng.sample(range(max(units, count)), count))):
            lines.insert(min(place, units) + i, chain[i])
        return Sample(
            text=self.task.prompt.format(context="\n".join(lines), query=value),
            opening=self.task.opening.format(count=count, query=value),
            answers=tuple(names),
        )

    def _with_example(self, example: str, sample: Sample) -> Sample:
        """Put the example in front, its names and value drawn anew."""
        for name in example.split()[-self.hops - 1 :]:
            example = example.replace(name, "".join(self.rng.choices(string.ascii_uppercase, k=len(name))))
        example = example.replace(_EXAMPLE_VALUE, str(self.numbers.randint(10000, 99999)))
        return replace(sample, text=f"{example}\n{sample.text}")


class Cwe(Maker):
    """A numbered list in which ten words are more common than the others; one of the kind is solved in front."""

    num_common = 10

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        source = self.sources
        self.words = sorted({*source.nouns, *source.adjectives, *source.verbs})
        random.Random(self.seed).shuffle(self.words)

    @property
    def step(self) -> int:
        """Different words."""
        return 10

    def most(self, step: int, length: int, make: Callable[[int], Sample]) -> int:
        """Return more words than fit, by the tokens of 4,096."""
        return int(length // (self.tokens(make(4096)) / 4096)) * 2

    def fresh(self, rng: random.Random) -> str:
        """Draw a word."""
        return rng.choice(self.words)

    def _list(self, number: int, often: int, seldom: int) -> tuple[str, list[str], list[str]]:
        """Return a numbered list of words, the common ones, and the others."""
        pool = self.words if number <= len(self.words) else self.sources.more_words
        if number > len(pool):
            raise ConfigError(f"A list of {number:,} different words is wanted for cwe, and there are {len(pool):,}.")
        drawn = self.rng.sample(pool, number)
        common, others = drawn[: self.num_common], drawn[self.num_common :]
        listed = common * often + others * seldom
        random.Random(self.seed).shuffle(listed)
        return _numbered(listed), common, others

    def make(self, units: int) -> Sample:
        """Draw the solved list, then the one of `units` words."""
        if units < self.num_common:
            raise TooShort
        (example, solved, _), (listed, common, others) = (
            (self._list(20, 3, 1), self._list(units, 6, 1))
            if self.is_small
            else (self._list(40, 10, 3), self._list(units, 30, 3))
        )
        prompt, opening = self.task.prompt, self.task.opening
        shown = f"{prompt.format(context=example)}{opening} {_numbered(solved)}"
        text = f"{shown}\n{prompt.format(context=listed)}"
        return Sample(text=text, opening=opening, answers=tuple(common), near=tuple(others))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class Fwe(Maker):
    """Random words of six letters, the k-th as often as 1 / k^2; the first of them is noise."""

    def fresh(self, rng: random.Random) -> str:
        """Draw a coded word."""
        return "".join(rng.choices(string.ascii_lowercase, k=6))

    def samples(self, number: int, halved: int) -> Iterator[Sample]:
        """Yield samples of as many words as fit, by steps of a 32nd of the length."""
        limit = self.length - self.task.max_new_tokens
        step, words = limit // 32, limit // 6
        if halved or step < 1 or limit // 50 < 4:
            raise TooShort
        vocabulary = self._vocabulary(limit // 50)
        while self.tokens(self._text(vocabulary, words)) < limit:
            words += step
        for _ in range(number):
            vocabulary, fitting = self._vocabulary(limit // 50), words - step
            while self.tokens(sample := self._text(vocabulary, fitting)) > limit:
                fitting -= step
                if fitting < 1:
                    raise TooShort
            yield sample

    def _vocabulary(self, size: int) -> list[str]:
        drawn = [self.fresh(self.rng) for _ in range(size)]
        while len(set(drawn)) < size:
            drawn.append(self.fresh(self.rng))
        words = sorted(set(drawn))
        random.Random(self.seed).shuffle(words)
        return ["...", *words[1:]]

    def _text(self, vocabulary: Sequence[str], number: int) -> Sample:
        import numpy as np

        counts = (number * np.arange(1, len(vocabulary) + 1) ** -2.0 / _ZETA_2).astype(int)
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(self.seed).shuffle(words)
        text = self.task.prompt.format(context=" ".join(words))
        return Sample(text=text, opening=self.task.opening, answers=tuple(vocabulary[1:4]), near=tuple(vocabulary[4:]))


class Qa(Maker):
    """A question on paragraphs, which stand among others; sample k asks question k, round and round."""

    @property
    def step(self) -> int:
        """Paragraphs."""
        return 10

    def fresh(self, rng: random.Random) -> str:
        """Draw the answer to some question."""
        return rng.choice(self.sources.questions[self.task.questions].questions).answers[0]

    def make(self, units: int) -> Sample:
        """Draw paragraphs: those that answer, others of their article, then any."""
        known = self.sources.questions[self.task.questions]
        asked = known.questions[self.first % len(known.questions)]
        if units < len(asked.gold):
            raise TooShort
        if units >= len(known.paragraphs):
            repeats = -(-units // len(known.paragraphs))
            chosen = [*known.paragraphs * repeats][:units]
        else:
            chosen = [known.paragraphs[place] for place in self._places(asked.gold, asked.near, units, known)]
        random.Random(self.seed).shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))
        text = self.task.prompt.format(context=context, query=asked.text)
        return Sample(text=text, opening=self.task.opening, answers=asked.answers)

    def _places(self, gold: tuple[int, ...], near: tuple[int, ...], units: int, known: QuestionSet) -> list[int]:
        if units - len(gold) <= len(near):
            return [*gold, *self.rng.sample(near, units - len(gold))]
        others = [i for i in range(len(known.paragraphs)) if i not in {*gold, *near}]
        return [*gold, *near, *self.rng.sample(others, max(0, units - len(gold) - len(near)))]


MAKERS: dict[str, type[Maker]] = {"niah": Niah, "vt": Vt, "cwe": Cwe, "fwe": Fwe, "qa": Qa}


def ruler_samples(
    name: str, sources: Sources, *, length: int, number: int, seed: int, count: Count, overhead: int = 0
) -> list[Sample]:
    """Return the first `number` samples of a task; they follow from the seed, the length and the token counts.

    Args:
        length: of a prompt and its budget of new tokens, at most.
        count: tokens of a prompt without `overhead`, which is what stands around it.

    Raises:
        TooShort: the task does not fit.
    """
    task = RULER_TASKS[name]
    for halved in range(10):
        maker = MAKERS[task.kind](task, sources, seed, length - overhead, length, count)
        try:
            drawn = list(maker.samples(number, halved))
        except TooShort:
            continue
        rngs = [random.Random(f"{seed} {name} {length} {index}") for index in range(number)]
        return [_with_wrong(sample, maker, rng) for sample, rng in zip(drawn, rngs, strict=True)]
    raise TooShort(f"RULER's {name} does not fit {length:,} tokens, {task.max_new_tokens} of them for the answer.")


def _with_wrong(sample: Sample, maker: Maker, rng: random.Random) -> Sample:
    """Return a sample with wrong answers: some that stand in the text, then ones drawn like the right ones."""
    taken = {answer.lower() for answer in sample.answers}
    near = [each for each in dict.fromkeys(sample.near) if each.lower() not in taken]
    wrong = rng.sample(near, min(NUM_WRONG, len(near)))
    while len(wrong) < NUM_WRONG:
        drawn = maker.fresh(rng)
        if drawn.lower() not in taken | {each.lower() for each in wrong}:
            wrong.append(drawn)
    return replace(sample, wrong=tuple(wrong))
