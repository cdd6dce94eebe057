"""A regression guard for short texts: a model against its base on the same tokens, within the trained length.

Documents are cut into windows of `length` tokens, BOS in front of each where the tokenizer has one; every token after
the first is scored. With one window per document this is the `yarn-truncated` protocol of `eval ppl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longext.data.documents import Document, data_hash
from longext.errors import ConfigError, DataError
from longext.evals.config import ShortConfig
from longext.evals.limits import verdict as bar_verdict
from longext.evals.perplexity import (
    PerplexityAtLength,
    Progress,
    TokenizedDocument,
    check_lengths,
    evaluate_perplexity,
)
from longext.evals.statistics import bootstrap_mean
from longext.evals.suites.ppl import Perplexity
from longext.manifest import result_record
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel

_MINIMUM = 8  # tokens of a window
_MIN_DOCUMENTS = 8  # fewer are no sample: windows are resampled then, as `eval ppl` does


@dataclass(frozen=True)
class ShortWindows:
    """The windows of one length: the tokens of each, and the number of its document."""

    length: int
    windows: list[TokenizedDocument]
    owners: list[int]


@dataclass(frozen=True, kw_only=True)
class ShortResult:
    """A model against its base at one length.

    Attributes:
        change: relative change of perplexity, exp(mean difference of NLL) - 1.
        change_low, change_high: its 95 % paired bootstrap interval; None where there is nothing to resample.
        resampled: "documents", or "windows" where there are fewer than 8 documents.
        passed: `change` is not above the tolerance.
    """

    length: int
    ppl: float
    base_ppl: float
    nll: float
    base_nll: float
    change: float
    change_low: float | None
    change_high: float | None
    resampled: str | None
    passed: bool
    num_documents: int
    num_windows: int
    num_tokens: int


def check_short_config(config: ShortConfig) -> None:
    """Raise ConfigError for a missing base or a value out of range."""
    check_method(config.method, config.factor)
    if config.lengths:
        check_lengths(config.lengths, minimum=_MINIMUM)
    if config.against is None and config.memory is None and config.method in (None, "none"):
        raise ConfigError(
            "Give the model to compare with: --against BASE (with --memory or --method it may be left out)."
        )
    if not (math.isfinite(config.tolerance) and config.tolerance >= 0):
        raise ConfigError(f"--tolerance must be a share >= 0, for example 0.02, got {config.tolerance:g}.")
    if config.num_windows < 1:
        raise ConfigError(f"--num-windows must be >= 1, got {config.num_windows}.")


def lengths_within(config: ShortConfig, trained: int) -> tuple[int, ...]:
    """Return the lengths to measure: those asked for, else the trained length of the base and half of it.

    Raises:
        ConfigError: one is beyond the trained length.
    """
    lengths = tuple(sorted(config.lengths or {trained // 2, trained}))
    if lengths[-1] > trained:
        raise ConfigError(f"--lengths must be within the trained length {trained} of the base, got {lengths[-1]}.")
    return lengths


def cut_windows(
    model: LanguageModel, documents: Sequence[Document], lengths: Sequence[int], config: ShortConfig
) -> list[ShortWindows]:
    """Return the windows of each length, from the documents that fill the longest window.

    Of a document, `num_windows` of the longest windows are read at most, and `max_tokens`; every length covers the
    same text.

    Raises:
        DataError: no document fills the longest window.
    """
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


def num_short_tokens(cuts: Sequence[ShortWindows]) -> int:
    """Return how many tokens go through a model."""
    return sum(cut.length * len(cut.windows) for cut in cuts)


def score_short(
    model: LanguageModel, cuts: Sequence[ShortWindows], config: ShortConfig, on_progress: Progress | None = None
) -> list[PerplexityAtLength]:
    """Return one model's perplexity at each length; each window counts as a document.

    Args:
        on_progress: called with the number of tokens just processed.
    """
    found = []
    for cut in cuts:
        protocol = Perplexity(
            model="",
            protocol="yarn-truncated",
            lengths=(cut.length,),
            batch_tokens=config.batch_tokens,
            num_bootstrap=0,
        )
        found += evaluate_perplexity(model, cut.windows, protocol, on_progress)
    return found


def compare_short(
    own: Sequence[PerplexityAtLength],
    base: Sequence[PerplexityAtLength],
    cuts: Sequence[ShortWindows],
    config: ShortConfig,
) -> list[ShortResult]:
    """Return the change at each length with its paired interval."""
    return [_compare(*rows, config) for rows in zip(own, base, cuts, strict=True)]


def _compare(own: PerplexityAtLength, base: PerplexityAtLength, cut: ShortWindows, config: ShortConfig) -> ShortResult:
    pairs = zip(own.per_document, base.per_document, strict=True)
    differences = np.array([left["nll"] - right["nll"] for left, right in pairs])
    owners = np.array(cut.owners)
    num_documents = len(set(cut.owners))
    by_document = num_documents >= _MIN_DOCUMENTS
    units = owners if by_document else np.arange(len(differences))
    sums, counts = (np.bincount(units, own).astype(np.float64) for own in (differences, np.ones(len(units))))
    interval = bootstrap_mean(sums, counts, num_samples=config.num_bootstrap, seed=config.seed)
    change = math.expm1(float(differences.mean()))
    return ShortResult(
        length=cut.length,
        ppl=own.ppl,
        base_ppl=base.ppl,
        nll=own.nll,
        base_nll=base.nll,
        change=change,
        change_low=math.expm1(interval[0]) if interval else None,
        change_high=math.expm1(interval[1]) if interval else None,
        resampled=("documents" if by_document else "windows") if interval else None,
        passed=change <= config.tolerance,
        num_documents=num_documents,
        num_windows=len(differences),
        num_tokens=own.num_tokens,
    )


def verdict(results: Sequence[ShortResult], tolerance: float) -> str:
    """Return one sentence: where the change is above the tolerance, or that it is nowhere."""
    above = [f"{row.change:+.2%} at {row.length:,}" for row in results if not row.passed]
    if above:
        return f"FAILED: perplexity {', '.join(above)} tokens, above the tolerance of {tolerance:.2%}."
    worst = max(results, key=lambda row: row.change)
    return f"Passed: perplexity {worst.change:+.2%} at most ({worst.length:,} tokens), tolerance {tolerance:.2%}."


def undecided(results: Sequence[ShortResult], tolerance: float) -> list[int]:
    """Return the lengths whose interval holds the tolerance: other documents could turn the verdict."""
    return [
        row.length
        for row in results
        if row.change_low is not None and row.change_high is not None and row.change_low <= tolerance < row.change_high
    ]


def short_record(
    model: dict[str, Any],
    base: dict[str, Any],
    documents: Sequence[Document],
    config: ShortConfig,
    results: Sequence[ShortResult],
) -> dict[str, Any]:
    """Return the JSON record; `model` and `base` are what the two say of themselves."""
    return result_record(
        "short-context",
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
        {
            "source": config.data,
            "split": config.split,
            "sha256": data_hash(documents),
            "num_documents": results[0].num_documents,
            "num_too_short": len(documents) - results[0].num_documents,
            "max_tokens": config.max_tokens,
        },
        base=base,
        passed=all(row.passed for row in results),
        verdict=verdict(results, config.tolerance),
        undecided=undecided(results, config.tolerance),
        bars=[bar_verdict(f"change at {row.length}", config.tolerance, row.change, at_most=True) for row in results],
        results=[asdict(row) for row in results],
    )
