"""Position remapping on a loaded model: `attach` puts it into transformers' own seams, `detach` takes it out again.

The rotary module's output is replaced by no rotation (a forward hook), so that queries, keys and the KV cache come
unrotated; a forward pre-hook hands each pass its plan as a keyword; a function in transformers' attention interface
rotates for each band. Weights, config and forward functions stay as they are. As keys are cached unrotated, decoding
reads them as the prompt did.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from longext.attention.banded import BandPlan, Rotation, StepPlan
from longext.attention.bands import RemapSpec, remap_spec
from longext.attention.shifted import PLAN, LazyMask, lazy_mask
from longext.checkpoint import _built
from longext.checkpoint.rope_config import length_of
from longext.errors import ConfigError
from longext.models.head import decoder_of
from longext.models.rotary import hold_rope

IMPLEMENTATION = "longext_remap"
_PASS = "longext_remap_pass"  # the forward keyword that carries a `_Pass` to every layer
_PROBE_TOKENS = 12


class Remapping:
    """A model under a remapping; also a context manager that detaches on leaving.

    Attributes:
        model: the transformers model.
        spec: what is done.
    """

    def __init__(self, model: Any, spec: RemapSpec) -> None:
        self.model, self.spec = model, spec
        self.rotations: dict[str | None, Rotation] = {}
        self.is_plain = False  # distances stay as they are: what the self-check and texts in the window use
        self.is_used = False  # a layer asked for attention over the whole text
        self._text = model.config.get_text_config()
        self._before: str = self._text._attn_implementation
        self._removers: list[Any] = []
        self._held: list[tuple[nn.Module, Any]] = []

    def detach(self) -> None:
        """Make the model again what it was."""
        for remover in self._removers:
            remover.remove()
        for module, kind in self._held:
            module.rope_type = kind
        self._removers, self._held = [], []
        self.model.set_attn_implementation(self._before)

    def __enter__(self) -> Remapping:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def describe(self) -> dict[str, Any]:
        """Return what a result says of it."""
        return self.spec.describe()

    # --- what attach uses ---------------------------------------------------------------------------------------------

    def install(self, kinds: dict[str | None, nn.Module]) -> None:
        """Put the hooks in place, and the attention function, for rotary modules by the layer type they serve."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(IMPLEMENTATION, attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, lazy_mask)
        modules = set(kinds.values())
        self._held = [(module, module.rope_type) for module in modules if hasattr(module, "rope_type")]
        hold_rope(self.model, self.spec.trained_length)
        self.rotations = {kind: _rotation(module, kind) for kind, module in kinds.items()}
        self._removers = [module.register_forward_hook(self._unrotate, with_kwargs=True) for module in modules]
        self._removers.append(decoder_of(self.model).register_forward_pre_hook(self._begin, with_kwargs=True))
        self.model.set_attn_implementation(IMPLEMENTATION)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if PLAN not in kwargs:
            _check_positions(kwargs.get("position_ids"), kwargs.get("attention_mask"))
        return args, {**kwargs, _PASS: _Pass(self)}

    def _unrotate(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        kind = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
        if kind not in self.rotations:
            return output
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)

    def kind_of(self, module: nn.Module) -> str | None:
        """Return the layer type under which a layer's rotation is found."""
        if None in self.rotations:
            return None
        kinds: list[str] = self._text.layer_types
        return kinds[int(module.layer_idx)]  # type: ignore[arg-type]


def attach(
    model: Any,
    method: str,
    target_length: int | None = None,
    *,
    original_length: int | None = None,
    **parameters: Any,
) -> Remapping:
    """Put a loaded transformers causal LM under a method of position remapping, in place.

    The model then scores, generates and, in train mode, trains as before, with any batch, left or right padding and
    KV cache. `detach()` of what is returned, or leaving it as a context manager, makes it the plain model again.

    Args:
        model: a transformers causal LM, loaded with any attention implementation.
        method: a name in `REMAPS`: dca, selfextend, rerope, leaky-rerope, string, dpe, lampe or window.
        target_length: the longest text that will be read, N; default 8 times the trained length. Parameters that are
            not given follow from it.
        original_length: the trained length L; default `max_position_embeddings`.
        parameters: the method's own, `logn=True`, `temperature="yarn"` or a number.

    Raises:
        ConfigError: an unknown method or parameter, or a model that cannot be remapped.
    """
    text = model.config.get_text_config()
    if text._attn_implementation == IMPLEMENTATION:
        raise ConfigError("The model is under a remapping already: detach that first.")
    kinds = _rotated_kinds(model)
    length = original_length or length_of(text)
    first = next(iter(kinds.items()))
    num_pairs = _inv_freq(first[1], first[0]).numel()
    spec = remap_spec(method, length, target_length, num_pairs, parameters)
    if not getattr(model, "_supports_attention_backend", False):
        raise _not_remappable(model)
    if getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(f"{type(model).__name__} caps attention scores, which cannot be merged over bands.")
    remapping = Remapping(model, spec)
    _install_checked(remapping, kinds)
    return remapping


def _rotated_kinds(model: Any) -> dict[str | None, nn.Module]:
    """Return the rotary modules of layers that see the whole text, by layer type (None: one for all layers)."""
    text = model.config.get_text_config()
    modules = list(_built.rotary_modules(model).values())
    windowed = {"sliding_attention", "chunked_attention"}
    found: dict[str | None, nn.Module] = {}
    for module in modules:
        for kind in _built.layer_types(module):
            if kind not in windowed:
                found[kind] = module
    types = set(getattr(text, "layer_types", None) or [])
    if len(modules) != len({id(module) for module in found.values()}) or not found or types and types <= windowed:
        raise _no_distances(model)
    return found


def _no_distances(model: Any) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} has no layer that rotates its queries and keys and sees the whole text, so that "
        "there are no distances to remap: choose a method that `longext extend` knows."
    )


def _inv_freq(module: nn.Module, kind: str | None) -> torch.Tensor:
    found = getattr(module, f"{kind}_inv_freq" if kind else "inv_freq", None)
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"{type(module).__name__} has no inverse frequencies that could be used at other positions.")
    return found


def _rotation(module: nn.Module, kind: str | None) -> Rotation:
    scaling = getattr(module, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0)
    return Rotation(_inv_freq(module, kind).detach().clone(), float(scaling), is_halved=True)


@torch.no_grad()
def _install_checked(remapping: Remapping, kinds: dict[str | None, nn.Module]) -> None:
    """Install, and let a forward with distances as they are tell how the model pairs dimensions, or that it differs.

    Raises:
        ConfigError: the model's own logits do not come out.
    """
    model, was_training = remapping.model, remapping.model.training
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    model.eval()
    try:
        expected = model(ids, use_cache=False).logits.float()
        remapping.install(kinds)
        remapping.is_plain = True
        for is_halved in (True, False):
            remapping.rotations = {
                kind: replace(rotation, is_halved=is_halved) for kind, rotation in remapping.rotations.items()
            }
            found = model(ids, use_cache=False).logits.float()
            spread = float(expected.std())
            if not remapping.is_used:
                remapping.detach()
                raise _no_distances(model)
            if float((found - expected).abs().max()) <= (1e-3 if model.dtype.itemsize >= 4 else 5e-2) * spread:
                return
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        remapping.detach()
        raise _not_remappable(model) from error
    finally:
        remapping.is_plain = False
        model.train(was_training)
    remapping.detach()
    raise _not_remappable(model)


def _not_remappable(model: Any) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} does not take its rotation and attention through transformers' interfaces, so that "
        "its positions cannot be remapped. Llama, Mistral, Qwen, Gemma 3, Phi-3, GPT-NeoX, GLM and most others do."
    )


# --- one forward pass -------------------------------------------------------------------------------------------------


def _check_positions(positions: Any, mask: Any) -> None:
    """Raise ConfigError for position_ids [..., B, n] that do not count the tokens of a text, padding left out."""
    if positions is None or positions.shape[-1] < 2:
        return
    mask = next(iter(mask.values()), None) if isinstance(mask, dict) else mask
    mask = mask.arguments.get("attention_mask") if isinstance(mask, LazyMask) else mask
    jumps = positions.diff(dim=-1) != 1
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        real = mask[:, -positions.shape[-1] :].bool()
        jumps = jumps & (real[:, 1:] & real[:, :-1]).to(jumps.device)
    if bool(jumps.any()):
        raise ConfigError(
            "A remapped model counts the tokens of a text itself: position_ids that jump or begin again (packed rows) "
            "mean nothing to it. Leave them out, and give one text a row."
        )


@dataclass
class _Pass:
    """What the layers of one forward pass share: plans and tables, made by the first that needs them."""

    remapping: Remapping
    plans: dict[Any, Any] = field(default_factory=dict)

    def made(self, key: Any, make: Any) -> Any:
        """Return what `make` returned for this key the first time."""
        if key not in self.plans:
            self.plans[key] = make()
        return self.plans[key]


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks: q [B, H, n, D], k and v [B, K, M, D] -> ([B, n, H, D], None).

    Raises:
        ConfigError: a mask of the caller's own, dropout on attention weights, or attention sinks.
    """
    current: _Pass = kwargs.pop(_PASS)
    is_ours = isinstance(attention_mask, LazyMask)
    if not is_ours or not (attention_mask.is_causal or attention_mask.window is not None or PLAN in kwargs):
        raise ConfigError("A remapped model makes its own mask: pass a 2-D attention_mask or none.")
    if kwargs.get("s_aux") is not None or (dropout and module.training):
        raise ConfigError("Remapping knows neither attention sinks (gpt-oss) nor dropout on attention weights.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != value.dtype:  # as autocast does for SDPA; kernels do not
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    sliding_window = attention_mask.window if sliding_window is None else sliding_window
    remapping, type_ = current.remapping, current.remapping.kind_of(module)
    rotation = remapping.rotations.get(type_)
    first, starts = _place(current, attention_mask, query)
    longest = first + query.shape[2] - min(starts)
    is_plain = remapping.is_plain or longest <= remapping.spec.exact_length
    remapping.is_used |= sliding_window is None and rotation is not None
    if rotation is None or sliding_window is not None or (is_plain and PLAN not in kwargs):
        if rotation is not None:
            query, key = _as_they_are(current, rotation, type_, query, key, attention_mask)
        return _by_sdpa(module, query, key, value, attention_mask, scale, sliding_window, kwargs)
    key, value = (x[:, :, : first + query.shape[2]] for x in (key, value))  # a static cache is longer than its text
    place = (type_, query.device)
    if query.shape[2] == 1:
        step = current.made(
            place, lambda: StepPlan(remapping.spec, rotation, torch.tensor(starts), key.shape[2], query)
        )
        return step.attend(query, key, value, scale).transpose(1, 2), None
    runs = _runs(kwargs.get(PLAN), first, starts, query.shape[2])
    return _attend(current, rotation, place, runs, query, key, value, scale).transpose(1, 2), None


@dataclass(frozen=True)
class _Run:
    """Queries begin .. end - 1 of a row that read its keys from `keys` on; the first of them is number `number`."""

    begin: int
    end: int
    keys: int
    number: int


def _place(current: _Pass, mask: LazyMask, query: torch.Tensor) -> tuple[int, list[int]]:
    """Return how many keys come before the first query, and where each row's text begins (after its padding)."""

    def starts() -> list[int]:
        two = mask.arguments.get("attention_mask")
        if two is None or bool(two.all()):
            return [0] * query.shape[0]
        real = two.long()
        if bool((real.diff(dim=1) == 1).sum(1).gt(1 - real[:, 0]).any()):  # a text that begins more than once
            raise ConfigError(
                "A remapped model reads a row's text in one piece: the attention_mask has zeros between its tokens. "
                "Pad on the left if the rows go on."
            )
        found: list[int] = real.argmax(1).tolist()
        return found

    return int(mask.arguments.get("q_offset", 0)), current.made("starts", starts)


def _runs(training_plan: Any, first: int, starts: list[int], count: int) -> list[list[_Run]]:
    """Return the runs of each row: its text behind the padding, or the documents of a packed row."""
    segments = None if training_plan is None else training_plan.layout.segments
    if segments is None:
        return [[_Run(min(max(0, s - first), count), count, s, max(0, first - s))] for s in starts]
    rows: list[list[_Run]] = [[] for _ in starts]
    for segment in segments:
        begin, end = int(segment[0]) % count, int(segment[-1]) % count + 1
        rows[int(segment[0]) // count].append(_Run(begin, end, begin, 0))
    return rows


def _attend(
    current: _Pass,
    rotation: Rotation,
    place: Any,
    rows: list[list[_Run]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return [B, H, n, D], zeros for queries in no run; rows of the same runs go through together."""
    spec = current.remapping.spec
    if len(rows) > 1 and all(runs == rows[0] for runs in rows):
        rows = rows[:1]
    outputs, size = [], query.shape[0] // len(rows)
    for number, runs in enumerate(rows):
        q, k, v = (x[number * size : (number + 1) * size] for x in (query, key, value))
        parts, done = [], 0
        for run in runs:
            if run.begin == run.end:
                continue
            made = (place, run.number, run.end - run.begin)
            plan = current.made(made, lambda r=run: BandPlan(spec, rotation, r.number, r.end - r.begin, query))
            ends = run.keys + run.number + run.end - run.begin
            own = (q[:, :, run.begin : run.end], *(x[:, :, run.keys : ends] for x in (k, v)))
            parts += [torch.zeros_like(q[:, :, done : run.begin]), plan.attend(*own, scale)]
            done = run.end
        outputs.append(torch.cat([*parts, torch.zeros_like(q[:, :, done:])], 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _as_they_are(
    current: _Pass, rotation: Rotation, type_: str | None, query: torch.Tensor, key: torch.Tensor, mask: LazyMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys at their own positions, as the model would have."""
    first, starts = _place(current, mask, query)
    offset = int(mask.arguments.get("kv_offset", 0))

    def tables(begin: int, count: int) -> Any:
        numbers = torch.arange(begin, begin + count, device=query.device)[None] - torch.tensor(
            starts[:1] if len(set(starts)) == 1 else starts, device=query.device
        )[:, None]  # fmt: skip
        cos, sin = rotation.plain_tables(numbers, query)
        return cos[:, None], sin[:, None]

    place = (type_, query.device)
    q = current.made(("q", place), lambda: tables(first, query.shape[2]))
    k = current.made(("k", offset, key.shape[2], place), lambda: tables(offset, key.shape[2]))
    return rotation.turn(query, q), rotation.turn(key, k)


def _by_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: LazyMask,
    scale: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Full or sliding attention by transformers' own SDPA function (its numbers, its mask)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kwargs.pop(PLAN, None)
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask.dense(), scaling=scale, sliding_window=sliding_window, **kwargs
    )
    return out, None
