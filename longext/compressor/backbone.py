"""The frozen model a compressor is built on, reached through transformers' own seams: embeddings, caches, hooks.

Shape legend: B rows, N tokens, D hidden size, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from longext.checkpoint.rope_config import length_of
from longext.compressor.memory import CapturedStates, Memory, PrefixCache, num_slots
from longext.data.long_short import windowed_loss
from longext.errors import ConfigError
from longext.models.head import decoder_of, scale_logits
from longext.models.hf import score_hidden
from longext.models.rotary import LENGTH_DEPENDENT, hold_rope, rotary_modules
from longext.training.losses import chunked_cross_entropy

_CACHE_NAMES = ("past_key_values", "layer_past")
_TOLERANCE = 1e-3


def window_of(config: Any) -> int:
    """Return the positions a model of this text config was made for, at most its sliding window."""
    sizes = [length_of(config)]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        sizes.append(int(config.sliding_window))
    return min(sizes)


class _Captured(Exception):  # noqa: N818
    """Ends a forward pass once the last layer's attention input is known: nothing after it is needed."""


class Captured:
    """What the attention modules were called with: their inputs at some rows, and the rest of the call."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []
        self.calls: list[dict[str, Any]] = []


class Backbone:
    """A transformers causal LM with frozen weights.

    Args:
        model: the causal LM; its parameters are frozen here and it is put into eval mode.
        loss_chunk: tokens of logits alive at a time.

    Raises:
        ConfigError: its attention does not take its cache and rotation from the call.
    """

    def __init__(self, model: Any, loss_chunk: int = 4096) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder = decoder_of(model)
        self.config = model.config.get_text_config()
        self.layers = _layers(self.decoder, self.config.num_hidden_layers)
        self.attentions = [_attention(layer) for layer in self.layers]
        self.embedding = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        self.loss_chunk = loss_chunk
        self._check()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are in."""
        dtype: torch.dtype = self.embedding.weight.dtype
        return dtype

    @property
    def window(self) -> int:
        """Positions the model was made for (`window_of`)."""
        return window_of(self.config)

    def hold_rotation(self) -> None:
        """Fix a RoPE that follows the length of the text (dynamic NTK, LongRoPE) at that of the whole window.

        Keys that are kept would otherwise keep the rotation of another length.
        """
        parameters = self.config.rope_parameters
        if parameters.get("full_attention", parameters).get("rope_type") in LENGTH_DEPENDENT:
            hold_rope(self.model, self.window)

    # --- forward passes ---------------------------------------------------------------------------------------------

    def run(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor | None = None,
        prefix: Memory = (),
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the last hidden states [B, N, D] (after the final norm) of `embeds` [B, N, D] given a `kv` memory.

        Args:
            positions: int64 [N] or [B, N]; None for those that follow the prefix.
            mask: bool [N, N] among the rows (all of them see the prefix); None for causal.
        """
        start = num_slots(prefix)
        if positions is None:
            positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)
        positions = positions.expand(embeds.shape[0], -1)
        if mask is not None:
            mask = _additive(mask, start, embeds.dtype)
        cache = PrefixCache(prefix) if prefix else None
        output = self.decoder(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=self._by_layer_type(mask),
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _by_layer_type(self, mask: torch.Tensor | None) -> Any:
        kinds = set(getattr(self.config, "layer_types", None) or ())
        return mask if mask is None or len(kinds) < 2 else dict.fromkeys(kinds, mask)

    def attention_inputs(
        self, embeds: torch.Tensor, rows: slice, positions: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> Captured:
        """Run `embeds` as `run` does, up to the last layer's attention; return every attention's input at `rows`."""
        with self._capturing(rows, stop=True) as captured, contextlib.suppress(_Captured):
            self.run(embeds, positions, mask=mask)
        return captured

    def run_and_capture(
        self, embeds: torch.Tensor, rows: slice, positions: torch.Tensor, prefix: Memory, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Captured]:
        """Return (last hidden states, every attention's input at `rows`) of one whole forward pass."""
        with self._capturing(rows, stop=False) as captured:
            hidden = self.run(embeds, positions, prefix, mask)
        return hidden, captured

    @contextlib.contextmanager
    def _capturing(self, rows: slice, stop: bool) -> Iterator[Captured]:
        captured = Captured()
        last = len(self.attentions) - 1

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            captured.hidden.append(hidden[:, rows])
            captured.calls.append({name: value for name, value in kwargs.items() if name != "hidden_states"})
            if stop and len(captured.hidden) > last:
                raise _Captured

        handles = [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in self.attentions]
        recomputes = getattr(self.layers[-1], "gradient_checkpointing", False)
        if stop and recomputes:  # a layer that is left half-way cannot be checkpointed, and has little to store
            self.layers[-1].gradient_checkpointing = False
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()
            if stop and recomputes:
                self.layers[-1].gradient_checkpointing = True

    def project(self, captured: Captured, positions: torch.Tensor) -> Memory:
        """Return keys and values of the captured rows as the attention modules make them, at new `positions` [B, k].

        The modules are called once more, so a family's own norms, head layout and rotation are its own; what adapters
        are active then decides the projections. Keys come out rotated.
        """
        memory: list[torch.Tensor] = []
        for index, (hidden, call) in enumerate(zip(captured.hidden, captured.calls, strict=True)):
            states = CapturedStates()
            changed: dict[str, Any] = {
                "attention_mask": None,
                "position_embeddings": self.rotation(hidden, positions, index),
                **{name: states for name in _CACHE_NAMES if name in call},
                **({"position_ids": positions} if "position_ids" in call else {}),
            }
            self.attentions[index](hidden, **{**call, **changed})
            assert states.states is not None
            memory += states.states
        return tuple(memory)

    def rotation(self, like: torch.Tensor, positions: torch.Tensor, layer: int) -> Any:
        """Return (cos, sin) of `positions` [B, k] as `layer` takes them, in the dtype of `like` [B, ...]."""
        rotary = rotary_modules(self.model)[0]
        positions = positions.expand(like.shape[0], -1)
        if isinstance(rotary.rope_type, dict):
            return rotary(like, positions, layer_type=self.config.layer_types[layer])
        return rotary(like, positions)

    def rerotate(self, memory: Memory, delta: int | torch.Tensor) -> Memory:
        """Return a `kv` memory whose keys are rotated by `delta` positions more (less, if negative); values stay.

        RoPE turns pairs of dimensions by position times frequency, so a key at p becomes the key at p + delta; in
        float32 at least. Temperature that a method puts into its rotation (YaRN) stays as it is.

        Args:
            delta: one number for all slots, or int64 [slots].
        """
        deltas = torch.as_tensor(delta).reshape(1, -1)
        if not memory or not bool(deltas.any()):
            return memory
        moved = list(memory)
        for layer, keys in enumerate(memory[::2]):
            moved[2 * layer] = self.turn(keys, deltas[0], layer)
        return tuple(moved)

    def turn(self, keys: torch.Tensor, delta: torch.Tensor, layer: int) -> torch.Tensor:
        """Return keys or queries [..., n, head_dim] of one layer rotated by int64 [n] (or [1]) positions more."""
        by = delta.to(keys.device)[None]  # rotary modules take positions from 0 on: a turn back is one with -sin
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = (part[0] for part in self.rotation(wide.flatten(0, -3)[:1], by.abs(), layer))
        # YaRN multiplies cos and sin by its attention factor: the keys have it already, and must not get it again
        length = (cos**2 + sin**2).sqrt()
        return _turn(wide, cos / length, (sin / length) * by.sign()[0, :, None]).to(keys.dtype)

    @torch.no_grad()
    def check_rotation(self) -> None:
        """Raise ConfigError if `rerotate` is not how this family turns its keys (those that pair neighbours)."""
        tokens = torch.arange(4, device=self.device)[None]
        captured = self.attention_inputs(self.embed(tokens), slice(None))
        here, there = (self.project(captured, tokens + first) for first in (5, 0))
        try:
            turned = self.rerotate(here, -5)
        except (RuntimeError, TypeError, ValueError):  # a rotation that is not cos and sin
            turned = here
        if not all(close_states(a, b) for a, b in zip(turned, there, strict=True)):
            raise ConfigError(
                f"{type(self.model).__name__} turns its keys in a way longext does not know, so caches that move "
                "(streaming, transformer-xl, KV policies, ratios by distance, a session beyond its window) cannot be "
                "used with it."
            )

    def enable_checkpointing(self, adapters: Any, offload: bool, enable: Callable[[Any, bool], None]) -> None:
        """Run layers again in the backward pass instead of storing what is inside them.

        Memories stay readable (transformers drops writable caches there), and a layer runs again under the `adapters`
        it first ran under.

        Args:
            enable: switches transformers' checkpointing on for (model, offload).
        """
        enable(self.model, offload)
        self.model.disable_input_require_grads()
        for layer in self.layers:
            layer._can_checkpoint_with_cache = True
            layer._gradient_checkpointing_func = adapters.remembering(layer._gradient_checkpointing_func)
            layer.training = True  # the layer alone: what is inside stays in eval mode, without dropout

    @contextlib.contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """Run layers once, as when nothing is trained; undone on leaving."""
        before = [layer.training for layer in self.layers]
        for layer in self.layers:
            layer.training = False
        try:
            yield
        finally:
            for layer, was_training in zip(self.layers, before, strict=True):
                layer.training = was_training

    # --- embeddings and losses --------------------------------------------------------------------------------------

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, N, D] of int64 [B, N]."""
        embedded: torch.Tensor = self.embedding(tokens)
        return embedded

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] of last hidden states [..., D]."""
        return scale_logits(self.model, self.head(hidden))

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the summed cross-entropy of `hidden` [B, N, D] against aligned labels [B, N] (-100: none).

        Args:
            weights: [B, N], multiply each label's; None for 1.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        of_labels = None if weights is None else weights.reshape(-1)
        return chunked_cross_entropy(flat, labels.reshape(-1), self.logits, [], self.loss_chunk, of_labels)

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Return the sum over scored tokens of KL(teacher || student) in nats, a float32 scalar.

        Context distillation: the teacher is the same model with the text in view. Logits exist a chunk at a time.

        Args:
            student, teacher: last hidden states [B, l, D] for the same tokens; the teacher's take no gradient.
            scored: bool [B, l].
        """
        ours, theirs = student[scored], teacher[scored]
        total = ours.sum() * 0.0  # keeps the graph if no token is scored: every process needs a gradient
        for one, other in zip(ours.split(self.loss_chunk), theirs.split(self.loss_chunk), strict=True):
            total = total + checkpoint(self._divergence, one, other, use_reentrant=False)
        return total.to(torch.promote_types(total.dtype, torch.float32))

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        ours = F.log_softmax(self.logits(student).to(wide), -1)
        theirs = F.log_softmax(self.logits(teacher).detach().to(wide), -1)
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)

    @torch.no_grad()
    def teacher_states(self, tokens: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Return the last hidden states [B, stop - start, D] at tokens start .. stop - 1 of each span.

        The model reads as much of the text before them as its window holds, raw: what lies within the window in one
        pass, each further span in one of its own.

        Args:
            tokens: int64 [B, N], the whole documents.
        """
        within = max((stop for _, stop in spans if stop <= self.window), default=0)
        shared = self.run(self.embed(tokens[:, :within])) if within else None

        def states(start: int, stop: int) -> torch.Tensor:
            if shared is not None and stop <= within:
                return shared[:, start:stop]
            first = stop - self.window  # a teacher beyond its window would teach noise
            return self.run(self.embed(tokens[:, first:stop]))[:, start - stop :]

        return [states(start, stop) for start, stop in spans]

    @torch.no_grad()
    def gain(self, tokens: torch.Tensor, segment: int, overlap: int) -> torch.Tensor:
        """Return what each token gains from text that its segment does not hold, in nats [B, N - 1], of tokens 1 on.

        Its loss given the segment so far and the overlap alone, minus that given all text before it that the window
        holds beside a whole segment.
        """

        def score(ids: torch.Tensor, first: int) -> torch.Tensor:
            hidden = self.run(self.embed(ids[:, :-1]))[:, first - 1 :]
            return score_hidden(self.model, hidden, ids[:, first:], first).nll

        # the first token of a segment is predicted by the last position of the one before: one more token of context
        whole = windowed_loss(score, tokens, self.window - segment + 1, segment)
        return windowed_loss(score, tokens, overlap + 1, segment, whole) - whole

    # --- checks -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_masks(self) -> None:
        """Raise ConfigError unless the model's attention takes a mask of longext's own (flash-attn takes none)."""
        if self.config._attn_implementation in ("sdpa", "eager"):
            return
        embeds = self.embed(torch.arange(4, device=self.device)[None])
        places = torch.arange(4, device=self.device)
        try:
            alone = self.run(embeds.transpose(0, 1), places[:, None])[:, 0]
            masked = self.run(embeds, mask=torch.eye(4, dtype=torch.bool, device=self.device))[0]
            causal = self.run(embeds)[0]
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
            is_masked = False
        else:
            is_masked = bool((masked - alone).float().norm() <= (causal - alone).float().norm() / 2)
        if not is_masked:
            raise ConfigError(
                f"The attention of {type(self.model).__name__} ({self.config._attn_implementation}) takes no mask of "
                "longext's own, which memories need: use --attention sdpa or eager."
            )

    @torch.no_grad()
    def _check(self) -> None:
        """Make sure that what `project` makes is what the model itself puts into its cache."""
        from transformers import DynamicCache

        name = type(self.model).__name__
        refusal = (
            f"{name} does not take its KV cache and rotation as transformers' attention modules do, so longext cannot "
            "put memories into it. Llama, Mistral, Qwen, Gemma, Phi and GPT-NeoX models work."
        )
        if getattr(self.model, "_is_stateful", False):  # a state is no key and no value
            raise ConfigError(refusal)
        tokens = torch.arange(4, device=self.device)[None]
        try:
            cache = DynamicCache(config=self.config)
            self.decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
            ours = self.project(
                self.attention_inputs(self.embed(tokens), slice(None)), torch.arange(4)[None].to(tokens)
            )
            theirs = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        except (AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(refusal) from error
        same = len(ours) == len(theirs) and all(
            a.shape == b.shape and close_states(a, b) for a, b in zip(ours, theirs, strict=True)
        )
        if not same:
            raise ConfigError(refusal)


def _additive(mask: torch.Tensor, num_slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [1, 1, N, M + N] of 0 and the dtype's lowest value, as every attention of transformers adds to scores.

    `mask` [N, N] gets M memory slots in front, which every row sees.
    """
    seen = torch.cat([mask.new_ones(mask.shape[0], num_slots), mask], 1)
    lowest = torch.finfo(dtype).min  # not -inf, which makes NaN of a row that sees nothing
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, lowest)[None, None]


def _turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of keys [..., n, d], as many as `cos` has, pairing i with i + half."""
    size = cos.shape[-1]
    turned, rest = keys[..., :size], keys[..., size:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def close_states(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two keys or values are the same but for rounding: 1e-3 of the norm, or 4 epsilons if more."""
    tolerance = max(_TOLERANCE, 4 * torch.finfo(other.dtype).eps)
    return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())


def _layers(decoder: Any, count: int) -> list[Any]:
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return list(child)
    raise ConfigError(f"{type(decoder).__name__} has no list of {count} layers: longext cannot put memories into it.")


def _attention(layer: Any) -> nn.Module:
    for child in layer.children():
        if "attention" in type(child).__name__.lower():
            attention: nn.Module = child
            return attention
    raise ConfigError(f"{type(layer).__name__} has no attention module: longext cannot put memories into it.")
