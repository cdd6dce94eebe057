"""Tiny float64 compressors for the tests: every architecture on a random Llama, nothing left at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor, build_compressor
from longext.compressor.gradients import Sweep, backprop
from longext.compressor.policies import parse_policy
from longext.compressor.reading.readers import Reader
from longext.compressor.reading.trails import CompressorTrail
from longext.compressor.segments import split_segments
from longext.compressor.spec import CompressorSpec
from longext.models.hf import HFLanguageModel, score_hidden

SEGMENT = 16
# name of a case -> (architecture, memory kind): every kind of every architecture there is
VARIANTS = {
    arch if memory == COMPRESSORS[arch].memories[0] else f"{arch}-{memory}": (arch, memory)
    for arch in COMPRESSORS
    for memory in COMPRESSORS[arch].memories
}
INDEPENDENT = [variant for variant, (arch, _) in VARIANTS.items() if not COMPRESSORS[arch].recurrent]


def tiny_llama(dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    """A random three-layer Llama with grouped heads, tied embeddings and 256 positions.

    In float64 its norms are too: transformers' own run in float32 whatever the model is in.
    """
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, "eos_token_id": 2, **keys})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    if dtype == torch.float64:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(parent, name, torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype))
    return model


def make_spec(variant: str, **keys: Any) -> CompressorSpec:
    """The spec of a variant: segments of 16, ratios 4 and 8 where it takes several, a sink and an overlap."""
    arch, memory = VARIANTS.get(variant, (variant, "kv"))  # others are registered by a test
    kind = COMPRESSORS[arch]
    ratios = (4,) if kind.reads_last else (4, 8)
    sink = 0 if kind.trains_reader and memory == "kv" else 1
    values = {"segment": SEGMENT, "ratios": ratios, "sink": sink, "overlap": 3, "rank": 4, "alpha": 8.0}
    return CompressorSpec(arch=arch, memory=memory, **{**values, **keys})


def make_compressor(variant: str, model: Any = None, **keys: Any) -> Compressor:
    """A compressor whose adapters do something already."""
    compressor = build_compressor(Backbone(tiny_llama() if model is None else model), make_spec(variant, **keys))
    compressor = compressor.to(compressor.backbone.dtype)
    for parameter in compressor.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return compressor


def make_document(compressor: Compressor, ids: torch.Tensor, scale: float = 0.01) -> Sweep:
    """A document whose segments take the spec's ratios in turn."""
    ratios = compressor.spec.ratios
    count = -(-ids.shape[1] // compressor.spec.segment)
    return Sweep(
        split_segments(ids, ids, compressor.spec, [ratios[t % len(ratios)] for t in range(count)]), compressor, scale
    )


def random_ids(rows: int, segments: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, without the special ones."""
    return torch.randint(3, 64, (rows, SEGMENT * segments), generator=torch.Generator().manual_seed(seed))


def flat_gradient(compressor: Compressor) -> torch.Tensor:
    """All gradients as one vector; zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in compressor.parameters()])


def gradient_of(compressor: Compressor, document: Sweep, policy: str, seed: int = 0) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of a document under a policy."""
    compressor.zero_grad()
    parsed = parse_policy(policy, compressor.recurrent)
    loss = backprop(document, parsed, np.random.default_rng(seed))
    return float(loss), flat_gradient(compressor).clone()


def compressor_reader(compressor: Compressor, ratio: int = 4) -> Reader:
    """A reader of a compressor of the tests."""
    plain = HFLanguageModel("tiny", compressor.backbone.model, None, {}, Path())
    trail = lambda: CompressorTrail(compressor, ratio)  # noqa: E731
    return Reader(plain, "c", SEGMENT, trail, compressor=compressor, ratio=ratio)


@torch.no_grad()
def document_nll(compressor: Compressor, ids: torch.Tensor, ratio: int) -> torch.Tensor:
    """Per-token NLL of each segment through `Sweep`, as training reads it."""
    segments = split_segments(ids, ids, compressor.spec, [ratio] * (ids.shape[1] // SEGMENT + 1))
    document = Sweep(segments, compressor)
    store = document.new_store()
    for t in range(len(segments) - 1):
        store.put(t, document.write(t, store))
    sums = []
    for t, segment in enumerate(segments):
        first, last = document.schedule.span(t)
        memory = store.view(first, last) if t else ()  # the first segment holds the sink itself
        hidden = compressor.read(segment, memory)
        targets = (
            torch.cat([segment.tokens[:, 1:], segments[t + 1].tokens[:, :1]], 1)
            if t + 1 < len(segments)
            else (segment.tokens[:, 1:])
        )
        sums.append(score_hidden(compressor.backbone.model, hidden[:, : targets.shape[1]], targets).nll)
    return torch.cat(sums, 1)
