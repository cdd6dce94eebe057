"""The sections of a report, one or more for each kind of result: which numbers, in which columns, what is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longext.evals.base import EVALS
from longext.evals.views import ALWAYS, NEVER, Bars, Lines, Score, Section
from longext.report.scores import numbers_of


def _key_as_length(score: Score) -> int:
    return int(score.keys[-1])


_TRAINING = Section(
    name="training",
    title="Training runs",
    kind="training",
    must_agree=frozenset({"protocol.id"}),
    unknown="Runs do not record a protocol of what they measure while training: `eval ppl` compares their models.",
    views=(
        Bars(
            "Loss of the last step (nats)",
            of="final_loss",
            unit="nats",
            lower_is_better=None,
            columns=lambda score: "loss",
            picture=NEVER,
        ),
        Lines(
            "Perplexity at the last step that was evaluated, by length",
            of="perplexity.*",
            name="perplexity",
            unit="perplexity",
            lower_is_better=None,
            columns=_key_as_length,
            axis="length (tokens)",
            table=ALWAYS,
        ),
    ),
)


def sections() -> tuple[Section, ...]:
    """Return every section, in the order of a report."""
    evaluations = [section for kind in EVALS.values() for section in kind.sections]
    return (*evaluations, _TRAINING)


def section_of(record: Mapping[str, Any]) -> Section:
    """Return the section of a record: that of its kind and protocol, else that of its kind.

    Raises:
        KeyError: no section shows this kind.
    """
    kind, protocol = str(record["kind"]), str((record["protocol"] or {}).get("id"))
    fitting = [section for section in sections() if section.kind == kind and section.protocol in ("", protocol)]
    if not fitting:
        raise KeyError(kind)
    return max(fitting, key=lambda section: bool(section.protocol))


def scores_by_view(section: Section, record: Mapping[str, Any]) -> dict[str, list[Score]]:
    """Return the scores of each view, by the view's name."""
    scores = [score for score in numbers_of(record) if not score.is_count]
    return {view.name: [score for score in scores if view.shows(score)] for view in section.views}
