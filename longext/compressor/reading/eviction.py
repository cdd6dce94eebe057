"""A KV cache that keeps a budget of keys by a policy, while a text is read in chunks; for any policy and family.

The model attends through transformers' attention interface, so queries and keys arrive as each family makes them. A
layer is evicted as soon as it has attended: what is held at any time is the budget of every layer, and one chunk.
Beside that one layer at a time has a copy that it is read from. Heads that keep fewer keys than others are held without
the gaps between them.

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
from longext.compressor.reading.seen import KVPolicy, Seen, rows_at_once, wide
from longext.compressor.reading.trails import Trail
from longext.errors import ConfigError

_NAME = "longext_kv_attn"
_READING: ContextVar[PolicyTrail] = ContextVar("reading")
QUESTION = 64  # tokens of the prompt's end that stand for a question
_AT_ONCE = 512  # keys that are turned or gathered at once


class HeldLayer(RoomyLayer):
    """Keys and values of one layer: those held, [B, H, n, d], then those of the chunk as they come.

    Attributes:
        held: (keys unrotated, values), [B, H, n, d]; [B, all of a text's heads, d] where heads hold different numbers.
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
        return 0 if self.origins is None else self.origins.shape[-1]

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
        keys, values = (self._laid_out(*pair) for pair in zip(self.held, (self.keys, self.values), strict=True))
        places = torch.arange(self._trail.start - self.num_held, self._trail.start)
        for part, by in zip(keys[..., : self.num_held, :].split(_AT_ONCE, -2), places.split(_AT_ONCE), strict=True):
            part.copy_(self.turn(part, by))
        return keys, values

    def padded(self, held: torch.Tensor) -> torch.Tensor:
        """Return keys or values held as [B, H, n, d]: zeros where a head holds none."""
        return held if held.dim() == 4 else self._laid_out(held)

    def hold(self, keys: torch.Tensor, values: torch.Tensor, origins: torch.Tensor) -> None:
        """Hold keys and values [B, H, n, d] whose origins, [B, H, n], are not -1."""
        self.held, self.origins = (_packed(keys, origins >= 0), _packed(values, origins >= 0)), origins

    def _laid_out(self, held: torch.Tensor, chunk: torch.Tensor | None = None) -> torch.Tensor:
        """Return [B, H, n + c, d]: keys or values held, and behind them those of the chunk."""
        assert self.origins is not None
        count = 0 if chunk is None else chunk.shape[-2]
        laid = held.new_zeros(*self.origins.shape[:-1], self.num_held + count, held.shape[-1])
        front = laid[..., : self.num_held, :]
        if held.dim() == front.dim():
            front.copy_(held)
        else:
            front[self.origins >= 0] = held.flatten(0, 1)
        if chunk is not None:
            laid[..., self.num_held :, :] = chunk
        return laid

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
        always = (origins < policy.num_first()) | (origins >= trail.num_read - policy.stays(budget))
        index, there = trail.budget.choose(scores.masked_fill(always & (origins >= 0), torch.inf), budget)
        values, fitted = policy.fit(seen, index, there) if total > budget else (None, None)
        self._keep(seen, index, there, values, fitted)

    def _keep(
        self, seen: Seen, index: torch.Tensor, there: torch.Tensor, values: torch.Tensor | None, fitted: Any
    ) -> None:
        start, count = self._trail.start, seen.num_keys - self.num_held
        values = _gathered((seen.values,), index) if values is None else values.to(seen.values.dtype)
        values = _packed(values, there)
        if self.held is not None:
            self.held = self.held[0], values  # the old values go before there are new keys
        fresh = self.turn(self.keys[..., :count, :], -torch.arange(start, start + count))
        keys = _gathered((fresh,) if self.held is None else (self.padded(self.held[0]), fresh), index)
        bias = fitted if fitted is not None else (None if seen.bias is None else seen.bias.gather(-1, index))
        if bias is not None or not bool(there.all()):
            bias = wide(keys).new_zeros(index.shape) if bias is None else bias
            bias = bias.masked_fill(~there, -torch.inf)
        self.bias = bias
        self.held = _packed(keys, there), values
        self.origins = seen.origins.gather(-1, index).masked_fill(~there, -1)
        self.kept = {name: one.gather(-1, index) for name, one in seen.kept.items()}
        self.forget_chunk()


def _packed(states: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Return states [B, H, n, d], those of a text in a row, [B, m, d], if `there` is not so everywhere."""
    return states if bool(there.all()) else states[there].view(len(states), -1, states.shape[-1])


def _gathered(parts: tuple[torch.Tensor, ...], index: torch.Tensor) -> torch.Tensor:
    """Return the rows `index`, int64 [B, H, m], of one tensor or two in a row, [B, H, n, d], which are not joined."""
    first, last = parts[0], parts[-1]
    size, found = first.shape[-2], first.new_empty(*index.shape, first.shape[-1])
    for place, into in zip(index.split(_AT_ONCE, -1), found.split(_AT_ONCE, -2), strict=True):
        rows = place[..., None].expand(into.shape)
        if len(parts) == 1:
            torch.gather(first, -2, rows, out=into)
            continue
        old = first.gather(-2, place.clamp(max=size - 1)[..., None].expand(into.shape))
        new = last.gather(-2, (place - size).clamp(min=0)[..., None].expand(into.shape))
        into.copy_(torch.where(rows < size, old, new))
    return found


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
            layer.room = room
        decoder = CachedDecoder(self.backbone, layers=self.layers, adapted=self._attending)
        return decoder, decoder.feed(tokens)

    def write(self, tokens: torch.Tensor) -> None:
        """Go past a chunk."""
        self.advance(tokens)

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read a chunk and evict: in the same pass, or in one over what the policy takes its queries from."""
        if self.policy.aware and self.question is None:
            raise ConfigError("A memory named -aware chooses by a question: tell it (`expect`) before it reads.")
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
    # a bias or a cap makes numbers of every query, key and head: some queries at a time
    size = count if bias is None and softcap is None else rows_at_once(key, groups)
    parts = []
    for first in range(0, count, size):
        rows = query[..., first : first + size, :]
        last = total - count + first + rows.shape[-2]  # keys that its last query sees
        seen = None if bias is None else bias[..., :last]
        parts.append(_attend_rows(rows, key[..., :last, :], value[..., :last, :], seen, scale, softcap))
    output = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
    if trail.evicts:
        layer.evict(query, key, value, scale, softcap)
    return output.transpose(1, 2), None


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float, cap: Any
) -> torch.Tensor:
    """Attend causally, the last query to all keys; `bias` is [B, H G, 1, n]."""
    count, total, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    mask = None
    if count > 1 and (count < total or cap is not None or bias is not None):
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        mask = mask.to(query.dtype)
    if cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, is_causal=mask is None and count > 1, enable_gqa=groups > 1
        )
    scores = query.unflatten(1, (-1, groups)).flatten(2, 3) @ key.transpose(-1, -2) * scale
    scores = cap * torch.tanh(scores.unflatten(2, (groups, count)).flatten(1, 2) / cap)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).unflatten(1, (-1, groups)).flatten(2, 3)
    output: torch.Tensor = (weights @ value).unflatten(2, (groups, count)).flatten(1, 2)
    return output
