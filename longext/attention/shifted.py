"""Shifted sparse attention (S2-Attn, arXiv 2309.12307) and its relatives, as transformers attention functions.

`register_attention()` makes each variant an `attn_implementation`; `model.set_attn_implementation("s2_attn")` switches
a model to it. No forward is patched, so every family that goes through transformers' attention interface works.

In train mode a variant attends as its name says. In eval mode each of them *is* torch SDPA full attention, bit for bit:
a model trained with S2-Attn is used with full attention (table 6 of the paper: 8.12 against 8.64 perplexity).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from longext.attention.backends import BACKENDS, Job, choose_backend
from longext.attention.chunks import Chunk
from longext.attention.layout import Layout, make_layout
from longext.attention.sequence import SequenceGroup, heads_to_sequence, local_heads, sequence_to_heads
from longext.attention.variant import ATTENTION_VARIANTS, WHOLE, AttentionVariant
from longext.errors import ConfigError

PLAN = "attention_plan"  # the forward keyword that carries an AttentionPlan to every layer
_PROBE = "longext_probe_attn"
_DEFAULT_RATIO = 4  # groups per row if no plan is given: the paper's choice


@dataclass(frozen=True)
class AttentionPlan:
    """What one batch's attention needs; passed to the model's forward as `attention_plan=`.

    Attributes:
        layout: the segments of the whole rows (before sequence parallelism cuts them).
        group_size: G in tokens.
        backend: "auto", "flash", "sdpa" or "eager".
        sequence: the ranks that share each row, or None.
        chunk: the part of each row that this forward pass is over; None for whole rows.
    """

    layout: Layout
    group_size: int
    backend: str = "auto"
    sequence: SequenceGroup | None = None
    chunk: Chunk | None = None


@dataclass(frozen=True)
class LazyMask:
    """What the mask interface returns for our variants: the arguments, turned into what the mode needs.

    In eval mode that is SDPA's own mask, in train mode a default plan (groups of a quarter of the row).

    Attributes:
        is_causal: a token sees all tokens before it but padding: no packed rows by positions, no images both ways.
    """

    arguments: dict[str, Any]
    is_causal: bool = True
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    ndim = 0  # not 2: what is made already, and handed back by `generate`

    def contiguous(self) -> LazyMask:
        """Return itself: `generate` asks this of the masks that it makes before a forward with a static cache."""
        return self

    @property
    def window(self) -> int | None:
        """Tokens that the mask keeps attention to, a sliding window's or a chunk's; None for all."""
        size: int | None = self.arguments.get("local_size")
        return size

    def dense(self) -> torch.Tensor | None:
        """Return the mask that `sdpa` would have got: bool [B, 1, Q, K] or None."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if "dense" not in self._cache:
            self._cache["dense"] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**self.arguments)
        mask: torch.Tensor | None = self._cache["dense"]
        return mask

    def plan(self) -> AttentionPlan:
        """Return the plan for a forward that was given none."""
        if "plan" not in self._cache:
            rows, length = self.arguments["batch_size"], self.arguments["q_length"]
            layout = make_layout(int(rows), int(length), self.arguments.get("attention_mask"))
            self._cache["plan"] = AttentionPlan(layout, max(2, int(length) // _DEFAULT_RATIO))
        plan: AttentionPlan = self._cache["plan"]
        return plan


def lazy_mask(**arguments: Any) -> LazyMask:
    """The mask function of our variants (transformers calls it once per forward): keep the arguments."""
    if isinstance(given := arguments.get("attention_mask"), LazyMask):
        return given
    from transformers.masking_utils import causal_mask_function

    # while torch.compile traces, transformers takes every row for a packed one
    is_causal = arguments.get("mask_function") is causal_mask_function or torch.compiler.is_compiling()
    offset = arguments.get("q_offset", 0)  # of a static cache its own counter, which layers raise before we read it
    own = offset.clone() if isinstance(offset, torch.Tensor) else offset
    return LazyMask({**arguments, "q_offset": own}, is_causal)


def register_attention() -> None:
    """Make every variant known to transformers' attention and mask registries; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in ATTENTION_VARIANTS:
        variant = ATTENTION_VARIANTS[name]
        AttentionInterface.register(variant.implementation, functools.partial(attention_forward, variant))
        AttentionMaskInterface.register(variant.implementation, lazy_mask)


def check_model(model: Any, *, swept: bool = False, shared: bool = False) -> int:
    """Return how many attention calls have no sliding window, which variants leave as it is.

    A forward over two tokens, with an attention function that notes what reaches it and returns zeros, tells.

    Args:
        swept, shared: rows are cut, by a sweep or over processes: tokens may meet in attention alone. What a sweep
            keeps of a layer is found by its number, so that each attends once.

    Raises:
        ConfigError: a layer would not get the plan, and so not attend as it says; attention sinks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    seen: list[bool] = []
    layers: list[int | None] = []
    windows: list[int | None] = []

    def note(module: Any, query: torch.Tensor, *__: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if kwargs.get("s_aux") is not None:
            raise _has_sinks(module)
        seen.append(PLAN in kwargs)
        layers.append(getattr(module, "layer_idx", None))
        windows.append(kwargs.get("sliding_window"))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register(_PROBE, note)
    AttentionMaskInterface.register(_PROBE, lazy_mask)
    text = model.config.get_text_config()
    before, was_training, logits = text._attn_implementation, model.training, None
    try:
        if getattr(model, "_supports_attention_backend", False):
            model.set_attn_implementation(_PROBE)
            # rows that differ in their first token
            ids = torch.tensor([[0, 1], [2, 1]], device=model.device)
            with torch.no_grad():
                logits = model.eval()(ids, use_cache=False, **{PLAN: AttentionPlan(Layout(2, 2), 2)}).logits
    except (AttributeError, TypeError):  # the model wants a mask that is a tensor
        seen.clear()
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
    if logits is None or len(seen) < text.num_hidden_layers or not all(seen):
        raise ConfigError(
            f"{type(model).__name__} does not run its attention through transformers' attention interface, so longext "
            "cannot train it with S2-Attn or packed documents. Llama, Mistral, Qwen, Gemma, Phi-3, GPT-NeoX, OLMo "
            "and most others do."
        )
    if (swept or shared) and _meet_elsewhere(logits.float()):
        raise ConfigError(
            f"{type(model).__name__} mixes tokens outside attention too, so that its rows cannot be cut: leave --sweep "
            "and --sequence-parallel out."
        )
    if swept and (None in layers or len(set(layers)) < len(layers)):
        raise ConfigError(
            f"{type(model).__name__} attends more than once in a layer or does not number its layers, which a sweep "
            "needs to tell them apart: leave --sweep out."
        )
    return windows.count(None)


def _has_sinks(module: torch.nn.Module) -> ConfigError:
    return ConfigError(
        f"{type(module).__name__} has attention sinks (gpt-oss), which training attention does not know: use another "
        "model."
    )


def _meet_elsewhere(logits: torch.Tensor) -> bool:
    """True if, without attention, the last output [2, 2, V] of two rows depends on the token before it."""
    first, last = (logits[0] - logits[1]).abs().amax(-1)
    return bool(last > 1e-3 * first)


def attention_forward(
    variant: AttentionVariant,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks: q [B, H, N, D], k and v [B, K, N, D] -> ([B, N, H, D], None).

    Raises:
        ConfigError: a mask, a cache or an attention kind that training with this variant cannot honour.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if not module.training:
        return _evaluate(module, query, key, value, attention_mask, scale, softcap, sliding_window, kwargs)
    if not isinstance(attention_mask, LazyMask):
        raise ConfigError(f"{variant.implementation} makes its own mask: pass a 2-D attention_mask or none.")
    if kwargs.get("s_aux") is not None:
        raise _has_sinks(module)
    if key.shape[2] != query.shape[2]:
        raise ConfigError(f"{variant.implementation} trains without a KV cache: pass use_cache=False.")
    if PLAN not in kwargs and attention_mask.window is None and not attention_mask.is_causal:
        raise ConfigError(
            f"{variant.implementation} was not told of packed rows (position_ids that begin again) or of another mask: "
            "pass an attention_mask, or one document a row."
        )
    plan: AttentionPlan = kwargs.get(PLAN) or attention_mask.plan()
    window = attention_mask.window
    if sliding_window is None and window is not None and window < plan.layout.length:
        raise ConfigError(
            f"{type(module).__name__} keeps to {window:,} tokens by its mask alone (chunked attention of Llama 4, a "
            f"window of Qwen2-MoE), which training attention does not read: train on rows of at most {window:,} tokens."
        )
    layer = getattr(module, "layer_idx", 0)
    return train_attention(variant, plan, query, key, value, scale, dropout, softcap, sliding_window, layer), None


def train_attention(
    variant: AttentionVariant,
    plan: AttentionPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """Return [B, N, H, D]; with sequence parallelism N is the rank's share on both sides, in a chunk its tokens.

    Args:
        layer: number of the layer, which tells apart what a chunk keeps for later ones.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != value.dtype:  # as autocast does for SDPA; kernels do not
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    num_heads = query.shape[1]
    first, last = 0, num_heads
    if plan.sequence is not None:
        first, last = local_heads(num_heads, plan.sequence)
        query, key, value = sequence_to_heads(query, key, value, plan.sequence)
    # the border of the halves is a global head number: a rank has heads of one half, of the other, or of both
    half = min(max(num_heads // 2, first), last) - first
    if sliding_window is not None:
        cuts = [WHOLE]
    elif variant.lower == variant.upper or half in (0, last - first):
        cuts = [variant.upper if half == 0 else variant.lower]
    else:
        cuts = [variant.lower, variant.upper]
    parts = [(query, key, value)] if len(cuts) == 1 else split_heads(query, key, value, half)
    outputs = []
    for number, (cut, (q, k, v)) in enumerate(zip(cuts, parts, strict=True)):
        columns = None
        if plan.chunk is not None:
            place = (layer, number)
            (k, v), columns = plan.chunk.recall((k, v), place, plan.layout, cut, plan.group_size, sliding_window)
        job = Job(plan.layout, cut, plan.group_size, scale, dropout, softcap, sliding_window, columns)
        first_head = half if number else 0
        k, v = (_aligned(x, q.shape[1], first_head, query.shape[1], key.shape[1]) for x in (k, v))
        outputs.append(BACKENDS[choose_backend(plan.backend, q, job)](q, k, v, job))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return out if plan.sequence is None else heads_to_sequence(out, plan.sequence)


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def split_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, half: int) -> tuple[Heads, Heads]:
    """Split the query heads at `half`, each part with the key-value heads it uses: one that both use is in both."""
    repeats = query.shape[1] // key.shape[1]
    upper, lower = half // repeats, -(-half // repeats)  # the upper part's first head, the end of the lower part's
    return (
        (query[:, :half], key[:, :lower], value[:, :lower]),
        (query[:, half:], key[:, upper:], value[:, upper:]),
    )


def _aligned(x: torch.Tensor, num_queries: int, first: int, num_heads: int, num_kv: int) -> torch.Tensor:
    """Return keys or values of a part of the heads such that each serves equally many of its query heads, in order.

    Args:
        num_queries, first: query heads of the part, and the number of its first one among `num_heads`.
        num_kv: key-value heads of all `num_heads`.
    """
    repeats = num_heads // num_kv
    if x.shape[1] == 1 or (first % repeats == 0 and num_queries == x.shape[1] * repeats):
        return x
    heads = torch.arange(first, first + num_queries, device=x.device) // repeats
    return x.index_select(1, heads - first // repeats)


def _evaluate(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Full attention by transformers' own SDPA function (its numbers, its mask)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is not None:
        raise ConfigError("This model caps attention scores: switch it to attn_implementation='eager' to evaluate it.")
    mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
    kwargs.pop(PLAN, None)
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, scaling=scale, sliding_window=sliding_window, **kwargs
    )
    return out, None
