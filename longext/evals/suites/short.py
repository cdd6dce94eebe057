"""Guard short texts: perplexity within the trained length against the base, on the same tokens.

Exits with 1 if the measured increase is above --tolerance at any length; the interval is for judging it.

Example: longext eval short out/llama2-32k --against meta-llama/Llama-2-7b-hf --data books/
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError, DataError, LongextError
from longext.evals.base import Advance, Eval, Outcome, ReadingConfig, Work, register, silent
from longext.evals.limits import check_lengths, verdict
from longext.evals.models import open_model
from longext.evals.suites.ppl import Perplexity
from longext.evals.views import SCORED, TOKENS, Detail, Lines, Section, either
from longext.manifest import result_record
from longext.models.methods import check_method
from longext.options import DataConfig
from longext.settings import LENGTH, MANY, option, shown_name

if TYPE_CHECKING:
    from longext.data.documents import Document
    from longext.evals.perplexity import PerplexityAtLength, TokenizedDocument
    from longext.models.protocol import LanguageModel

_MINIMUM = 8  # tokens of a window


@dataclass(frozen=True)
class ShortWindows:
    """The windows of one length: the tokens of each, and the number of its document."""

    length: int
    windows: list[TokenizedDocument]
    owners: list[int]


@register("short")
@dataclass(frozen=True, kw_only=True)
class ShortTexts(ReadingConfig, DataConfig, Eval):
    """A model against its base on the same tokens, within the trained length.

    Documents are cut into windows of `length` tokens, BOS in front of each if the tokenizer has one; every token after
    the first is scored. With one window per document this is the `yarn-truncated` protocol of `eval ppl`.
    """

    kind: ClassVar[str] = "short-context"
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="short-context",
            title="Short texts",
            picture="short",
            views=(
                Lines(
                    "Change of perplexity against the base",
                    of="results.change",
                    unit="change",
                    lower_is_better=True,
                    axis=TOKENS,
                    value="change",
                    details=(
                        Detail("ppl", "ppl", "{:.2f}"),
                        Detail("base ppl", "base_ppl", "{:.2f}"),
                        Detail("verdict", "passed", either("pass", "FAIL")),
                        Detail("windows", "num_windows", "{:,}"),
                        SCORED,
                    ),
                ),
            ),
        ),
    )

    against: str | None = option(None, "The model it was made from (default with --memory or --method: MODEL itself).")
    tolerance: float = option(0.02, "Largest relative increase of perplexity that passes.", ge=0)
    lengths: tuple[int, ...] = option(
        (), "Window lengths, comma-separated (default: the trained length, and half of it).", le=LENGTH
    )
    num_windows: int = option(8, "Windows of the largest length read of each document.", ge=1)
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)

    def check(self) -> None:
        """Raise ConfigError for a missing base, or a length out of range."""
        check_method(self.method, self.factor)
        if self.lengths:
            check_lengths(self.lengths, minimum=_MINIMUM)
        if self.against is None and self.memory is None and self.method in (None, "none"):
            raise ConfigError(
                "Give the model to compare with: --against BASE (with --memory or --method it may be left out)."
            )

    def load_data(self) -> list[Document]:
        """Return the documents."""
        from longext.checkpoint.source import resolve_model
        from longext.data.documents import load_documents

        resolve_model(self.model, self.revision)  # a wrong name is reported before the base runs
        return load_documents(self)

    def open_model(self) -> None:
        """Return None: the model is opened once the base is done, since memory may not hold both."""

    @property
    def reference(self) -> ShortTexts:
        """Return the settings of the base: the model alone, with no method and no memory."""
        revision = None if self.against else self.revision
        model = self.against or self.model
        return dataclasses.replace(
            self, model=model, revision=revision, method=None, factor=None, memory=None, endpoint=None
        )

    def lengths_within(self, trained: int) -> tuple[int, ...]:
        """Return the lengths to measure: those of --lengths, else the trained length of the base and half of it.

        Raises:
            ConfigError: one is beyond the trained length.
        """
        lengths = tuple(sorted(self.lengths or {trained // 2, trained}))
        if lengths[-1] > trained:
            raise ConfigError(f"--lengths must be within the trained length {trained} of the base, got {lengths[-1]}.")
        return lengths

    def measure(self, model: Any, data: Sequence[Document], work: Work) -> Outcome:
        """Return the record: the base measured, then the model."""
        base = open_model(self.reference)
        lengths = self.lengths_within(base.trained_length)
        cuts = cut_windows(base, data, lengths, self)
        num_tokens = sum(cut.length * len(cut.windows) for cut in cuts)
        texts = [range(cut.length) for cut in cuts for _ in cut.windows]
        work.expect(base, texts, 0, False)
        with work.progress("short texts, the base", num_tokens, "tokens") as advance:
            base_rows, base_facts = score_short(base, cuts, self, advance), base.describe()
        del base
        model = model if model is not None else open_model(self)
        if cut_windows(model, data, lengths, self) != cuts:
            raise ConfigError(
                f"{self.model} and {self.reference.model} split this text into different tokens: their perplexities "
                "are not of the same thing."
            )
        work.expect(model, texts, 0, False)
        with work.progress("short texts, the model", num_tokens, "tokens") as advance:
            rows = score_short(model, cuts, self, advance)
        record = short_record(model.describe(), base_facts, data, self, compare_short(rows, base_rows, cuts, self))
        return Outcome(record=record, notes=[*_notes(record), f"The base is {shown_name(self.reference.model)}."])

    def verdicts(self, limits: Sequence[Any], outcome: Outcome) -> list[dict[str, Any]]:
        """Return the tolerance at each length."""
        rows = outcome.record["results"]
        return [verdict(f"change at {row['length']}", self.tolerance, row["change"], at_most=True) for row in rows]

    def require(self, record: Mapping[str, Any]) -> None:
        """Raise LongextError if the change is above the tolerance at a length."""
        if not record["passed"]:
            raise LongextError(record["verdict"])


def cut_windows(
    model: LanguageModel, documents: Sequence[Document], lengths: Sequence[int], config: ShortTexts
) -> list[ShortWindows]:
    """Return the windows of each length, from the documents that fill the longest window.

    Of a document, `num_windows` of the longest windows are read at most, and `max_tokens`; every length covers the
    same text.

    Raises:
        DataError: no document fills the longest window.
    """
    from longext.evals.perplexity import TokenizedDocument

    bos, longest = model.prefix, max(lengths)
    texts = [tuple(model.encode(document.text, add_bos=False)[: config.max_tokens]) for document in documents]
    room = longest - len(bos)
    kept = [(document.id, text) for document, text in zip(documents, texts, strict=True) if len(text) >= room]
    if not kept:
        raise DataError(
            f"No document of {config.data} has {room} tokens: the longest has {max(map(len, texts))}. Give longer "
            "documents, or --lengths within that."
        )
    cuts = []
    for length in lengths:
        windows, owners = [], []
        for number, (name, text) in enumerate(kept):
            size, end = length - len(bos), min(len(text) // room, config.num_windows) * room
            for start in range(0, end - size + 1, size):
                windows.append(TokenizedDocument(f"{name}+{start}", (*bos, *text[start : start + size])))
                owners.append(number)
        cuts.append(ShortWindows(length, windows, owners))
    return cuts


def score_short(
    model: LanguageModel, cuts: Sequence[ShortWindows], config: ShortTexts, advance: Advance = silent
) -> list[PerplexityAtLength]:
    """Return one model's perplexity at each length; each window counts as a document."""
    from longext.evals.perplexity import evaluate_perplexity

    rows = []
    for cut in cuts:
        protocol = Perplexity(
            model="",
            protocol="yarn-truncated",
            lengths=(cut.length,),
            batch_tokens=config.batch_tokens,
            num_bootstrap=0,
        )
        rows += evaluate_perplexity(model, cut.windows, protocol, advance)
    return rows


def compare_short(
    rows: Sequence[PerplexityAtLength],
    base_rows: Sequence[PerplexityAtLength],
    cuts: Sequence[ShortWindows],
    config: ShortTexts,
) -> list[dict[str, Any]]:
    """Return the rows of the record, a length each.

    `change` is the relative change of perplexity, exp(mean difference of NLL) - 1; `change_low` and `change_high` its
    95 % paired bootstrap interval, None if there is nothing to resample; `resampled` says what was: "documents", or
    "windows" if there are too few documents; `passed` that the change is not above the tolerance.
    """
    return [_compare(*row, config) for row in zip(rows, base_rows, cuts, strict=True)]


def _compare(
    row: PerplexityAtLength, base: PerplexityAtLength, cut: ShortWindows, config: ShortTexts
) -> dict[str, Any]:
    import numpy as np

    from longext.evals.statistics import MIN_DOCUMENTS, bootstrap_mean

    pairs = zip(row.per_document, base.per_document, strict=True)
    differences = np.array([window["nll"] - base_window["nll"] for window, base_window in pairs])
    num_documents = len(set(cut.owners))
    by_document = num_documents >= MIN_DOCUMENTS
    units = np.array(cut.owners) if by_document else np.arange(len(differences))
    sums, counts = (np.bincount(units, values).astype(np.float64) for values in (differences, np.ones(len(units))))
    interval = bootstrap_mean(sums, counts, num_samples=config.num_bootstrap, seed=config.seed)
    change = math.expm1(float(differences.mean()))
    return {
        "length": cut.length,
        "ppl": row.ppl,
        "base_ppl": base.ppl,
        "nll": row.nll,
        "base_nll": base.nll,
        "change": change,
        "change_low": math.expm1(interval[0]) if interval else None,
        "change_high": math.expm1(interval[1]) if interval else None,
        "resampled": ("documents" if by_document else "windows") if interval else None,
        "passed": change <= config.tolerance,
        "num_documents": num_documents,
        "num_windows": len(differences),
        "num_tokens": row.num_tokens,
    }


def verdict_text(results: Sequence[Mapping[str, Any]], tolerance: float) -> str:
    """Return one sentence: where the change is above the tolerance, or that it is nowhere."""
    above = [f"{row['change']:+.2%} at {row['length']:,}" for row in results if not row["passed"]]
    if above:
        return f"FAILED: perplexity {', '.join(above)} tokens, above the tolerance of {tolerance:.2%}."
    worst = max(results, key=lambda row: float(row["change"]))
    return f"Passed: perplexity {worst['change']:+.2%} at most ({worst['length']:,} tokens), tolerance {tolerance:.2%}."


def undecided(results: Sequence[Mapping[str, Any]], tolerance: float) -> list[int]:
    """Return the lengths whose interval holds the tolerance: other documents could turn the verdict."""
    rows = [row for row in results if row["change_low"] is not None]
    return [row["length"] for row in rows if row["change_low"] <= tolerance < row["change_high"]]


def short_record(
    model: dict[str, Any],
    base: dict[str, Any],
    documents: Sequence[Document],
    config: ShortTexts,
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the JSON record; `model` and `base` are what the two say of themselves."""
    from longext.data.documents import documents_facts

    return result_record(
        ShortTexts.kind,
        model,
        {
            "id": "ppl/short-context",
            "definition": "disjoint windows within the base's trained length, BOS first, all later tokens scored by "
            "both models; relative change of perplexity, weighted by tokens; fails where it is above the tolerance",
            "reference": "longext; one window a document: YaRN eval/perplexity.py --truncate (arXiv 2309.00071)",
            "tolerance": config.tolerance,
            "num_windows": config.num_windows,
            "seed": config.seed,
        },
        documents_facts(
            config,
            documents,
            num_documents=results[0]["num_documents"],
            num_too_short=len(documents) - results[0]["num_documents"],
        ),
        base=base,
        passed=all(row["passed"] for row in results),
        verdict=verdict_text(results, config.tolerance),
        undecided=undecided(results, config.tolerance),
        results=results,
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    """Return the verdict, and where it could turn with other documents or on fewer of them."""
    notes = [record["verdict"]]
    if record["undecided"]:
        lengths = ", ".join(f"{length:,}" for length in record["undecided"])
        notes.append(f"The interval holds the tolerance at {lengths} tokens: more documents would make it surer.")
    if record["data"]["num_too_short"]:
        notes.append(f"{record['data']['num_too_short']} document(s) shorter than the largest window were left out.")
    return notes
