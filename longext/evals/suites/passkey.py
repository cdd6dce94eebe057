"""Hide a number in a long text and ask for it, by length and depth.

Accuracy with Wilson intervals, heat map, JSON.

Example: longext passkey books-5m --method yarn --factor 8 --lengths 512,1024,2048
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError
from longext.evals.base import (
    Advance,
    AnswersEval,
    GivenAnswers,
    Outcome,
    ReadingConfig,
    Work,
    fail_under,
    register,
)
from longext.evals.limits import PlaceLimit, check_depths, check_lengths, place_limits
from longext.evals.ranks import ranked_view
from longext.evals.retrieval import QuestionScore, RetrievalEval, begins_with, check_answers, key_score
from longext.evals.sequential.asking import Decisions, error_rate
from longext.evals.views import MEAN_TOKENS, ONE, PROMPT, SEVERAL, Detail, Lines, Section, depth_map, depths_of
from longext.models.methods import check_method
from longext.registry import Registry
from longext.settings import LENGTH, MANY, option, override

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

_FORM = "SCORE or LENGTH=SCORE"


@dataclass(frozen=True)
class PasskeyProtocol:
    """One named passkey test.

    Attributes:
        summary: the definition, as printed in reports.
        reference: where it comes from.
        has_depths: the depth is a parameter; if not, each trial draws its own.
        scoring: "exact" (greedy decoding gives exactly the answer's tokens) or "first-integer" (the first run of
            digits in ten greedy tokens is the key).
    """

    summary: str
    reference: str
    has_depths: bool
    scoring: str


PASSKEY_PROTOCOLS: Registry[PasskeyProtocol] = Registry("protocol")
PASSKEY_PROTOCOLS.register(
    "landmark",
    PasskeyProtocol(
        "landmark prompt of exactly L tokens, answer included; keys of a fixed number of digits; needle at a given "
        "depth; greedy tokens must equal the answer's",
        "Mohtashami and Jaggi, arXiv 2305.16300; token-exact as longext defines it",
        True,
        "exact",
    ),
)
PASSKEY_PROTOCOLS.register(
    "longlora",
    PasskeyProtocol(
        "filler of 3.75 L characters rounded down to 1,024; key 1-49999 and depth drawn per seed 0, 1, ...; greedy "
        "tokens must equal the answer's; the measured token count is reported",
        "LongLoRA passkey_retrivial.py (arXiv 2309.12307)",
        False,
        "exact",
    ),
)
PASSKEY_PROTOCOLS.register(
    "yarn",
    PasskeyProtocol(
        "filler grown by 128 characters up to L tokens; key 1-50000 and depth drawn per trial (seeded here, unseeded "
        "there); the first integer of 10 greedy tokens must be the key",
        "YaRN eval/passkey.py (arXiv 2309.00071)",
        False,
        "first-integer",
    ),
)


@register("passkey")
@dataclass(frozen=True, kw_only=True)
class Passkey(ReadingConfig, AnswersEval):
    """Retrieval accuracy by length and depth."""

    kind: ClassVar[str] = "passkey"
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="passkey",
            title="Passkey",
            measured=depths_of,
            views=(
                Lines(
                    "Passkey accuracy by prompt length",
                    of="by_length.accuracy",
                    axis=PROMPT,
                    picture=SEVERAL,
                    details=(MEAN_TOKENS, Detail("trials", "num_trials")),
                ),
                depth_map(
                    "Passkey accuracy by length and depth",
                    of="results.accuracy",
                    table=ONE,
                ),
                ranked_view("ranked_by_length", panel=None),
            ),
        ),
    )

    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096), "Context lengths in tokens, comma-separated.", le=LENGTH)
    depths: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Needle depths from 0 (start) to 1 (end), comma-separated.", ge=0, le=1
    )
    num_trials: int = option(4, "Prompts per length and depth.", ge=1, le=MANY)
    protocol: str = option(
        "landmark", "landmark has exact lengths, the others are as published:", names=lambda: PASSKEY_PROTOCOLS
    )
    filler: str = option("landmark", "landmark, book (the bundled story) or a text file.")
    num_needles: int = option(1, "Needles in the text; one of them is asked for.", ge=1, le=10)
    num_digits: int = option(5, "Digits of a key.", ge=2, le=12)
    answers: str = override(
        RetrievalEval, "answers", help="Answers are scored, the right one is ranked by likelihood, or"
    )
    fail_under: tuple[str, ...] = fail_under(_FORM)
    error_rate: float | None = error_rate()

    @property
    def label(self) -> str:
        """Return the name of the results directory."""
        return f"passkey-{self.protocol}"

    @property
    def rules(self) -> PasskeyProtocol:
        """Return the protocol that was chosen."""
        return PASSKEY_PROTOCOLS[self.protocol]

    @property
    def places(self) -> Sequence[float | None]:
        """Return the depths that are measured, None if the protocol draws them."""
        return self.depths if self.rules.has_depths else (None,)

    def check(self) -> None:
        """Raise ConfigError for an unknown protocol or a value out of range."""
        rules = self.rules
        check_lengths(self.lengths, minimum=64)
        check_answers(self)
        check_method(self.method, self.factor)
        check_depths(self.depths, 0.01, least=1)
        own = (self.num_needles, self.num_digits, self.filler)
        if not rules.has_depths and own != (Passkey.num_needles, Passkey.num_digits, Passkey.filler):
            raise ConfigError(
                f"The {self.protocol} protocol is as published: --num-needles, --num-digits and --filler are for "
                "landmark."
            )

    def limits(self, data: Any) -> list[PlaceLimit]:
        """Return the limits of --fail-under."""
        given = [each.length for each in data.scores] if isinstance(data, GivenAnswers) else self.lengths
        return place_limits(self.fail_under, [("", str(length)) for length in sorted(given)], form=_FORM)

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return 1 for a right answer, else 0: it begins with the key, or (yarn) the key is its first whole number."""
        if self.rules.scoring == "exact":
            return begins_with(answer, expected[0])
        found = re.search(r"\d+", answer)
        return float(found is not None and found[0].lstrip("0") == expected[0].lstrip("0"))

    def given_score(self, where: str, row: Any) -> QuestionScore:
        """Return the score of a line of answers.jsonl; a prompt with its answer has the length, if that is exact."""
        score = key_score(self.rate, where, row)
        return replace(score, num_tokens=score.length) if self.rules.has_depths else score

    def prompt_ids(self, model: LanguageModel) -> list[tuple[int, ...]]:
        """Return the tokens of every prompt.

        Raises:
            ConfigError, DataError: one cannot be built: a length is too short, or there is too little filler.
        """
        from longext.evals.passkey import Prompts

        return Prompts(model, self).input_ids()

    def answer_lines(
        self,
        model: LanguageModel,
        advance: Advance,
        decide: Callable[[Sequence[Any]], Decisions] | None = None,
    ) -> list[dict[str, Any]]:
        """Return what was answered in the order of asking, as lines of answers.jsonl; see `Needle.answer_lines`."""
        from longext.evals.passkey import answer_lines

        return answer_lines(model, self, advance, decide)

    def measure(self, model: Any, data: Any, work: Work) -> Outcome:
        """Return the record."""
        from longext.evals.passkey import measure_passkey, score_given

        return score_given(self, data) if isinstance(data, GivenAnswers) else measure_passkey(self, model, work)
