"""What is measured while a model trains: perplexity by length, or the next segment read with memory and its controls.

A training run takes one of these as its `measure`: called with the loaded run it returns measure(step) -> the keys of a
line of metrics, or None if no `eval_data` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longext.checkpoint.checks import check_ids, embedding_rows
from longext.compressor.config import CompressConfig
from longext.compressor.train import CompressRun
from longext.data.documents import load_documents
from longext.errors import DataError
from longext.evals.memory.controls import MEMORY, NO_MEMORY, SAME_KV, WRONG
from longext.evals.memory.next_segment import choose_places, evaluate_memory
from longext.evals.perplexity import evaluate_perplexity, tokenize_documents
from longext.evals.suites.ppl import Perplexity
from longext.models.hf import HFLanguageModel
from longext.options import DataConfig
from longext.processes.group import is_main_process, main_process_first
from longext.training.callbacks import Measure
from longext.training.config import FinetuneConfig
from longext.training.loading import Extension, full_attention
from longext.training.longlora import FinetuneRun

_METHODS = (MEMORY, NO_MEMORY, WRONG, SAME_KV)
_NUM_PLACES = 6  # in each document
_SEGMENTS = (1, 4, 12)  # of context, if no lengths are asked for


def _source(config: FinetuneConfig | CompressConfig, max_tokens: int | None = None) -> DataConfig:
    return DataConfig(
        data=str(config.eval_data),
        text_field=config.text_field,
        split=config.eval_split,
        max_documents=config.eval_documents,
        max_tokens=max_tokens,
    )


def make_perplexity_measure(run: FinetuneRun) -> Measure | None:
    """Return the measurement of `finetune`: perplexity by length under full attention, in eval mode."""
    config, extension = run.plan.config, run.plan.extension
    if config.eval_data is None:
        return None
    lengths = config.eval_lengths or default_lengths(extension)
    source = _source(config, max(lengths))
    request = Perplexity(
        model=config.model,
        **vars(source),
        lengths=lengths,
        # enough windows for a mean, not hundreds of long ones
        stride=max(1, min(max(min(lengths) // 2, max(lengths) // 16), min(lengths) - 1)),
        num_bootstrap=0,
    )
    scorer = HFLanguageModel(config.model, run.base, run.tokenizer, extension.config, extension.source)
    documents, _ = tokenize_documents(scorer, load_documents(source), request)

    def measure(step: int) -> dict[str, Any]:
        with full_attention(run.base, run.device, run.autocast):
            attention = str(scorer.describe()["attention"])
            results = evaluate_perplexity(scorer, documents, request)
        return {"perplexity": {result.length: result.ppl for result in results}, "attention": attention}

    return measure


def default_lengths(extension: Extension) -> tuple[int, ...]:
    """Return the trained length, its doublings below the target, and the target."""
    length, target = extension.trained_length, extension.target_length
    lengths = {target}
    while length < target:
        lengths.add(length)
        length *= 2
    return tuple(sorted(lengths))


def make_memory_measure(run: CompressRun) -> Measure | None:
    """Return the measurement of `compress-train`, which the main process makes: the next segment, with controls.

    Raises:
        DataError: the documents have no room for the largest context and a segment after it, twice.
    """
    config, compressor = run.plan.config, run.model
    if config.eval_data is None:
        return None
    segment, most = config.segment, max(run.plan.row_length, config.segment + 1)
    lengths = config.eval_lengths or tuple(segment * count for count in _SEGMENTS if segment * count < most)
    documents = load_documents(_source(config))
    texts = [run.tokenizer(d.text, add_special_tokens=False, verbose=False).input_ids for d in documents]
    _check_room(texts, max(lengths), config)
    for text in texts:
        check_ids(text, embedding_rows(compressor.backbone.model), run.tokenizer, str(config.eval_data))

    def measure(step: int) -> dict[str, Any] | None:
        with main_process_first():  # the others measure nothing
            if not is_main_process():
                return None
            with compressor.backbone.without_checkpointing():
                results = evaluate_memory(
                    compressor,
                    texts,
                    lengths,
                    _NUM_PLACES,
                    config.seed,
                    ratio=config.ratio if config.fading else None,
                    methods=_METHODS,
                    num_bootstrap=0,
                )
        controls = {name: {str(r.length): r.ppl for r in results if r.method == name} for name in _METHODS[1:]}
        return {"perplexity": {r.length: r.ppl for r in results if r.method == MEMORY}, "controls": controls}

    return measure


def _check_room(texts: Sequence[Sequence[int]], context: int, config: CompressConfig) -> None:
    sizes, segment = [len(text) for text in texts], config.segment
    if max(sizes) < context + segment:
        raise DataError(
            f"No document of --eval-data {config.eval_data} has {context + segment} tokens, the largest context and a "
            f"segment: the longest has {max(sizes)}. Give longer documents, or --eval-lengths within that."
        )
    if len(choose_places(sizes, context, segment, _NUM_PLACES, config.seed)) < 2:
        raise DataError(
            f"--eval-data {config.eval_data} has room for one context of {context} tokens and a segment, and the "
            "wrong-document control needs another: give longer or more documents, or shorter --eval-lengths."
        )
