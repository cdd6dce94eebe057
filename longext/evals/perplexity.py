"""Perplexity by length under named protocols.

A protocol says which windows a document is cut into, which tokens of a window are scored and how they are averaged;
scoring is the same for all. Shape legend: B windows in a batch, T tokens of a window, n scored tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from longext.data.documents import Document, documents_facts
from longext.errors import DataError
from longext.evals.base import Advance, Outcome, Work, silent
from longext.evals.statistics import MIN_DOCUMENTS, bootstrap_mean
from longext.manifest import result_record
from longext.models.answer_file import kept_scores
from longext.models.batching import batch_size, batched_by
from longext.models.protocol import LanguageModel
from longext.models.tokens import control_tokens, count_controls
from longext.processes.dealing import deal, workers_of
from longext.untrusted import note

if TYPE_CHECKING:
    from longext.evals.suites.ppl import Perplexity, Window


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids, BOS included where the protocol wants it; `head` stands in front of every window."""

    id: str
    input_ids: tuple[int, ...]
    head: tuple[int, ...] = ()


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


def _note_controls(model: LanguageModel, documents: Sequence[TokenizedDocument], config: Perplexity) -> None:
    """Say how many control tokens the texts spell out; a model scores and reads them as what they mean."""
    controls, begun = control_tokens(model.tokenizer), len(model.prefix)
    number = sum(count_controls(own.input_ids[begun:], controls) for own in documents)
    if number:
        note(
            f"{config.data} spells out {number:,} control tokens (as <s> or <|im_end|>); the model reads them as such."
        )


def tokenize_documents(
    model: LanguageModel, documents: Sequence[Document], config: Perplexity
) -> tuple[list[TokenizedDocument], int]:
    """Tokenise, cut to `max_tokens`, and keep the documents that fill the largest window.

    Every length is then measured on the same documents.

    Returns:
        (documents, how many were too short).

    Raises:
        DataError: no document is long enough.
    """
    protocol = config.rules
    head = tuple(model.prefix) if protocol.repeats_bos else ()
    needed = max(config.lengths) - len(head)
    tokenized = [
        TokenizedDocument(d.id, tuple(model.encode(d.text, add_bos=protocol.adds_bos)[: config.max_tokens]), head)
        for d in documents
    ]
    _note_controls(model, tokenized, config)
    if protocol.concatenates:
        stream = tuple(token for document in tokenized for token in document.input_ids)
        tokenized = [TokenizedDocument("+".join(d.id for d in tokenized), stream)]
        needed += 2 * config.step
    kept = [document for document in tokenized if len(document.input_ids) >= needed]
    if not kept:
        longest = max(len(document.input_ids) for document in tokenized)
        limit = f" (cut to --max-tokens {config.max_tokens})" if config.max_tokens else ""
        raise DataError(
            f"No document of {config.data} has {needed} tokens: the longest has {longest}{limit}. "
            "Give longer documents, or --lengths within that."
        )
    return kept, len(tokenized) - len(kept)


def evaluate_perplexity(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    config: Perplexity,
    advance: Advance = silent,
) -> list[PerplexityAtLength]:
    """Return perplexity at each of `config.lengths` (positional: at each position bucket), shortest first.

    Args:
        advance: called with the number of tokens just processed.
    """
    if config.protocol == "positional":
        return _evaluate_positions(model, documents, config, advance)
    return [_evaluate_length(model, documents, config, length, advance) for length in sorted(config.lengths)]


def num_forward_tokens(documents: Sequence[TokenizedDocument], config: Perplexity) -> int:
    """Return how many tokens an evaluation sends through the model (for progress bars and plans)."""
    return sum(map(len, _forward_texts(documents, config)))


def _forward_texts(documents: Sequence[TokenizedDocument], config: Perplexity) -> list[range]:
    """Return a text of every window's length: what it costs does not depend on its tokens."""
    lengths = [max(config.lengths)] if config.protocol == "positional" else config.lengths
    head = len(documents[0].head)
    return [range(each.length + head) for length in lengths for each in _plan_windows(documents, config, length)]


def _plan_windows(documents: Sequence[TokenizedDocument], config: Perplexity, length: int) -> list[Window]:
    totals = [len(document.input_ids) for document in documents]
    return list(config.rules.windows(totals, length - len(documents[0].head), config.step))


def _score_windows(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    windows: Sequence[Window],
    config: Perplexity,
    advance: Advance,
) -> Iterator[tuple[Window, NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield (window, NLL of its scored tokens float64 [n], whether each was top-1 bool [n]), batching equal windows."""
    size = batch_size(config.batch_tokens, windows[0].length, model.device)
    head = documents[0].head
    texts = [head + documents[each.document].input_ids[each.start : each.start + each.length] for each in windows]
    # nothing is before the first token, to predict it from
    firsts = [max(1, len(head) + window.first) for window in windows]

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        scores = model.score(torch.tensor([texts[number] for number in batch]), firsts[batch[0]])
        pairs = zip(scores.nll.cpu().numpy(), scores.is_top1.cpu().numpy(), strict=True)
        return [{"nll": nll, "is_top1": is_top1} for nll, is_top1 in pairs]

    names, keeper = kept_scores(model, "tokens", list(zip(firsts, texts, strict=True)))
    batches = batched_by(range(len(windows)), size, lambda number: (firsts[number], len(texts[number])))
    lengths = list(map(len, texts))
    rows = deal(
        names, list(batches), answer, keeper=keeper, on_progress=advance, weights=lengths, workers=workers_of(model)
    )
    for window, row in zip(windows, rows, strict=True):
        yield window, row["nll"].astype(np.float64), row["is_top1"]


def _evaluate_length(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    config: Perplexity,
    length: int,
    advance: Advance,
) -> PerplexityAtLength:
    started = time.perf_counter()
    windows = _plan_windows(documents, config, length)
    scored = list(_score_windows(model, documents, windows, config, advance))
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
    config: Perplexity,
    owners: NDArray[np.int64],
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    **known: Any,
) -> PerplexityAtLength:
    """Average window sums as the protocol says, with the bootstrap interval and the per-document values."""
    weighting = config.rules.weighting
    by_document = [(sums[owners == i].sum(), counts[owners == i].sum()) for i in range(len(documents))]
    num_tokens = int(counts.sum())
    if weighting == "window":
        sums, counts = sums / counts, np.ones(len(sums))
    of_documents = [(sums[owners == i].sum(), counts[owners == i].sum()) for i in range(len(documents))]
    document_sums, document_counts = (np.array(column) for column in zip(*of_documents, strict=True))
    resampled: str | None = "documents" if len(documents) >= MIN_DOCUMENTS else "windows"
    units, sizes = (document_sums, document_counts) if resampled == "documents" else (sums, counts)
    if weighting == "document":
        units, sizes, resampled = document_sums / document_counts, np.ones(len(documents)), "documents"
    nll = float(units.sum() / sizes.sum())
    # overlapping windows that score the same tokens again are no sample: no interval for them
    num_samples = 0 if config.rules.concatenates else config.num_bootstrap
    interval = bootstrap_mean(units, sizes, num_samples=num_samples, seed=config.seed)
    low, high = (math.exp(interval[0]), math.exp(interval[1])) if interval else (None, None)
    return PerplexityAtLength(
        ppl=math.exp(nll),
        nll=nll,
        ppl_low=low,
        ppl_high=high,
        resampled=resampled if interval else None,
        num_tokens=num_tokens,
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
    config: Perplexity,
    advance: Advance,
) -> list[PerplexityAtLength]:
    started = time.perf_counter()
    length = max(config.lengths)
    windows = _plan_windows(documents, config, length)
    scored = list(_score_windows(model, documents, windows, config, advance))
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
    config: Perplexity,
    results: Sequence[PerplexityAtLength],
) -> dict[str, Any]:
    """Return the JSON record of a perplexity evaluation."""
    protocol = config.rules
    return result_record(
        "perplexity",
        model.describe(),
        {
            "id": f"ppl/{config.protocol}",
            "definition": protocol.summary,
            "reference": protocol.reference,
            "stride": config.step,
            "weighting": protocol.weighting,
            "bos": protocol.adds_bos,
            "seed": config.seed,
        },
        documents_facts(
            config,
            documents,
            num_documents=len(tokenized),
            num_too_short=num_short,
            num_tokens=sum(len(document.input_ids) for document in tokenized),
        ),
        results=[asdict(result) for result in results],
    )


def measure_perplexity(task: Perplexity, model: LanguageModel, documents: Sequence[Document], work: Work) -> Outcome:
    """Return the record of `eval ppl` under a protocol of windows."""
    tokenized, num_short = tokenize_documents(model, documents, task)
    work.expect(model, _forward_texts(tokenized, task), 0, False)
    with work.progress(f"ppl {task.protocol}", num_forward_tokens(tokenized, task), "tokens") as advance:
        results = evaluate_perplexity(model, tokenized, task, advance)
    by_length = {str(row.length): row.ppl for row in results}
    return Outcome(
        record=perplexity_record(model, documents, tokenized, num_short, task, results),
        score_at=lambda _, length: by_length[str(length)],
        notes=[f"{num_short} document(s) shorter than the largest length were left out."] if num_short else [],
    )
