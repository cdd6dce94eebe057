"""Passkey prompts: the landmark text with exact token counts, and LongLoRA's and YaRN's versions as published.

The landmark prompt is (arXiv 2305.16300, appendix): a task line, filler, "The pass key is K.", filler, the question.
Pure and seeded: the same arguments give the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longext.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Encode = Callable[[str], list[int]]

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
NAMED_NEEDLE = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."
NAMED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"
NUM_WRONG = 9  # keys that the right one is ranked among
NAMES = ("Arthur", "Beatrice", "Charles", "Dorothea", "Edmund", "Frances", "George", "Harriet", "Isaac", "Julia")
_PUBLISHED_MAX_KEY = 50_000  # keys of one to five digits; NumPy's randint (LongLoRA) stops before it, Python's does not


@dataclass(frozen=True)
class NeedlePrompt:
    """One retrieval question.

    Attributes:
        input_ids: the prompt, with the tokenizer's own prefix.
        answer_ids: the tokens of the answer as they would follow the prompt.
        key: the number asked for.
        depth: where the asked needle stands, 0 (start) to 1 (end) of the filler.
        question: what the answer follows.
        wrong: other keys, those of the text first.
    """

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    key: int
    depth: float
    question: str = QUESTION
    wrong: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptTokens:
    """A tokenizer reduced to what prompts need.

    Attributes:
        encode: tokens of a text, without special ones.
        prefix: what the tokenizer puts before a text: mostly a BOS or nothing.
        before, after: texts that a chat template puts around the user's message; RULER's prompts have them.
        opens: the prompt ends with the beginning of the answer (RULER's).
    """

    encode: Encode
    prefix: tuple[int, ...]
    before: str = ""
    after: str = ""
    opens: bool = True

    def answer(self, question: str, key: int | str) -> tuple[int, ...]:
        """Return the tokens that " {key}" adds after `question`, however the tokenizer joins them."""
        asked, full = self.encode(question), self.encode(f"{question} {key}")
        same = next((i for i, (a, b) in enumerate(zip(asked, full, strict=False)) if a != b), len(asked))
        if same < len(asked):
            raise ConfigError("This tokenizer merges the question with the answer; passkey prompts need it not to.")
        return tuple(full[same:])


def draw_keys(rng: np.random.Generator, count: int, num_digits: int, first: Sequence[int] = ()) -> list[int]:
    """Return `count` different keys of exactly `num_digits` digits, those of `first` first."""
    low = 10 ** (num_digits - 1)
    keys = list(first)
    while len(keys) < count:
        key = int(rng.integers(low, 10 * low))
        if key not in keys:
            keys.append(key)
    return keys


def exact_prompt(
    tokens: PromptTokens,
    filler_ids: Sequence[int],
    *,
    length: int,
    depth: float,
    seed: int,
    num_needles: int = 1,
    num_digits: int = 5,
) -> NeedlePrompt:
    """Return a prompt whose tokens and answer together are exactly `length` tokens.

    The parts are tokenised apart and the filler is cut by tokens, so nothing is re-tokenised and the count is exact.

    Args:
        filler_ids: tokens of the filler, at least `length` of them.
        depth: share of the filler that stands before the asked needle, 0 to 1.
        num_needles: with more than one, every needle names its owner and one of them is asked for; the others stand
            at seeded random places.

    Raises:
        ConfigError: `length` is too short for the task line, needles and question.
    """
    import numpy as np

    rng = np.random.default_rng([seed, num_needles, num_digits])
    keys = draw_keys(rng, num_needles, num_digits)
    names = [NAMES[i % len(NAMES)] for i in rng.permutation(len(NAMES))[:num_needles]]
    others = sorted(rng.random(num_needles - 1))
    template, asking = (NEEDLE, QUESTION) if num_needles == 1 else (NAMED_NEEDLE, NAMED_QUESTION)
    question = asking.format(name=names[0])
    needles = [tokens.encode(f"\n{template.format(key=k, name=n)}\n") for k, n in zip(keys, names, strict=True)]
    head = [*tokens.prefix, *tokens.encode(f"{TASK}\n")]
    tail, answer = tokens.encode(f"\n{question}"), tokens.answer(question, keys[0])
    room = length - len(head) - len(tail) - len(answer) - sum(map(len, needles))
    if room < 0:
        raise ConfigError(f"A passkey prompt needs at least {length - room} tokens, got length {length}.")
    places = sorted(zip([depth, *others], range(num_needles), strict=True))
    body: list[int] = []
    previous = 0
    for place, index in places:
        cut = round(place * room)
        body += [*filler_ids[previous:cut], *needles[index]]
        previous = cut
    input_ids = (*head, *body, *filler_ids[previous:room], *tail)
    assert len(input_ids) + len(answer) == length
    wrong = draw_keys(rng, num_needles + NUM_WRONG, num_digits, keys)[1 : NUM_WRONG + 1]
    return NeedlePrompt(input_ids, answer, keys[0], depth, question, tuple(wrong))


def published_text(num_filler_characters: int, prefix_characters: int, key: int) -> str:
    """Return the landmark prompt as LongLoRA and YaRN join it: lines, the filler cut by characters on both sides."""
    filler = " ".join([FILLER] * (num_filler_characters // len(FILLER) + 2))
    suffix = filler[: num_filler_characters - prefix_characters]
    return "\n".join([TASK, filler[:prefix_characters], NEEDLE.format(key=key), suffix, QUESTION])


def longlora_prompt(tokens: PromptTokens, *, length: int, seed: int) -> NeedlePrompt:
    """Return LongLoRA's prompt: 3.75 characters a token rounded down to 1,024; depth and key from the seed.

    The token count is whatever comes out; reports give the measured mean.
    """
    import numpy as np

    rng = np.random.RandomState(seed)
    num_characters = int(3.75 * length // 1024 * 1024)
    if num_characters < 1024:
        raise ConfigError(
            f"The longlora protocol counts filler in steps of 1,024 characters: give lengths >= 274, got {length}."
        )
    prefix = int(rng.randint(0, num_characters))
    key = int(rng.randint(1, _PUBLISHED_MAX_KEY))
    return _published(tokens, num_characters, prefix, key, _wrong(np.random.default_rng([seed, length]), key))


def yarn_prompt(tokens: PromptTokens, *, length: int, seed: int) -> NeedlePrompt:
    """Return YaRN's prompt: filler grown by 128 characters, the last that stays below `length` tokens; seeded here."""
    import numpy as np

    rng = np.random.default_rng([seed, length])
    key, share = int(rng.integers(1, _PUBLISHED_MAX_KEY + 1)), float(rng.random())
    wrong = _wrong(rng, key)

    def prompt(steps: int) -> NeedlePrompt:
        return _published(tokens, 128 * steps, int(share * 128 * steps), key, wrong)

    low, high = 0, 1
    while len(prompt(high).input_ids) < length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(prompt(middle).input_ids) < length else (low, middle)
    if low == 0:
        raise ConfigError(f"A yarn passkey prompt needs more than {length} tokens.")
    return prompt(low)


def _wrong(rng: np.random.Generator, key: int) -> tuple[int, ...]:
    """Return keys drawn as the published ones are, all different."""
    drawn = {key: None}
    while len(drawn) <= NUM_WRONG:
        drawn[int(rng.integers(1, _PUBLISHED_MAX_KEY))] = None
    return tuple(drawn)[1:]


def _published(
    tokens: PromptTokens, num_characters: int, prefix: int, key: int, wrong: tuple[int, ...]
) -> NeedlePrompt:
    text = published_text(num_characters, prefix, key)
    input_ids = (*tokens.prefix, *tokens.encode(text))
    return NeedlePrompt(input_ids, tokens.answer(QUESTION, key), key, prefix / num_characters, QUESTION, wrong)
