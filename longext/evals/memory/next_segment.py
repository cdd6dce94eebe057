"""The protocol `next-segment`: perplexity of the same segments, given more and more context in several ways.

Each document has P places, spread evenly and seeded, each with the most context before it and a segment of l tokens
after it. Scored are tokens 1 .. l-1 of that segment; its first token is left out, because the segment before it
predicts that one. C tokens of context, C a multiple of l, are cut into segments and remembered by the method under
test, and the controls put other things in the same place. Compare UIO-LLMs (arXiv 2406.18173) and AutoCompressors
(arXiv 2305.14788), which report such perplexities without the controls.

Shape legend: R places, l tokens of a segment, n = l - 1 scored tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longext.compressor.base import Compressor
from longext.compressor.reading.readers import Reader
from longext.compressor.schedule import Ratio
from longext.data.documents import Document, documents_facts
from longext.errors import ConfigError, DataError
from longext.evals.base import Outcome, Work
from longext.evals.limits import check_lengths
from longext.evals.memory.controls import (
    FOREIGN,
    MEMORY,
    METHODS,
    CompressorControls,
    Controls,
    ReaderControls,
    Texts,
)
from longext.evals.perplexity import TokenizedDocument
from longext.evals.statistics import bootstrap_mean
from longext.manifest import result_record
from longext.models.answer_file import hash_of, kept_scores, tokens_hash
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel
from longext.processes.dealing import deal

if TYPE_CHECKING:
    from longext.evals.suites.ppl import Perplexity

DEFAULT_LENGTHS = (0, 512, 1024, 2048, 4096)
_SUMMARY = (
    "seeded places spread over each document; tokens 1 .. l-1 of the segment after a place, given the C tokens before "
    "it; the same tokens for every method and C; no BOS; weighted by tokens"
)
_REFERENCE = "longext; compare UIO-LLMs, arXiv 2406.18173, and AutoCompressors, arXiv 2305.14788"
_MIN_DOCUMENTS_TO_RESAMPLE = 8
_Float = NDArray[np.float64]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Place:
    """A segment starts at token `start` of document number `document`."""

    document: int
    start: int


@dataclass(frozen=True, kw_only=True)
class MemoryPerplexity:
    """Perplexity of the next segment by one method at one context length.

    Attributes:
        method: one of `METHODS`.
        length: C, tokens of context.
        num_readable: positions before the segment that `memory` keeps readable of them (sink, slots, overlap).
        ppl: exp of the mean NLL.
        nll: mean negative log-likelihood, nats per token.
        ppl_low, ppl_high: 95 % bootstrap interval of `ppl`; None if there is nothing to resample.
        resampled: what was resampled for the intervals: "documents" or "places".
        nll_first_quarter, nll_last_quarter: of the first and the last l // 4 scored tokens of a segment.
        difference: nll of `memory` minus this nll; None for `memory` itself and if that was not measured.
        difference_low, difference_high: its paired 95 % bootstrap interval.
        accuracy: share of scored tokens that were the first choice.
        num_tokens, num_places: how much was scored.
        seconds: wall time, with the writing of memories in the first method that reads them.
        per_document: number, nll and tokens of each document.
    """

    method: str
    length: int
    num_readable: int
    ppl: float
    nll: float
    ppl_low: float | None
    ppl_high: float | None
    resampled: str | None
    nll_first_quarter: float
    nll_last_quarter: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    accuracy: float
    num_tokens: int
    num_places: int
    seconds: float
    per_document: list[dict[str, Any]] = field(default_factory=list)


class _Scored(NamedTuple):
    """One method at one length: NLL float64 [R, n], share of first choices, wall time."""

    nll: _Float
    accuracy: float
    seconds: float


def choose_places(sizes: Sequence[int], longest: int, segment: int, num_places: int, seed: int) -> list[Place]:
    """Return up to `num_places` places of every document with that many tokens, spread evenly; no segments overlap.

    Each lies at random in its own equal part of the document, with `longest` tokens before it and a segment after it.

    Raises:
        DataError: no document is long enough.
    """
    places = []
    for document, size in enumerate(sizes):
        room = size - longest
        count = min(num_places, room // segment) if room >= segment else 0
        rng = np.random.default_rng([seed, document])
        for i in range(count):
            start, stop = (longest + room * j // count for j in (i, i + 1))
            places.append(Place(document, start + int(rng.integers(0, stop - start - segment + 1))))
    if not places:
        raise DataError(
            f"No document has {longest + segment} tokens, the largest context and a segment: the longest has "
            f"{max(sizes, default=0)}. Give longer documents, or --lengths within that."
        )
    return places


def gather_texts(documents: Sequence[Sequence[int]], places: Sequence[Place], longest: int, segment: int) -> Texts:
    """Return the tokens of all places and who is paired with whom.

    A place's partner is the one of the same number in the next document; in a single document, half of it away.
    """
    contexts = [list(documents[p.document][p.start - longest : p.start]) for p in places]
    segments = [list(documents[p.document][p.start : p.start + segment]) for p in places]
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(places):
        rows.setdefault(place.document, []).append(row)
    order = list(rows)
    if len(order) == 1:
        groups = list(range(len(places)))
        partners = [(row + max(1, len(places) // 2)) % len(places) for row in groups]
    else:
        groups = [place.document for place in places]
        following = {document: rows[order[(i + 1) % len(order)]] for i, document in enumerate(order)}
        number = {row: i for document in order for i, row in enumerate(rows[document])}
        partners = [following[d][number[row] % len(following[d])] for row, d in enumerate(groups)]
    return Texts(
        torch.tensor(contexts, dtype=torch.int64).reshape(len(places), longest),
        torch.tensor(segments, dtype=torch.int64),
        groups,
        partners,
    )


@torch.no_grad()
def evaluate_memory(
    subject: Compressor | Reader,
    documents: Sequence[Sequence[int]],
    lengths: Sequence[int],
    num_places: int = 12,
    seed: int = 0,
    *,
    ratio: Ratio | None = None,
    methods: Sequence[str] = METHODS,
    num_bootstrap: int = 1000,
    on_progress: Progress | None = None,
) -> list[MemoryPerplexity]:
    """Return the perplexity of the next segment for every context length and method, shortest context first.

    Args:
        subject: a compressor (as it is trained, say), or a reader from `load_reader`.
        documents: token ids of each; those without room for the largest context and a segment are left out.
        lengths: of context in tokens, multiples of the segment; 0 for none.
        num_places: in each document.
        ratio: of the memories, or several by distance, for a compressor (default: its first).
        methods: of `METHODS`; a reader without training has no constant prefix.
        on_progress: called with the number of tokens just scored.

    Raises:
        ConfigError: a length, ratio or method that cannot be.
        DataError: no document is long enough, or a control needs a second place and there is none.
    """
    segment = subject.segment if isinstance(subject, Reader) else subject.spec.segment
    check_context_lengths(lengths, segment)
    places = choose_places([len(d) for d in documents], max(lengths), segment, num_places, seed)
    texts = gather_texts(documents, places, max(lengths), segment)
    controls = _controls(subject, ratio, texts)
    chosen = [method for method in methods if method in controls.methods]
    if len(places) < 2 and FOREIGN & set(chosen):
        raise DataError(
            "Controls with another text need two places: give longer or more documents, or more --num-places."
        )
    cells = [(length, method) for length in sorted(lengths) for method in chosen]

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        return [_score(controls, *cells[number]) for number in batch]

    # a length is one batch: its methods share memories
    batches = [[i for i, cell in enumerate(cells) if cell[0] == length] for length in sorted(lengths, reverse=True)]
    names, keeper = _kept(subject, cells, ratio, texts)
    size = texts.segments.shape[0] * (segment - 1)
    rows = iter(deal(names, batches, answer, keeper=keeper, on_progress=on_progress, weights=[size] * len(cells)))
    results = []
    for length in sorted(lengths):
        scored = {method: _scored(next(rows), len(places)) for method in chosen}
        readable = controls.num_readable(length)
        results += [_summarise(method, length, readable, scored, places, num_bootstrap, seed) for method in chosen]
    return results


def _score(controls: Controls, length: int, method: str) -> dict[str, Any]:
    started = time.perf_counter()
    scores = controls.score(method, length)
    nll, accuracy = scores.nll.cpu().numpy(), float(scores.is_top1.float().mean())
    return {"nll": nll.reshape(-1), "accuracy": accuracy, "seconds": time.perf_counter() - started}


def _scored(row: dict[str, Any], num_places: int) -> _Scored:
    return _Scored(row["nll"].reshape(num_places, -1).astype(np.float64), row["accuracy"], row["seconds"])


def _kept(
    subject: Compressor | Reader, cells: Sequence[tuple[int, str]], ratio: Ratio | None, texts: Texts
) -> tuple[list[str], Any]:
    """Return names of the cells, and what keeps them for a reader; what is trained changes, and nothing is kept."""
    if not isinstance(subject, Reader):
        return [str(number) for number in range(len(cells))], None
    read = hash_of(tokens_hash(tokens.reshape(-1).tolist()) for tokens in (texts.contexts, texts.segments))
    return kept_scores(subject, "next segment", [(*cell, str(ratio), read) for cell in cells])


def _controls(subject: Compressor | Reader, ratio: Ratio | None, texts: Texts) -> Controls:
    if isinstance(subject, Reader):
        if subject.compressor is None:
            return ReaderControls(subject, texts)
        ratio = ratio or subject.ratio
        subject = subject.compressor
    return CompressorControls(subject, subject.find_ratio(ratio), texts)


def _summarise(
    method: str,
    length: int,
    readable: int,
    scored: dict[str, _Scored],
    places: Sequence[Place],
    num_bootstrap: int,
    seed: int,
) -> MemoryPerplexity:
    """Average NLLs [R, n]; intervals from whole documents if there are enough of them, else from places."""
    nll = scored[method].nll
    owners = np.array([place.document for place in places])
    documents = list(dict.fromkeys(owners.tolist()))
    resampled = "documents" if len(documents) >= _MIN_DOCUMENTS_TO_RESAMPLE else "places"
    units = owners if resampled == "documents" else np.arange(len(places))
    low, high = _interval(nll, units, num_bootstrap, seed)
    difference = None if method == MEMORY or MEMORY not in scored else scored[MEMORY].nll - nll
    bounds = (None, None) if difference is None else _interval(difference, units, num_bootstrap, seed)
    quarter = max(1, (nll.shape[1] + 1) // 4)
    return MemoryPerplexity(
        method=method,
        length=length,
        num_readable=readable,
        ppl=math.exp(nll.mean()),
        nll=float(nll.mean()),
        ppl_low=None if low is None else math.exp(low),
        ppl_high=None if high is None else math.exp(high),
        resampled=None if low is None else resampled,
        nll_first_quarter=float(nll[:, :quarter].mean()),
        nll_last_quarter=float(nll[:, -quarter:].mean()),
        difference=None if difference is None else float(difference.mean()),
        difference_low=bounds[0],
        difference_high=bounds[1],
        accuracy=scored[method].accuracy,
        num_tokens=nll.size,
        num_places=len(places),
        seconds=scored[method].seconds,
        per_document=[
            {"document": d, "nll": float(nll[owners == d].mean()), "num_tokens": int(nll[owners == d].size)}
            for d in documents
        ],
    )


def _interval(
    values: _Float, units: NDArray[np.int64], num_samples: int, seed: int
) -> tuple[float | None, float | None]:
    """Return the 95 % bootstrap interval of the mean of `values` [R, n], resampling `units` [R] of places."""
    sums = np.array([values[units == unit].sum() for unit in np.unique(units)])
    counts = np.array([values[units == unit].size for unit in np.unique(units)], dtype=np.float64)
    return bootstrap_mean(sums, counts, num_samples=num_samples, seed=seed) or (None, None)


# --- for the command line ---------------------------------------------------------------------------------------------


def check_context_lengths(lengths: Sequence[int], segment: int) -> None:
    """Raise ConfigError unless all lengths are different multiples of a segment of at least two tokens."""
    if segment < 2:
        raise ConfigError(f"--segment must be >= 2 for next-segment, got {segment}: its first token is not scored.")
    check_lengths(lengths, minimum=0)
    if wrong := [length for length in lengths if length % segment]:
        raise ConfigError(
            f"Lengths of context must be multiples of the segment {segment} (0 for none), for example "
            f"0,{segment},{4 * segment}; got {', '.join(map(str, wrong))}."
        )


def check_memory_config(config: Perplexity) -> None:
    """Raise ConfigError for a next-segment evaluation without a memory, or values out of range."""
    if config.memory is None:
        raise ConfigError(f"--protocol {config.protocol} compares ways of remembering: give --memory.")
    check_method(config.method, config.factor)
    check_context_lengths(config.lengths, config.segment)


def default_lengths(segment: int) -> tuple[int, ...]:
    """Return the context lengths of a run that names none, as multiples of the segment."""
    return tuple(sorted({-(-length // segment) * segment for length in DEFAULT_LENGTHS}))


def _tokenize(
    model: LanguageModel, documents: Sequence[Document], config: Perplexity
) -> tuple[list[TokenizedDocument], int]:
    """Return (the documents with room for the largest context and a segment, without BOS; how many had none).

    Raises:
        DataError: none has.
    """
    needed = max(config.lengths) + config.segment
    tokenized = [
        TokenizedDocument(d.id, tuple(model.encode(d.text, add_bos=False)[: config.max_tokens])) for d in documents
    ]
    kept = [document for document in tokenized if len(document.input_ids) >= needed]
    if not kept:
        longest = max(len(document.input_ids) for document in tokenized)
        limit = f" (cut to --max-tokens {config.max_tokens})" if config.max_tokens else ""
        raise DataError(
            f"No document of {config.data} has {needed} tokens, the largest context and a segment: the longest has "
            f"{longest}{limit}. Give longer documents, or --lengths within that."
        )
    return kept, len(tokenized) - len(kept)


def measure_memory(task: Perplexity, reader: Reader, documents: Sequence[Document], work: Work) -> Outcome:
    """Return the record of `eval ppl --memory`: the memory and its controls on the same segments."""
    tokenized, num_short = _tokenize(reader, documents, task)
    texts = [document.input_ids for document in tokenized]
    places = choose_places([len(text) for text in texts], max(task.lengths), task.segment, task.num_places, task.seed)
    methods = (ReaderControls if reader.compressor is None else CompressorControls).methods
    total = len(places) * (task.segment - 1) * len(task.lengths) * len(methods)
    with work.progress(f"ppl {task.protocol}", total, "tokens") as advance:
        results = evaluate_memory(
            reader,
            texts,
            task.lengths,
            task.num_places,
            task.seed,
            num_bootstrap=task.num_bootstrap,
            on_progress=advance,
        )
    record = result_record(
        "memory-perplexity",
        reader.describe(),
        {
            "id": f"ppl/{task.protocol}",
            "definition": _SUMMARY,
            "reference": _REFERENCE,
            "segment": task.segment,
            "num_places": task.num_places,
            "weighting": "token",
            "bos": False,
            "seed": task.seed,
        },
        documents_facts(
            task,
            documents,
            documents=[document.id for document in tokenized],
            num_documents=len(tokenized),
            num_too_short=num_short,
            num_tokens=sum(map(len, texts)),
        ),
        results=[asdict(result) for result in results],
    )
    by_length = {str(row.length): row.ppl for row in results if row.method == MEMORY}
    left_out = f"{num_short} document(s) shorter than the largest context and a segment were left out."
    return Outcome(
        record=record,
        score_at=lambda _, length: by_length[str(length)],
        notes=[left_out] if num_short else [],
    )
