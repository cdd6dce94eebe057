"""A KV cache that keeps a budget of keys by a policy, while a text is read in chunks; for any policy and family.

The model attends through transformers' attention interface, so queries and keys arrive as each family makes them. A
layer is evicted as soon as it has attended: what is held at any time is the budget of every layer, and one chunk.

Positions are relative to the cache: held keys stand right before the tokens that are read, in their order. They are
kept unrotated and turned where they are read, so each is rounded twice, however often it moves.

Shape legend: B texts, H KV heads, G query heads of each, n keys held, c tokens of a chunk, d head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from longext.compressor.backbone import Backbone
from longext.compressor.reading.budgets import Budget
from longext.compressor.reading.decoder import CachedDecoder, RoomyLayer
from longext.compressor.reading.seen import KVPolicy, Seen, wide
from longext.compressor.reading.trails import Trail

_NAME = "longext_kv_attn"
_READING: ContextVar[PolicyTrail] = ContextVar("reading")
QUESTION = 64  # tokens of the prompt's end that stand for a question


class HeldLayer(RoomyLayer):
    """Keys and values of one layer: those held, [B, H, n, d], then those of the chunk as they come.

    Attributes:
        held: (keys unrotated, values).
        bias: [B, H, n] of the held keys, or None.
        origins: int32 [B, H, n], numbers of their tokens; -1 where a head holds fewer than others.
        kept, notes: see `Seen`.
    """

    def __init__(self, trail: PolicyTrail, number: int, room: int) -> None:
        super().__init__(room)
        self._trail, self.number = trail, number
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.bias: torch.Tensor | None = None
        self.origins: torch.Tensor | None = None
        self.kept: dict[str, torch.Tensor] = {}
        self.notes: dict[str, torch.Tensor] = {}

    @property
    def num_held(self) -> int:
        """Slots of a head."""
        return 0 if self.held is None else self.held[0].shape[-2]

    def get_seq_length(self) -> int:
        """Return the positions so far, the same for all layers."""
        return self._trail.start + self.filled

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of the chunk; return those held, turned to their positions, and the chunk's."""
        super().update(keys, values)
        return self.states()

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are read."""
        if self.held is None:
            return self.keys, self.values
        places = torch.arange(self._trail.start - self.num_held, self._trail.start)
        return torch.cat([self.turn(self.held[0], places), self.keys], -2), torch.cat([self.held[1], self.values], -2)

    def turn(self, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Return keys [..., m, d] turned by int64 [m] positions."""
        return self._trail.backbone.turn(keys, by, self.number)

    def forget_chunk(self) -> None:
        """Drop the states of the chunk, and their buffers."""
        self._buffers, self.is_initialized = [], False
        self.keys = self.values = None  # type: ignore[assignment]

    def evict(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float = 1.0, cap: Any = None
    ) -> None:
        """Keep of what is held and the chunk what the policy chooses (`query` as the attention function got it)."""
        trail, policy = self._trail, self._trail.policy
        rows, heads = key.shape[:2]
        total = key.shape[-2] - trail.num_probes
        first = trail.num_read - (total - self.num_held)
        origins = torch.arange(first, trail.num_read, dtype=torch.int32, device=key.device)
        origins = origins.expand(rows, heads, -1)
        origins = origins if self.origins is None else torch.cat([self.origins, origins], -1)
        budget = trail.budget.of_layer(self.number, trail.num_read)
        bias = None if self.bias is None else F.pad(self.bias, (0, key.shape[-2] - self.num_held))
        seen = Seen(
            keys=key, values=value, queries=query.unflatten(1, (heads, -1)), bias=bias, scale=scale, cap=cap,
            turn=self.turn, budget=budget, window=trail.backbone.window, num_probes=trail.num_probes, origins=origins,
            num_read=trail.num_read, first=trail.start - self.num_held, notes=self.notes,
            kept={name: F.pad(one, (0, total - self.num_held)) for name, one in self.kept.items()},
        )  # fmt: skip
        scores = policy.score(seen).masked_fill(origins < 0, -torch.inf)
        always = (origins < policy.num_first()) | (origins >= trail.num_read - policy.num_last(budget))
        index, there = trail.budget.choose(scores.masked_fill(always & (origins >= 0), torch.inf), budget)
        values, fitted = policy.fit(seen, index, there) if total > budget else (None, None)
        self._keep(seen, index, there, values, fitted)

    def _keep(
        self, seen: Seen, index: torch.Tensor, there: torch.Tensor, values: torch.Tensor | None, fitted: Any
    ) -> None:
        start, count = self._trail.start, seen.num_keys - self.num_held
        fresh = self.turn(self.keys[..., :count, :], -torch.arange(start, start + count))
        fresh = fresh if self.held is None else torch.cat([self.held[0], fresh], -2)
        rows = index[..., None].expand(*index.shape, fresh.shape[-1])
        if values is None:
            of_values = index[..., None].expand(*index.shape, seen.values.shape[-1])
            values = seen.values.gather(-2, of_values)
        self.held = fresh.gather(-2, rows), values.to(seen.values.dtype)
        bias = fitted if fitted is not None else (None if seen.bias is None else seen.bias.gather(-1, index))
        if bias is not None or not bool(there.all()):
            bias = wide(self.held[0]).new_zeros(index.shape) if bias is None else bias
            bias = bias.masked_fill(~there, -torch.inf)
        self.bias = bias
        self.origins = seen.origins.gather(-1, index).masked_fill(~there, -1)
        self.kept = {name: one.gather(-1, index) for name, one in seen.kept.items()}
        self.forget_chunk()


class PolicyTrail(Trail):
    """What a policy keeps of the tokens gone past.

    Args:
        policy: scores keys.
        budget: how many stay.
        attends: queries and biases go through transformers' attention interface; without it, for models that have none
            and policies that need neither, layers are evicted behind the pass.
    """

    holds_cache = True

    def __init__(self, backbone: Backbone, policy: KVPolicy, budget: Budget, attends: bool = True) -> None:
        self.backbone, self.policy, self.budget, self.attends = backbone, policy, budget, attends
        self.layers = [HeldLayer(self, number, 0) for number in range(len(backbone.layers))]
        self.start = 0  # position of the next token
        self.num_read = 0
        self.num_probes = 0
        self.evicts = False
        self.question: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        """Keys of a head that are kept, the most of any layer."""
        return max(layer.num_held for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(states.nbytes for layer in self.layers for states in layer.held or ())

    @property
    def state(self) -> tuple[Any, ...]:  # type: ignore[override]  # a view of the layers, which hold it
        """(position of the next token, tokens read, question, what each layer holds)."""
        held = [(one.held, one.bias, one.origins, one.kept, dict(one.notes)) for one in self.layers]
        return self.start, self.num_read, self.question, held

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        """Put an earlier one back."""
        self.start, self.num_read, self.question, held = state
        for layer, (states, bias, origins, kept, notes) in zip(self.layers, held, strict=True):
            layer.held, layer.bias, layer.origins, layer.kept, layer.notes = states, bias, origins, kept, dict(notes)
        self._forget_chunk()

    def spread(self, count: int) -> None:
        """Repeat what every layer holds."""

        def rows(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.expand(count, *value.shape[1:]) if value.dim() else value
            if isinstance(value, dict):
                return {name: rows(one) for name, one in value.items()}
            return tuple(map(rows, value)) if isinstance(value, tuple) else value

        start, num_read, question, held = self.state
        self.state = start, num_read, rows(question), [rows(one) for one in held]

    def ask(self, tokens: torch.Tensor) -> None:
        """Take the end of the prompt, int64 [B, n], as the question that policies named "-aware" score by."""
        self.question = tokens[:, -QUESTION:] if self.policy.aware else None

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the frozen model behind what is held."""
        hidden = self.begin(tokens, 0)[1]
        self._forget_chunk()
        return hidden

    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Run the frozen model behind what is held, with a cache."""
        self._forget_chunk()
        for layer in self.layers:
            layer.room = tokens.shape[1] + room
        decoder = CachedDecoder(self.backbone, layers=self.layers, adapted=self._attending)
        return decoder, decoder.feed(tokens)

    def write(self, tokens: torch.Tensor) -> None:
        """Go past a chunk."""
        self.advance(tokens)

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read a chunk and evict: in the same pass, or in one over what the policy takes its queries from."""
        probes = self.question if self.policy.aware else tokens if self.policy.repeats else None
        self.num_read += tokens.shape[1]
        self.evicts = probes is None
        try:
            decoder, hidden = self.begin(tokens, 0 if probes is None else probes.shape[1])
            if probes is not None:
                self.evicts, self.num_probes = True, probes.shape[1]
                decoder.feed(probes)
            for layer in self.layers if not self.attends else ():
                layer.evict(layer.keys, *layer.states())  # no policy here looks at the queries
        finally:
            self.evicts, self.num_probes = False, 0
        self.start = self.num_slots
        return hidden

    def _forget_chunk(self) -> None:
        for layer in self.layers:
            layer.forget_chunk()

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        """Let the model attend by `_attend` to the layers of this trail."""
        if not self.attends:
            yield
            return
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, lambda *_, **__: None)  # layers hold different numbers of keys
        config = self.backbone.config
        before, token = config._attn_implementation, _READING.set(self)
        try:
            config._attn_implementation = _NAME
            yield
        finally:
            config._attn_implementation = before
            _READING.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally with the biases of held keys, then evict if the trail says so (see transformers' interface)."""
    trail = _READING.get()
    layer: HeldLayer = trail.layers[int(module.layer_idx)]  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    count, total, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    bias = None
    if layer.bias is not None:
        bias = F.pad(layer.bias, (0, total - layer.num_held)).repeat_interleave(groups, 1)[:, :, None]
    mask = None
    if count > 1 and (count < total or softcap is not None or bias is not None):
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        mask = mask.to(query.dtype)
    if softcap is None:
        output = F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, is_causal=mask is None and count > 1, enable_gqa=groups > 1
        )
    else:
        scores = query.unflatten(1, (-1, groups)) @ key[:, :, None].transpose(-1, -2) * scale
        scores = softcap * torch.tanh(scores.flatten(1, 2) / softcap)
        if mask is not None:
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).unflatten(1, (-1, groups))
        output = (weights @ value[:, :, None]).flatten(1, 2)
    if trail.evicts:
        layer.evict(query, key, value, scale, softcap)
    return output.transpose(1, 2), None
