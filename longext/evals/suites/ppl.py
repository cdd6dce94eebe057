"""Perplexity by length under a named protocol.

Example: longext eval ppl books-5m --method yarn --factor 8 --data sample --lengths 512,1024,2048,4096

With a memory: longext eval ppl --memory out/uio@8 --data books/ --lengths 0,1024,4096
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError
from longext.evals.base import Eval, Outcome, ReadingConfig, Work, register
from longext.evals.limits import FAIL_OVER, PlaceLimit, check_lengths, perplexity_limits
from longext.evals.views import ONE, SCORED, SEVERAL, TOKENIZER, TOKENS, Detail, Lines, Score, Section
from longext.models.methods import check_method
from longext.options import DataConfig
from longext.registry import Registry
from longext.settings import LENGTH, MANY, option

if TYPE_CHECKING:
    from longext.data.documents import Document

DEFAULT_STRIDE = 256
NEXT_SEGMENT = "next-segment"  # the protocol that compares memories; it has no windows
DEFAULT_LENGTHS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Window:
    """Tokens start .. start + length of a document, of which `first` .. length are scored (offsets in the window)."""

    document: int
    start: int
    length: int
    first: int


@dataclass(frozen=True)
class PerplexityProtocol:
    """One named way of computing perplexity.

    Attributes:
        summary: the definition, as printed in reports.
        reference: where it comes from.
        windows: (document lengths, window length, stride) -> windows.
        weighting: "token" (sum of NLL / tokens), "document" (mean of document means) or "window" (mean of windows).
        adds_bos: BOS at the start of each document.
        concatenates: documents are joined into one stream first, whose windows score tokens several times.
        repeats_bos: BOS at the start of each window instead, within its length.
    """

    summary: str
    reference: str
    windows: Callable[[Sequence[int], int, int], Iterator[Window]]
    weighting: str
    adds_bos: bool = True
    concatenates: bool = False
    repeats_bos: bool = False


PERPLEXITY_PROTOCOLS: Registry[PerplexityProtocol] = Registry("protocol")


def _sliding(lengths: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    for document in range(len(lengths)):
        yield Window(document, 0, length, 1)
    for document, total in enumerate(lengths):
        for start in range(stride, total - length + 1, stride):
            yield Window(document, start, length, length - stride)


def _yarn_sliding(lengths: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    for document, total in enumerate(lengths):
        done = 0
        for start in range(0, total, stride):
            end = min(start + length, total)
            yield Window(document, start, end - start, done - start)
            done = end
            if end == total:
                break


def _truncated(lengths: Sequence[int], length: int, _: int) -> Iterator[Window]:
    for document in range(len(lengths)):
        yield Window(document, 0, length, 1)


def _longlora(lengths: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    # the reference stops before the last start and then drops one more window
    for start in list(range(0, lengths[0] - length, stride))[:-1]:
        yield Window(0, start, length, 1)


def _positional(lengths: Sequence[int], length: int, _: int) -> Iterator[Window]:
    for document, total in enumerate(lengths):
        for start in range(0, total - length + 1, length):
            yield Window(document, start, length, 1)


PERPLEXITY_PROTOCOLS.register(
    "sliding",
    PerplexityProtocol(
        "window L advanced by the stride; all tokens of the first window, then only the new ones; weighted by tokens",
        "Press et al., arXiv 2108.12409, appendix B; PoSE, arXiv 2309.10400",
        _sliding,
        "token",
    ),
)
PERPLEXITY_PROTOCOLS.register(
    "yarn-truncated",
    PerplexityProtocol(
        "one window per document: BOS and its first L - 1 tokens, all scored; mean over documents; no stride",
        "YaRN eval/perplexity.py --truncate (the proof-pile tables of arXiv 2309.00071)",
        _truncated,
        "document",
    ),
)
PERPLEXITY_PROTOCOLS.register(
    "yarn-sliding",
    PerplexityProtocol(
        "window L, BOS in front of each, advanced by the stride to the end of the document (the last is shorter); all "
        "tokens of the first window, then the new ones; mean over the means of all windows, not weighted by tokens",
        "YaRN eval/perplexity.py without --truncate (GovReport in arXiv 2309.00071)",
        _yarn_sliding,
        "window",
        adds_bos=False,
        repeats_bos=True,
    ),
)
PERPLEXITY_PROTOCOLS.register(
    "longlora",
    PerplexityProtocol(
        "documents joined without BOS; windows L start every stride tokens, the last dropped; every token of every "
        "window scored; mean over windows",
        "LongLoRA eval.py (arXiv 2309.12307)",
        _longlora,
        "window",
        adds_bos=False,
        concatenates=True,
    ),
)
PERPLEXITY_PROTOCOLS.register(
    "positional",
    PerplexityProtocol(
        "disjoint windows of the largest length, one pass each; NLL by position in the window; weighted by tokens",
        "longext; compare Xiong et al., arXiv 2309.16039, figure 1",
        _positional,
        "token",
    ),
)


def _positions(score: Score) -> str:
    return f"{score.field('start'):,}-{score.field('length'):,}"


def _windows(record: Mapping[str, Any]) -> dict[str, Any]:
    rows = record["results"]
    return {"window": max(row["length"] for row in rows), "buckets": len(rows)}


def _longest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The longest context decides from where segments are taken, at every length."""
    return {"longest context": max(row["length"] for row in record["results"])}


@register("ppl")
@dataclass(frozen=True, kw_only=True)
class Perplexity(ReadingConfig, DataConfig, Eval):
    """Perplexity by context length."""

    kind: ClassVar[str] = "perplexity"
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="perplexity",
            title="Perplexity",
            picture="ppl",
            must_agree=TOKENIZER,
            views=(
                Lines(
                    "Perplexity by context length",
                    of="results.ppl",
                    unit="perplexity",
                    lower_is_better=True,
                    axis=TOKENS,
                    value="ppl",
                    details=(Detail("NLL", "nll", "{:.4f}"), Detail("top-1", "accuracy", "{:.1%}"), SCORED),
                ),
            ),
        ),
        Section(
            name="positions",
            title="Loss by position",
            kind="perplexity",
            protocol="ppl/positional",
            picture="ppl",
            must_agree=TOKENIZER,
            measured=_windows,
            views=(
                Lines(
                    "NLL by position in the window, nats per token",
                    of="results.nll",
                    unit="nats",
                    lower_is_better=True,
                    columns=_positions,
                    heading="positions",
                    axis="position in the window (tokens)",
                    steps=True,
                    value="NLL",
                    details=(Detail("ppl", "ppl", "{:.2f}"), Detail("top-1", "accuracy", "{:.1%}"), SCORED),
                ),
            ),
        ),
        Section(
            name="memory-perplexity",
            title="Perplexity with a memory",
            picture="ppl",
            must_agree=TOKENIZER,
            measured=_longest,
            views=(
                Lines(
                    "Perplexity of the next segment by context",
                    of="results.ppl",
                    unit="perplexity",
                    lower_is_better=True,
                    axis="context before the segment (tokens)",
                    where={"method": "memory"},
                    table=SEVERAL,
                    picture=SEVERAL,
                ),
                Lines(
                    "Perplexity of the next segment by context",
                    of="results.ppl",
                    name="methods",
                    unit="perplexity",
                    lower_is_better=True,
                    variant="method",
                    heading="context",
                    axis="context before the segment (tokens)",
                    table=ONE,
                    picture=ONE,
                    value="ppl",
                    details=(
                        Detail("first quarter", "nll_first_quarter", "{:.3f}"),
                        Detail("last quarter", "nll_last_quarter", "{:.3f}"),
                        Detail("positions", "num_readable", "{:,}"),
                    ),
                    note="quarters of the segment: NLL, nats per token; positions: before the segment, that the "
                    "memory reads",
                ),
                Lines(
                    "NLL of the memory minus that of its own controls, nats (below 0: the memory is better)",
                    of="results.difference",
                    name="controls",
                    unit="signed",
                    lower_is_better=None,
                    panel="method",
                    panel_name="control",
                    axis="context before the segment (tokens)",
                ),
            ),
        ),
    )
    limit_option: ClassVar[str] = FAIL_OVER
    limits_are_most: ClassVar[bool] = True
    memory_defaults: ClassVar[Mapping[str, Any]] = {"protocol": NEXT_SEGMENT, "lengths": ()}

    lengths: tuple[int, ...] = option(DEFAULT_LENGTHS, "Context lengths in tokens, comma-separated.", le=LENGTH)
    protocol: str = option(
        "sliding",
        f"{NEXT_SEGMENT} is the default with --memory. One of",
        names=lambda: [*PERPLEXITY_PROTOCOLS, NEXT_SEGMENT],
    )
    stride: int | None = option(
        None, "Tokens the window moves (sliding, yarn-sliding, longlora; default: 256, at most half of a short window)."
    )
    num_buckets: int = option(16, "Position buckets (positional).", ge=1, le=MANY)
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)
    num_places: int = option(12, "Places in each document (next-segment).", ge=1, le=MANY)
    fail_over: tuple[str, ...] = option(
        (), "LENGTH=PPL: exit with 1 if the perplexity is above it; may be repeated.", repeats=True, panel="Output"
    )

    @property
    def label(self) -> str:
        """Return the name of the results directory."""
        return f"ppl-{self.protocol}"

    @property
    def rules(self) -> PerplexityProtocol:
        """Return the protocol that was chosen, one of windows."""
        return PERPLEXITY_PROTOCOLS[self.protocol]

    @property
    def step(self) -> int:
        """Return the tokens the window moves: --stride, else 256, or half the shortest sliding window up to 256."""
        if self.stride is not None:
            return self.stride
        shortest = min(self.lengths)
        return shortest // 2 if self.slides and shortest <= DEFAULT_STRIDE else DEFAULT_STRIDE

    @property
    def slides(self) -> bool:
        """True if windows overlap and each scores the tokens that the one before has not."""
        return self.protocol in ("sliding", "yarn-sliding")

    def check(self) -> None:
        """Raise ConfigError for an unknown protocol, or a length or stride out of range."""
        check_method(self.method, self.factor)
        if self.protocol == NEXT_SEGMENT:
            from longext.evals.memory.next_segment import check_memory_config

            check_memory_config(self.resolved())
            return
        PERPLEXITY_PROTOCOLS[self.protocol]
        task = self.resolved()
        check_lengths(task.lengths, minimum=2)
        if task.step < 1:
            raise ConfigError(f"--stride must be >= 1, got {task.step}.")
        if task.slides and task.step >= min(task.lengths):
            raise ConfigError(f"--stride must be below the shortest window {min(task.lengths)}, got {task.step}.")

    def resolved(self) -> Perplexity:
        """Return it with the lengths that it names, or those of its protocol."""
        if self.lengths:
            return self
        if self.protocol != NEXT_SEGMENT:
            return dataclasses.replace(self, lengths=DEFAULT_LENGTHS)
        from longext.evals.memory.next_segment import default_lengths

        return dataclasses.replace(self, lengths=default_lengths(self.segment))

    def load_data(self) -> list[Document]:
        """Return the documents."""
        from longext.data.documents import load_documents

        return load_documents(self)

    def limits(self, data: Any) -> list[PlaceLimit]:
        """Return the limits of --fail-over (ConfigError: not LENGTH=PPL, or a length that is not measured)."""
        if self.fail_over and self.protocol == "positional":
            raise ConfigError("--fail-over is for a perplexity at a length, and --protocol positional gives ranges.")
        return perplexity_limits(self.fail_over, self.resolved().lengths)

    def measure(self, model: Any, data: list[Document], work: Work) -> Outcome:
        """Return the record, of the protocol that was chosen."""
        task = self.resolved()
        if task.protocol == NEXT_SEGMENT:
            from longext.evals.memory.next_segment import measure_memory

            return measure_memory(task, model, data, work)
        from longext.evals.perplexity import measure_perplexity

        return measure_perplexity(task, model, data, work)
