"""What `compress-train --eval-data` measures while it trains: the next segment with memory, and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longext.compressor.base import Compressor
from longext.compressor.config import CompressConfig
from longext.compressor.spec import CompressorSpec
from longext.data.documents import load_documents
from longext.errors import DataError
from longext.evals.memory.controls import MEMORY, NO_MEMORY, SAME_KV, WRONG
from longext.evals.memory.next_segment import choose_places, evaluate_memory
from longext.options import DataConfig

_METHODS = (MEMORY, NO_MEMORY, WRONG, SAME_KV)
_NUM_PLACES = 6  # in each document
_SEGMENTS = (1, 4, 12)  # of context, where no lengths are asked for


@dataclass(frozen=True)
class Evaluation:
    """Held-out documents, the lengths of context to measure at, and the seed of the places in them.

    Attributes:
        texts: token ids of each document.
        lengths: of context in tokens, multiples of the segment.
        seed: of the places.
    """

    texts: Sequence[Sequence[int]]
    lengths: tuple[int, ...]
    seed: int

    def measure(self, compressor: Compressor) -> tuple[dict[int, float], dict[str, dict[str, float]]]:
        """Return (perplexity with memory by length, that of each control by name and length)."""
        with compressor.backbone.without_checkpointing():
            results = evaluate_memory(
                compressor, self.texts, self.lengths, _NUM_PLACES, self.seed, methods=_METHODS, num_bootstrap=0
            )
        controls = {name: {str(r.length): r.ppl for r in results if r.method == name} for name in _METHODS[1:]}
        return {r.length: r.ppl for r in results if r.method == MEMORY}, controls


def load_evaluation(config: CompressConfig, spec: CompressorSpec, row_length: int, tokenizer: Any) -> Evaluation | None:
    """Return what a run measures, None where no data was given for it.

    Args:
        row_length: tokens of a training document.

    Raises:
        DataError: the documents have no room for the largest context and a segment after it, twice.
    """
    if config.eval_data is None:
        return None
    segment = spec.segment
    lengths = config.eval_lengths or tuple(
        segment * count for count in _SEGMENTS if segment * count < max(row_length, segment + 1)
    )
    source = DataConfig(
        data=config.eval_data,
        text_field=config.text_field,
        split=config.eval_split,
        max_documents=config.eval_documents,
    )
    texts = [tokenizer(d.text, add_special_tokens=False, verbose=False).input_ids for d in load_documents(source)]
    sizes, needed = [len(text) for text in texts], max(lengths) + segment
    if max(sizes) < needed:
        raise DataError(
            f"No document of --eval-data {config.eval_data} has {needed} tokens, the largest context and a segment: "
            f"the longest has {max(sizes)}. Give longer documents, or --eval-lengths within that."
        )
    if len(choose_places(sizes, max(lengths), segment, _NUM_PLACES, config.seed)) < 2:
        raise DataError(
            f"--eval-data {config.eval_data} has room for one context of {max(lengths)} tokens and a segment, and the "
            "wrong-document control needs another: give longer or more documents, or shorter --eval-lengths."
        )
    return Evaluation(texts, lengths, config.seed)
