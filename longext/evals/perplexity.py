"""Perplexity by length under named protocols.

A protocol says which windows a document is cut into, which tokens of a window are scored and how they are averaged;
scoring is the same for all. Shape legend: B windows in a batch, T tokens of a window, n scored tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longext.data.documents import Document, data_hash
from longext.errors import ConfigError, DataError
from longext.evals.config import PerplexityConfig
from longext.evals.limits import FAIL_OVER, PERPLEXITY, PlaceBar, place_bars, place_verdicts
from longext.evals.statistics import bootstrap_mean
from longext.models.batching import batch_size, batched_by
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel, result_record
from longext.models.tokens import control_tokens, count_controls
from longext.registry import Registry
from longext.untrusted import note

_MIN_DOCUMENTS_TO_RESAMPLE = 8
Progress = Callable[[int], None]

DEFAULT_STRIDE = 256


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids, BOS included where the protocol wants it."""

    id: str
    input_ids: tuple[int, ...]


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
        concatenates: documents are joined into one stream first.
    """

    summary: str
    reference: str
    windows: Callable[[Sequence[int], int, int], Iterator[Window]]
    weighting: str
    adds_bos: bool = True
    concatenates: bool = False


PERPLEXITY_PROTOCOLS: Registry[PerplexityProtocol] = Registry("protocol")


def _sliding(lengths: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    for document in range(len(lengths)):
        yield Window(document, 0, length, 1)
    for document, total in enumerate(lengths):
        for start in range(stride, total - length + 1, stride):
            yield Window(document, start, length, length - stride)


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


@dataclass(frozen=True, kw_only=True)
class PerplexityAtLength:
    """Perplexity at one window length, or (positional) at one range of positions.

    Attributes:
        length: window length; for positional, the end of the position range.
        start: first scored position of the range (positional), else 0.
        ppl: exp of the mean NLL.
        nll: mean negative log-likelihood, nats per token.
        ppl_low, ppl_high: 95 % bootstrap interval of `ppl`; None where there is nothing to resample.
        resampled: what was resampled for it: "documents" or "windows".
        accuracy: share of scored tokens that were the model's first choice.
        num_tokens, num_windows: how much was scored.
        seconds: wall time of the forward passes (positional: of the one pass that all rows share).
        per_document: id, ppl, nll and tokens of each document.
    """

    length: int
    start: int = 0
    ppl: float
    nll: float
    ppl_low: float | None
    ppl_high: float | None
    resampled: str | None
    accuracy: float
    num_tokens: int
    num_windows: int
    seconds: float
    per_document: list[dict[str, Any]] = field(default_factory=list)


def _note_controls(model: LanguageModel, documents: Sequence[TokenizedDocument], config: PerplexityConfig) -> None:
    """Say how many control tokens the texts spell out; a model scores and reads them as what they mean."""
    plain = getattr(model, "plain", model)
    if not hasattr(plain, "tokenizer"):
        return
    controls, begun = control_tokens(plain.tokenizer), len(model.prefix)
    number = sum(count_controls(own.input_ids[begun:], controls) for own in documents)
    if number:
        note(
            f"{config.data} spells out {number:,} control tokens (as <s> or <|im_end|>); the model reads them as such."
        )


def tokenize_documents(
    model: LanguageModel, documents: Sequence[Document], config: PerplexityConfig
) -> tuple[list[TokenizedDocument], int]:
    """Tokenise, cut to `max_tokens`, and keep the documents that fill the largest window.

    Every length is then measured on the same documents.

    Returns:
        (documents, how many were too short).

    Raises:
        DataError: no document is long enough.
    """
    protocol = PERPLEXITY_PROTOCOLS[config.protocol]
    needed = max(config.lengths)
    tokenized = [
        TokenizedDocument(d.id, tuple(model.encode(d.text, add_bos=protocol.adds_bos)[: config.max_tokens]))
        for d in documents
    ]
    _note_controls(model, tokenized, config)
    if protocol.concatenates:
        stream = tuple(token for document in tokenized for token in document.input_ids)
        tokenized = [TokenizedDocument("+".join(d.id for d in tokenized), stream)]
        needed += 2 * stride_of(config)
    kept = [document for document in tokenized if len(document.input_ids) >= needed]
    if not kept:
        longest = max(len(document.input_ids) for document in tokenized)
        limit = f" (cut to --max-tokens {config.max_tokens})" if config.max_tokens else ""
        raise DataError(
            f"No document of {config.data} has {needed} tokens: the longest has {longest}{limit}. "
            "Give longer documents, or --lengths within that."
        )
    return kept, len(tokenized) - len(kept)


def check_perplexity_config(config: PerplexityConfig) -> None:
    """Raise ConfigError for an unknown protocol or a length, stride or count out of range."""
    PERPLEXITY_PROTOCOLS[config.protocol]
    check_method(config.method, config.factor)
    check_lengths(config.lengths, minimum=2)
    stride = stride_of(config)
    if stride < 1:
        raise ConfigError(f"--stride must be >= 1, got {stride}.")
    if config.protocol == "sliding" and stride >= min(config.lengths):
        raise ConfigError(f"--stride must be below the shortest window {min(config.lengths)}, got {stride}.")
    if config.num_buckets < 1:
        raise ConfigError(f"--num-buckets must be >= 1, got {config.num_buckets}.")


def stride_of(config: PerplexityConfig) -> int:
    """Return how many tokens the window moves: as asked, else 256, or half the shortest sliding window up to 256."""
    if config.stride is not None:
        return config.stride
    shortest = min(config.lengths)
    return shortest // 2 if config.protocol == "sliding" and shortest <= DEFAULT_STRIDE else DEFAULT_STRIDE


def perplexity_bars(config: PerplexityConfig) -> list[PlaceBar]:
    """Return the bars of --fail-over (ConfigError: not LENGTH=PPL, or a length that is not measured)."""
    if config.fail_over and config.protocol == "positional":
        raise ConfigError("--fail-over is for a perplexity at a length, and --protocol positional gives ranges.")
    return place_bars(
        config.fail_over,
        [("", str(length)) for length in sorted(config.lengths)],
        form="LENGTH=PPL",
        scale=PERPLEXITY,
        option=FAIL_OVER,
        has_whole=False,
    )


def perplexity_verdicts(bars: Sequence[PlaceBar], by_length: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return the bars of --fail-over with the perplexity at each length."""
    return place_verdicts(bars, lambda _, length: by_length[int(str(length))], at_most=True)


def check_lengths(lengths: Sequence[int], minimum: int) -> None:
    """Raise ConfigError unless `lengths` has at least one value and all are >= minimum."""
    if not lengths or min(lengths) < minimum or len(set(lengths)) < len(lengths):
        given = ",".join(map(str, lengths))
        raise ConfigError(f"--lengths must be different whole numbers >= {minimum}, for example 512,1024; got {given}.")


def evaluate_perplexity(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    config: PerplexityConfig,
    on_progress: Progress | None = None,
) -> list[PerplexityAtLength]:
    """Return perplexity at each of `config.lengths` (positional: at each position bucket), shortest first.

    Args:
        on_progress: called with the number of tokens just processed.
    """
    if config.protocol == "positional":
        return _evaluate_positions(model, documents, config, on_progress)
    return [_evaluate_length(model, documents, config, length, on_progress) for length in sorted(config.lengths)]


def num_forward_tokens(documents: Sequence[TokenizedDocument], config: PerplexityConfig) -> int:
    """Return how many tokens an evaluation sends through the model (for progress bars and plans)."""
    lengths = [max(config.lengths)] if config.protocol == "positional" else config.lengths
    return sum(window.length for length in lengths for window in _plan_windows(documents, config, length))


def _plan_windows(documents: Sequence[TokenizedDocument], config: PerplexityConfig, length: int) -> list[Window]:
    totals = [len(document.input_ids) for document in documents]
    return list(PERPLEXITY_PROTOCOLS[config.protocol].windows(totals, length, stride_of(config)))


def _score_windows(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    windows: Sequence[Window],
    config: PerplexityConfig,
    on_progress: Progress | None,
) -> Iterator[tuple[Window, NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield (window, NLL of its scored tokens float64 [n], whether each was top-1 bool [n]), batching equal windows."""
    size = batch_size(config.batch_tokens, windows[0].length, model.device)
    for batch in batched_by(windows, size, lambda window: window.first):
        first = batch[0].first
        ids = torch.tensor([documents[w.document].input_ids[w.start : w.start + w.length] for w in batch])
        scores = model.score(ids, first)
        for window, nll, is_top1 in zip(batch, scores.nll.cpu().double().numpy(), scores.is_top1, strict=True):
            yield window, nll, is_top1.cpu().numpy()
        if on_progress:
            on_progress(ids.numel())


def _evaluate_length(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    config: PerplexityConfig,
    length: int,
    on_progress: Progress | None,
) -> PerplexityAtLength:
    started = time.perf_counter()
    windows = _plan_windows(documents, config, length)
    scored = list(_score_windows(model, documents, windows, config, on_progress))
    owners = np.array([window.document for window, _, _ in scored])
    sums = np.array([nll.sum() for _, nll, _ in scored])
    counts = np.array([len(nll) for _, nll, _ in scored], dtype=np.float64)
    return _summarise(
        documents,
        config,
        owners,
        sums,
        counts,
        length=length,
        accuracy=sum(int(top1.sum()) for _, _, top1 in scored) / counts.sum(),
        seconds=time.perf_counter() - started,
    )


def _summarise(
    documents: Sequence[TokenizedDocument],
    config: PerplexityConfig,
    owners: NDArray[np.int64],
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    **known: Any,
) -> PerplexityAtLength:
    """Average window sums as the protocol says, with the bootstrap interval and the per-document values."""
    weighting = PERPLEXITY_PROTOCOLS[config.protocol].weighting
    by_document = [(sums[owners == i].sum(), counts[owners == i].sum()) for i in range(len(documents))]
    document_sums, document_counts = (np.array(column) for column in zip(*by_document, strict=True))
    resampled: str | None = "documents" if len(documents) >= _MIN_DOCUMENTS_TO_RESAMPLE else "windows"
    units, sizes = (document_sums, document_counts) if resampled == "documents" else (sums, counts)
    if weighting == "document":
        units, sizes, resampled = document_sums / document_counts, np.ones(len(documents)), "documents"
    elif weighting == "window":
        units, sizes = sums / counts, np.ones(len(sums))
    nll = float(units.sum() / sizes.sum())
    # overlapping windows that score the same tokens again are no sample: no interval for them
    num_samples = 0 if weighting == "window" else config.num_bootstrap
    interval = bootstrap_mean(units, sizes, num_samples=num_samples, seed=config.seed)
    low, high = (math.exp(interval[0]), math.exp(interval[1])) if interval else (None, None)
    return PerplexityAtLength(
        ppl=math.exp(nll),
        nll=nll,
        ppl_low=low,
        ppl_high=high,
        resampled=resampled if interval else None,
        num_tokens=int(counts.sum()),
        num_windows=len(sums),
        per_document=[
            {"id": document.id, "nll": s / c, "ppl": math.exp(s / c), "num_tokens": int(c)}
            for document, (s, c) in zip(documents, by_document, strict=True)
        ],
        **known,
    )


def bucket_edges(length: int, num_buckets: int) -> list[int]:
    """Return positions 1 = e_0 < e_1 < ... = length that cut a window into `num_buckets` nearly equal ranges."""
    edges = [round(length * i / num_buckets) for i in range(num_buckets + 1)]
    return sorted({max(1, edge) for edge in edges})


def _evaluate_positions(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    config: PerplexityConfig,
    on_progress: Progress | None,
) -> list[PerplexityAtLength]:
    started = time.perf_counter()
    length = max(config.lengths)
    windows = _plan_windows(documents, config, length)
    scored = list(_score_windows(model, documents, windows, config, on_progress))
    seconds = time.perf_counter() - started
    owners = np.array([window.document for window, _, _ in scored])
    nll = np.stack([values for _, values, _ in scored])  # [windows, length - 1], column j is position j + 1
    is_top1 = np.stack([values for _, _, values in scored])
    edges = bucket_edges(length, config.num_buckets)
    return [
        _summarise(
            documents,
            config,
            owners,
            nll[:, start - 1 : end - 1].sum(1),
            np.full(len(nll), float(end - start)),
            start=start,
            length=end,
            accuracy=float(is_top1[:, start - 1 : end - 1].mean()),
            seconds=seconds,
        )
        for start, end in zip(edges, edges[1:], strict=False)
    ]


def perplexity_record(
    model: LanguageModel,
    documents: Sequence[Document],
    tokenized: Sequence[TokenizedDocument],
    num_short: int,
    config: PerplexityConfig,
    results: Sequence[PerplexityAtLength],
) -> dict[str, Any]:
    """Return the JSON record of a perplexity evaluation."""
    protocol = PERPLEXITY_PROTOCOLS[config.protocol]
    return result_record(
        "perplexity",
        model.describe(),
        {
            "id": f"ppl/{config.protocol}",
            "definition": protocol.summary,
            "reference": protocol.reference,
            "stride": stride_of(config),
            "weighting": protocol.weighting,
            "bos": protocol.adds_bos,
            "seed": config.seed,
        },
        {
            "source": config.data,
            "split": config.split,
            "sha256": data_hash(documents),
            "num_documents": len(tokenized),
            "num_too_short": num_short,
            "num_tokens": sum(len(document.input_ids) for document in tokenized),
            "max_tokens": config.max_tokens,
        },
        results=[asdict(result) for result in results],
    )
