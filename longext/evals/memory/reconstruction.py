"""Auto-encoding quality: how much of a segment comes back from its memory (ICAE, arXiv 2307.06945; UIO, 2406.18173).

Shape legend: B segments in a batch, l tokens of a segment, s sink tokens, n segments in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longext.checkpoint.checks import weights_checksum
from longext.compressor.base import Compressor
from longext.compressor.checkpoint import LoadedCompressor, check_base_options, load_compressor, read_description
from longext.compressor.gradients import Sweep
from longext.compressor.memory import Memory
from longext.compressor.reading.decoder import greedy, memory_decoder
from longext.compressor.segments import Segment, reconstruction_segments
from longext.compressor.spec import CompressorSpec, check_ratios
from longext.data.documents import Document, documents_facts, load_documents
from longext.data.json_lines import text_fields
from longext.errors import DataError
from longext.evals.base import Advance, GivenAnswers, Outcome, Work
from longext.evals.retrieval import answer_files
from longext.evals.statistics import bootstrap_mean
from longext.evals.text_metrics import bleu, bleu_counts, bootstrap_corpus_bleu, rouge_l
from longext.manifest import result_record
from longext.models.answer_file import kept_scores
from longext.models.batching import batched_by
from longext.processes.dealing import Keeper, deal
from longext.registry import Registry
from longext.untrusted import is_a

if TYPE_CHECKING:
    from longext.evals.suites.efficiency import Efficiency
    from longext.evals.suites.reconstruction import Reconstruction

_BATCH_TOKENS = {"cpu": 2_048}  # segments decode together: on a CPU few rows already fill it
_BATCH_TOKENS_ACCELERATOR = 32_768
_LOGITS_AT_ONCE = 1_024
_NUM_EXAMPLES = 3
_SCORED = ("hypothesis", "correct", "nll_memory", "nll_none")  # of a segment
# space and line break of byte-level BPE, space of SentencePiece
_WORD_STARTS = ("\u0120", "\u010a", "\u2581", " ", "\n")
Tokens = NDArray[np.int64]
Floats = NDArray[np.float64]
Estimate = dict[str, float | None]  # mean over segments (`bleu`: of the corpus), 95 % interval low, high, median

_DEFINITION = (
    "disjoint segments of l tokens drawn from the documents; the memory of each, then the repeat token and greedy "
    "decoding up to l tokens or EOS; the sink tokens, which stay readable, are given and not scored; BLEU-4 (no "
    "smoothing) and ROUGE-L (F1) over the whitespace words of the decoded text; bits saved = (cross-entropy of the "
    "same reader without the memory - with it) / ln 2, per token, both after the repeat token, teacher-forced"
)


@dataclass(frozen=True)
class Vocabulary:
    """What the content controls need of a tokenizer.

    Attributes:
        plain: ids of all tokens but the special ones.
        begins_word: for every id, whether it starts with a space or a line break.
    """

    plain: Tokens
    begins_word: NDArray[np.bool_]


@dataclass(frozen=True)
class Content:
    """One kind of text to reconstruct.

    Attributes:
        summary: for tables.
        make: (segment int64 [l], vocabulary, rng) -> segment int64 [l].
    """

    summary: str
    make: Callable[[Tokens, Vocabulary, np.random.Generator], Tokens]


CONTENTS: Registry[Content] = Registry("content")


def _shuffled_words(tokens: Tokens, vocabulary: Vocabulary, rng: np.random.Generator) -> Tokens:
    starts = np.flatnonzero(vocabulary.begins_word[tokens])
    parts = [part for part in np.split(tokens, starts) if len(part)]
    return np.concatenate([parts[i] for i in rng.permutation(len(parts))])


CONTENTS.register("text", Content("the segments as they are", lambda tokens, _, __: tokens))
CONTENTS.register("shuffled", Content("the same tokens, their words in random order", _shuffled_words))
CONTENTS.register(
    "random",
    Content(
        "tokens drawn evenly from the vocabulary",
        lambda tokens, vocabulary, rng: rng.choice(vocabulary.plain, len(tokens)),
    ),
)


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Documents, and the compressor that they are for."""

    documents: Sequence[Document]
    spec: CompressorSpec
    ratios: tuple[int, ...]


def read_spec(config: Reconstruction | Efficiency) -> tuple[CompressorSpec, tuple[int, ...]]:
    """Return what a compressor's directory says of it, and the ratios to measure (those of training by default).

    Raises:
        CheckpointError: `model` is no trained compressor.
        ConfigError: a ratio that it cannot make, or options of a plain model.
    """
    description = read_description(Path(config.model).expanduser())
    spec = CompressorSpec.from_json(description["spec"])
    check_base_options(config)
    return spec, check_ratios(config.ratio or spec.ratios, spec, description["window"])


def read_source(config: Reconstruction) -> Source:
    """Return the documents, once the compressor is known to fit what is measured."""
    spec, ratios = read_spec(config)
    return Source(load_documents(config), spec, ratios)


def open_compressor(config: Reconstruction | Efficiency) -> LoadedCompressor:
    """Return the compressor in the directory `model`, with the model it belongs to."""
    return load_compressor(
        config.model, base=config.base, device=config.device, dtype=config.dtype, attention=config.attention
    )


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Return what the controls need; `size` is the number of embeddings."""
    count = min(size, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(count)))
    special = set(tokenizer.all_special_ids)
    return Vocabulary(
        np.array([i for i in range(count) if i not in special], dtype=np.int64),
        np.array([str(name).startswith(_WORD_STARTS) for name in names]),
    )


def draw_segments(documents: Sequence[Sequence[int]], length: int, num_samples: int, seed: int) -> tuple[Tokens, int]:
    """Return (segments int64 [n, l], how many there were to draw from); disjoint, at multiples of `length`.

    Raises:
        DataError: no document has a whole segment.
    """
    places = [(d, start) for d, ids in enumerate(documents) for start in range(0, len(ids) - length + 1, length)]
    if not places:
        longest = max((len(ids) for ids in documents), default=0)
        raise DataError(f"No document has a segment of {length} tokens: the longest has {longest}.")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(places), min(num_samples, len(places)), replace=False)
    rows = [documents[d][start : start + length] for d, start in (places[i] for i in chosen)]
    return np.array(rows, dtype=np.int64), len(places)


# --- one batch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """Of B segments: hypotheses, and per segment sums over its scored tokens, float64 [B]."""

    hypotheses: list[list[int]]
    correct: Floats
    nll_memory: Floats
    nll_none: Floats


@torch.no_grad()
def reconstruct(compressor: Compressor, tokens: torch.Tensor, ratio: int, stop: Sequence[int] = ()) -> list[list[int]]:
    """Return what greedy decoding gives for segments [B, l] from their memories, sink tokens included."""
    query, memory = _encoded(compressor, tokens, ratio)
    return _decode(compressor, query, memory, stop)


def _encoded(compressor: Compressor, tokens: torch.Tensor, ratio: int) -> tuple[Segment, Memory]:
    """Return (the segment that asks for the text, what it reads)."""
    sweep = Sweep(reconstruction_segments(tokens, ratio, compressor.spec.sink), compressor)
    store = sweep.new_store()
    store.put(0, sweep.write(0, store))
    return sweep.segments[1], store.view(0, 1)


def _decode(compressor: Compressor, query: Segment, memory: Memory, stop: Sequence[int]) -> list[list[int]]:
    length, num_given = query.tokens.shape[1], query.sink.shape[1]
    decoder = memory_decoder(compressor, query.sink, memory, query.ratio, room=length)
    made = greedy(decoder, query.tokens[:, : 1 + num_given], length - num_given, stop)
    return [[*start, *rest] for start, rest in zip(query.sink.tolist(), made, strict=True)]


@torch.no_grad()
def _score(compressor: Compressor, tokens: torch.Tensor, ratio: int, stop: Sequence[int]) -> _Scores:
    query, memory = _encoded(compressor, tokens, ratio)
    nothing = compressor.fixed(query.sink)
    with_memory, correct = _token_scores(compressor, compressor.read(query, memory), tokens)
    without, _ = _token_scores(compressor, compressor.read(query, nothing), tokens)
    return _Scores(_decode(compressor, query, memory, stop), correct, with_memory, without)


def _token_scores(compressor: Compressor, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[Floats, Floats]:
    """Return (summed NLL in nats, tokens that are the first choice), float64 [B], of tokens s .. l - 1."""
    first = compressor.spec.sink
    wanted = tokens[:, first:]
    states, labels = hidden[:, first:].flatten(0, 1), wanted.flatten()
    nll, correct = [], []
    for part, targets in zip(states.split(_LOGITS_AT_ONCE), labels.split(_LOGITS_AT_ONCE), strict=True):
        logits = compressor.backbone.logits(part).float()
        correct.append(logits.argmax(-1) == targets)
        nll.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    sums = (torch.cat(values).view(wanted.shape).cpu().double().sum(1).numpy() for values in (nll, correct))
    return next(sums), next(sums)


@torch.no_grad()
def _base_nll(compressor: Compressor, tokens: torch.Tensor, start: int) -> Floats:
    """Return the summed NLL, float64 [B], that the frozen model by itself gives tokens s .. l - 1, `start` in front."""
    shifted = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], 1)
    return _token_scores(compressor, compressor.backbone.run(compressor.backbone.embed(shifted)), tokens)[0]


# --- all of them ------------------------------------------------------------------------------------------------------


def measure_reconstruction(config: Reconstruction, loaded: LoadedCompressor, source: Source, work: Work) -> Outcome:
    """Return the record of `eval reconstruction`: the same segments for every content and ratio."""
    spec, plain = source.spec, loaded.plain
    tokens = [plain.encode(document.text, add_bos=False)[: config.max_tokens] for document in source.documents]
    segments, available = draw_segments(tokens, spec.segment, config.num_samples, config.seed)
    total = len(segments) * len(source.ratios) * len(config.content)
    came_back: list[CameBack] = []
    with work.progress("reconstruction", total, "segments") as advance:
        results = _evaluate(loaded, segments, source.ratios, config, came_back, advance)
    notes = []
    if new := [str(ratio) for ratio in source.ratios if ratio not in spec.ratios]:
        notes.append(f"Ratio {', '.join(new)}: not trained (trained: {', '.join(map(str, spec.ratios))}).")
    if len(segments) < config.num_samples:
        notes.append(f"{config.data} has {available} segments of {spec.segment} tokens: all of them were used.")
    counts = {"num_documents": len(source.documents), "num_segments_available": available}
    facts = documents_facts(config, source.documents, **counts)
    record = _record(config, config.content, results, model=describe_compressor(loaded), data=facts)
    return Outcome(record=record, notes=notes, files=answer_files([each._asdict() for each in came_back]))


def _evaluate(
    loaded: LoadedCompressor,
    segments: Tokens,
    ratios: Sequence[int],
    config: Reconstruction,
    came_back: list[CameBack],
    advance: Advance,
) -> list[dict[str, Any]]:
    """Return one row of the record per content and ratio, for the same segments [n, l], and fill `came_back`."""
    compressor, tokenizer = loaded.compressor, loaded.tokenizer
    vocabulary = vocabulary_of(tokenizer, compressor.backbone.embedding.weight.shape[0])
    # before a text stands BOS, else EOS, else token 0
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    told = (weights_checksum(compressor), compressor.spec.to_json())
    plain, rows = loaded.plain, []
    for name in config.content:
        rng = np.random.default_rng(config.seed)
        made = np.stack([CONTENTS[name].make(row, vocabulary, rng) for row in segments])
        base = np.concatenate([_base_nll(compressor, batch, start) for batch in _batches(made, compressor, config)])
        for ratio in sorted(ratios):
            kept = kept_scores(plain, "reconstruction", [(*told, ratio, row) for row in made.tolist()])
            row, texts = _row(loaded, name, made, base, ratio, config, kept, advance)
            rows.append(row)
            came_back += texts
    return rows


def _batches(segments: Tokens, compressor: Compressor, config: Reconstruction) -> Iterator[torch.Tensor]:
    for batch in batched_by(list(segments), _rows_at_once(segments, compressor, config), len):
        yield torch.from_numpy(np.stack(batch)).to(compressor.backbone.device)


def _rows_at_once(segments: Tokens, compressor: Compressor, config: Reconstruction) -> int:
    budget = config.batch_tokens or _BATCH_TOKENS.get(compressor.backbone.device.type, _BATCH_TOKENS_ACCELERATOR)
    return max(1, int(budget // segments.shape[1]))


def _row(
    loaded: LoadedCompressor,
    content: str,
    segments: Tokens,
    base: Floats,
    ratio: int,
    config: Reconstruction,
    kept: tuple[list[str], Keeper | None],
    advance: Advance,
) -> tuple[dict[str, Any], list[CameBack]]:
    """Return (the row, what came back) of one kind of content at one ratio.

    Its metrics: `bleu`, `sentence_bleu`, `rouge_l`, `exact_prefix` (share of tokens before the first wrong one),
    `exact_match`; teacher-forced `accuracy` (share of tokens that are the first choice), `ce_memory`, `ce_none` (no
    memory), `ce_base` (the model by itself on the text, no repeat token; all in nats) and `bits_saved`.
    """
    started = time.perf_counter()
    compressor, sink = loaded.compressor, loaded.compressor.spec.sink
    ends = sorted(loaded.plain.ending_tokens)

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        tokens = torch.from_numpy(segments[list(batch)]).to(compressor.backbone.device)
        found = _score(compressor, tokens, ratio, ends)
        columns = (found.hypotheses, found.correct, found.nll_memory, found.nll_none)
        return [dict(zip(_SCORED, values, strict=True)) for values in zip(*columns, strict=True)]

    numbers = batched_by(range(len(segments)), _rows_at_once(segments, compressor, config), lambda _: 0)
    names, keeper = kept
    rows = deal(names, list(numbers), answer, keeper=keeper, on_progress=advance)
    decode = loaded.plain.decode
    pairs = [(row["hypothesis"][sink:], own[sink:]) for row, own in zip(rows, segments.tolist(), strict=True)]
    texts = [CameBack(content, ratio, decode(own), decode(made), own, made) for made, own in pairs]
    scored = segments.shape[1] - sink
    with_memory, without, correct = (
        np.array([row[name] for row in rows]) / scored for name in ("nll_memory", "nll_none", "correct")
    )
    per_segment = {
        "accuracy": correct,
        "ce_memory": with_memory,
        "ce_none": without,
        "ce_base": base / scored,
        "bits_saved": (without - with_memory) / np.log(2),
    }
    row = _row_of(texts, config, slots=compressor.slots(ratio), seconds=time.perf_counter() - started)
    row["metrics"] |= {name: _estimate(values, config) for name, values in per_segment.items()}
    return row, texts


# --- texts ------------------------------------------------------------------------------------------------------------


class CameBack(NamedTuple):
    """A segment and what came back of it, a line of answers.jsonl; without tokens no prefix can be compared."""

    content: str
    ratio: int
    expected: str
    answer: str
    expected_tokens: Sequence[int] | None = None
    answer_tokens: Sequence[int] | None = None


def read_line(where: str, row: Any) -> CameBack:
    """Return a line of answers.jsonl.

    Raises:
        DataError: it is none.
    """
    content, expected, answer = text_fields(where, row, ("content", "expected", "answer"), "answer")
    tokens = [row.get(name) for name in ("expected_tokens", "answer_tokens")]
    has_tokens = all(isinstance(ids, list) and all(is_a(each, int) for each in ids) for ids in tokens) and tokens[0]
    if content not in CONTENTS or not is_a(row.get("ratio"), int) or not (has_tokens or tokens == [None, None]):
        raise DataError(
            f"{where} is no answer: 'content' must be of {', '.join(CONTENTS)}, 'ratio' a whole number, "
            "'expected_tokens' and 'answer_tokens' lists of them or both left out."
        )
    return CameBack(content, row["ratio"], expected, answer, *tokens)


def score_given(config: Reconstruction, given: GivenAnswers) -> Outcome:
    """Return the record of answers that are given: what texts and tokens say."""
    groups: dict[tuple[str, int], list[CameBack]] = {}
    for each in given.scores:
        groups.setdefault((each.content, each.ratio), []).append(each)
    rows = [_row_of(own, config) for own in groups.values()]
    contents = list(dict.fromkeys(content for content, _ in groups))
    return Outcome(record=_record(config, contents, rows, **config.given_facts(given)))


def _row_of(
    texts: Sequence[CameBack], config: Reconstruction, slots: int | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Return the row of the record of one content and ratio, with the metrics of its texts."""
    metrics = _text_metrics([(each.answer, each.expected) for each in texts], config)
    pairs = [(each.answer_tokens or (), each.expected_tokens) for each in texts if each.expected_tokens is not None]
    if len(pairs) == len(texts):
        metrics["exact_prefix"] = _estimate(np.array([_same_prefix(*pair) for pair in pairs]), config)
        same = [float(list(answer) == list(expected)) for answer, expected in pairs]
        metrics["exact_match"] = _estimate(np.array(same), config)
    return {
        "content": texts[0].content,
        "ratio": texts[0].ratio,
        "slots": slots,
        "num_segments": len(texts),
        "num_tokens": sum(len(expected) for _, expected in pairs) if len(pairs) == len(texts) else None,
        "metrics": metrics,
        "examples": [{"text": each.expected, "decoded": each.answer} for each in texts[:_NUM_EXAMPLES]],
        "seconds": seconds,
    }


def _same_prefix(hypothesis: Sequence[int], reference: Sequence[int]) -> float:
    """Return the share of tokens before the first difference; a hypothesis may have ended early."""
    same = [a == b for a, b in zip(hypothesis, reference, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(reference)


def _text_metrics(texts: Sequence[tuple[str, str]], config: Reconstruction) -> dict[str, Estimate]:
    pairs = [(hypothesis.split(), reference.split()) for hypothesis, reference in texts]
    counts = np.stack([bleu_counts(*pair) for pair in pairs])
    low, high = bootstrap_corpus_bleu(counts, num_samples=config.num_bootstrap, seed=config.seed) or (None, None)
    sentence = np.array([bleu(segment) for segment in counts])
    return {
        "bleu": {"mean": bleu(counts.sum(0)), "low": low, "high": high, "median": float(np.median(sentence))},
        "sentence_bleu": _estimate(sentence, config),
        "rouge_l": _estimate(np.array([rouge_l(*pair) for pair in pairs]), config),
    }


def _estimate(values: Floats, config: Reconstruction) -> Estimate:
    interval = bootstrap_mean(values, np.ones(len(values)), num_samples=config.num_bootstrap, seed=config.seed)
    low, high = interval or (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high, "median": float(np.median(values))}


# --- the record -------------------------------------------------------------------------------------------------------


def describe_compressor(loaded: LoadedCompressor) -> dict[str, Any]:
    """Return what a result says of a compressor: its base model's entry, its spec and a directory."""
    spec = loaded.compressor.spec
    return {
        **loaded.plain.describe(),
        "compressor": {"directory": str(loaded.directory), **spec.to_json()},
        "num_trained_parameters": sum(p.numel() for p in loaded.compressor.parameters()),
    }


def _record(
    config: Reconstruction, contents: Sequence[str], results: list[dict[str, Any]], **facts: Any
) -> dict[str, Any]:
    return result_record(
        "reconstruction",
        protocol={
            "id": "reconstruction/greedy",
            "definition": _DEFINITION,
            "reference": "auto-encoding of ICAE, arXiv 2307.06945, and UIO-LLMs, arXiv 2406.18173",
            "content": {name: CONTENTS[name].summary for name in contents},
            "num_bootstrap": config.num_bootstrap,
            "seed": config.seed,
        },
        **facts,
        results=results,
    )
