"""Hold an extension to what the built model computes, before anything is written.

The base's config and the new one are built with transformers on the meta device (`_built.py`); every rotary module, by
layer type, at the trained and at the new length, the layers that rotate, their windows and their softmax scale are then
compared with the plan. What differs is named in one line.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longext.checkpoint.families import UNLISTED
from longext.checkpoint.rope_config import ModelRope
from longext.checkpoint.source import read_config
from longext.errors import CheckpointError
from longext.extras import has
from longext.rope.reading import read_parameters
from longext.rope.spec import RopeSpec, compute_inv_freq, softmax_scale

_TOLERANCE = 2e-6  # relative; float32 frequencies, read out of float32 cosines
_ZERO = 1e-12  # rad per token: no rotation

Rotation = tuple[NDArray[np.float64], float]  # (frequencies, factor on cos and sin)


class Layer(NamedTuple):
    """One decoder layer: its type in the config, the rotary modules it uses, its window, whether it is attention."""

    kind: str | None
    rotary: tuple[str, ...]
    window: int | None
    attends: bool


@dataclass(frozen=True)
class Computed:
    """What the model of a config computes.

    Attributes:
        rotary: (module or module:layer_type, length) -> rotation.
        layers: the decoder layers, or None if transformers cannot run the model without weights.
        stopped: why not.
        scales: softmax scale by attention module.
    """

    rotary: dict[tuple[str, int], Rotation]
    layers: tuple[Layer, ...] | None
    stopped: str | None
    scales: dict[str, float]

    @property
    def used(self) -> tuple[str, ...]:
        """The rotary modules that some layer uses; all of them if that is not known."""
        names = dict.fromkeys(name for name, _ in self.rotary)
        if self.layers is None:
            return tuple(names)
        rotating = {name for layer in self.layers for name in layer.rotary}
        return tuple(name for name in names if name in rotating)


def compute(config: dict[str, Any], lengths: Sequence[int], layers: bool = True) -> Computed:
    """Return what the model of a parsed config.json computes for sequences of `lengths` tokens.

    Args:
        layers: find out what each layer does, too (most of the time that it takes).

    Raises:
        CheckpointError: transformers cannot build it.
    """
    return _compute(json.dumps(config, sort_keys=True), tuple(sorted(set(lengths))), layers)


@functools.lru_cache(maxsize=64)
def _compute(config: str, lengths: tuple[int, ...], layers: bool) -> Computed:
    from transformers.utils import logging

    from longext.checkpoint._built import NotBuilt, load_config, measure, one_line

    logging.set_verbosity_error()  # transformers' notes on a config that is only tried
    try:
        measured = measure(load_config(json.loads(config)), list(lengths), layers)
    except NotBuilt as error:
        raise CheckpointError(f"transformers cannot build this model: {error}") from error
    except Exception as error:  # config classes raise many kinds
        raise CheckpointError(f"transformers cannot read this config: {one_line(error)}") from error
    return computed_from(measured)


def computed_from(measured: dict[str, Any]) -> Computed:
    """Return what `_built.measure` found."""
    layers = measured["layers"]
    return Computed(
        rotary={
            (name, int(length)): (np.asarray(values), factor)
            for name, by_length in measured["rotary"].items()
            for length, (values, factor) in by_length.items()
        },
        layers=layers and tuple(Layer(**{**layer, "rotary": tuple(layer["rotary"])}) for layer in layers),
        stopped=measured["stopped"],
        scales=measured["scales"],
    )


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(base: Computed, ours: Computed, rope: ModelRope, spec: RopeSpec, lengths: Sequence[int]) -> None:
    """Hold `ours` to `spec`, given what the base computes.

    Args:
        base: what the base model computes, at the same lengths.
        ours: what the extended config computes.
        rope: the base's RoPE as longext reads it.
        spec: the RoPE that was planned.

    Raises:
        CheckpointError: the first thing that differs, in one line.
    """
    if not base.rotary:
        raise CheckpointError(f"{_has(rope)} no rotary module: it has no RoPE that config.json could change.")
    if not base.used:
        raise CheckpointError(f"{_has(rope)} a RoPE in its config, and no layer that uses it: nothing to extend.")
    if not _extended(base, rope):
        raise CheckpointError(f"{_has(rope)} no layer with the RoPE that would be extended ({rope.kind}).")
    _compare_layers(base, ours, rope)
    for length in lengths:
        for name in base.used:
            _compare_rotation(base, ours, rope, spec, name, length)
    _compare_scales(base, ours, rope, spec)


def _has(rope: ModelRope) -> str:
    return f"transformers builds this {rope.model_type} model with"


def _extended(computed: Computed, rope: ModelRope) -> tuple[str, ...]:
    """The used rotary modules whose RoPE an extension changes."""
    return tuple(name for name in computed.used if ":" not in name or name.rsplit(":", 1)[1] == rope.kind)


def _compare_layers(base: Computed, ours: Computed, rope: ModelRope) -> None:
    missing = set(base.used) - {name for name, _ in ours.rotary}
    if missing:
        raise CheckpointError(f"The extended {rope.model_type} model would have no rotary module {min(missing)}.")
    if base.layers is None or ours.layers is None:
        return
    for index, (before, after) in enumerate(zip(base.layers, ours.layers, strict=True)):
        if before != after:
            raise CheckpointError(
                f"Layer {index} of the extended {rope.model_type} model would rotate by {_names(after)}, the base's by "
                f"{_names(before)}."
            )


def _names(layer: Layer) -> str:
    window = f" in a window of {layer.window}" if layer.window else ""
    return (", ".join(layer.rotary) or "nothing") + window


def _compare_rotation(base: Computed, ours: Computed, rope: ModelRope, spec: RopeSpec, name: str, length: int) -> None:
    before, old_factor = base.rotary[name, length]
    if name not in _extended(base, rope) or spec == rope.spec:
        expected = before, old_factor
    else:
        old = _own_spec(rope.spec, before)
        read, read_factor = compute_inv_freq(old, length)
        places = _places(before, read, frequency_tolerance(old))
        if places is None or not np.isclose(old_factor, read_factor, rtol=_TOLERANCE):
            raise CheckpointError(
                f"transformers computes another RoPE for this {rope.model_type} model ({name}, {length} tokens) than "
                f"its rope_parameters say by the rules that longext knows: {_difference(before, read)}."
            )
        new = spec if old is rope.spec else replace(spec, rope_theta=old.rope_theta)
        planned, factor = compute_inv_freq(new, length)
        expected = np.where(places < 0, 0.0, planned[places]), factor
    problem = _rotation_problem(ours.rotary[name, length], expected, frequency_tolerance(spec))
    if problem:
        raise CheckpointError(
            f"transformers would not compute `{spec.method}` for this {rope.model_type} model ({name}, {length} "
            f"tokens): {problem}."
        )


def frequency_tolerance(spec: RopeSpec) -> float:
    """Return the relative error allowed in a frequency: 2e-6, or what a float32 ramp loses at a large factor.

    An error of 2^-23 in a ramp value near 0 is `factor` times as large relative to the frequency.
    """
    return max(_TOLERANCE, spec.factor * 2.0**-23)


def _rotation_problem(measured: Rotation, expected: Rotation, tolerance: float) -> str | None:
    if measured[0].shape != expected[0].shape or not np.allclose(measured[0], expected[0], rtol=tolerance, atol=_ZERO):
        return _difference(measured[0], expected[0])
    if not np.isclose(measured[1], expected[1], rtol=_TOLERANCE):
        return f"attention factor {measured[1]:.6g} on cos and sin instead of {expected[1]:.6g}"
    return None


def _own_spec(spec: RopeSpec, measured: NDArray[np.float64]) -> RopeSpec:
    """`spec` with the base of one rotary module: some families have another base in each layer."""
    plain = spec.method == "none" and spec.num_rotated is None
    slowest = float(measured.min())
    if not plain or not 0 < slowest < 1 or spec.rotary_dim <= 2:
        return spec
    theta = slowest ** (-spec.rotary_dim / (spec.rotary_dim - 2))
    if np.isclose(theta, spec.rope_theta, rtol=1e-4):
        return spec
    return replace(spec, rope_theta=theta)


def _places(measured: NDArray[np.float64], formula: NDArray[np.float64], tolerance: float) -> NDArray[np.int64] | None:
    """For each measured frequency its place in the formula's, -1 for none (0); None if one of them has no place.

    Modules put the pairs of a head in orders of their own, and each twice.
    """
    nearest = np.abs(measured[:, None] / np.where(formula > 0, formula, np.inf)[None, :] - 1).argmin(1)
    close = np.isclose(measured, formula[nearest], rtol=tolerance, atol=0)
    still = np.abs(measured) < _ZERO
    # by value: a method may give two pairs one frequency
    covers = all(np.isclose(measured, value, rtol=tolerance, atol=0).any() for value in formula[formula > 0])
    return np.where(still, -1, nearest) if bool((close | still).all()) and covers else None


def _difference(measured: NDArray[np.float64], expected: NDArray[np.float64]) -> str:
    if measured.size not in (expected.size, 2 * expected.size):
        return f"{measured.size} dimensions instead of {expected.size}"
    return f"slowest frequency {measured.min():.4g} instead of {expected.min():.4g}, fastest {measured.max():.4g}"


def _compare_scales(base: Computed, ours: Computed, rope: ModelRope, spec: RopeSpec) -> None:
    """The softmax scale may change by DeepSeek's mscale_all_dim only, and only where the class reads that."""
    growth = softmax_scale(spec) / softmax_scale(rope.spec)
    if base.scales == ours.scales:
        growth = 1.0  # the class computes its scale from the head size alone
    for name, before in base.scales.items():
        after, expected = ours.scales.get(name), before * growth
        if after is None or not np.isclose(after, expected, rtol=_TOLERANCE):
            raise CheckpointError(
                f"The softmax scale of {name} would be {after}, planned is {expected:.6g} (base: {before:.6g})."
            )


def formula_problem(
    computed: Computed, rope: ModelRope, spec: RopeSpec, lengths: Sequence[int]
) -> tuple[str | None, int, float]:
    """Hold what a model computes to the formulas alone, without its base.

    Returns:
        (the first difference or None, how many frequencies were compared, the largest relative error)
    """
    count, worst = 0, 0.0
    for name in computed.used:
        kind = name.rpartition(":")[2] if ":" in name else rope.kind
        for length in lengths:
            measured, factor = computed.rotary[name, length]
            layer_spec = spec if kind == rope.kind else _local_spec(rope, kind)
            if layer_spec is None:
                continue
            layer_spec = _own_spec(layer_spec, measured)
            formula, expected_factor = compute_inv_freq(layer_spec, length)
            places = _places(measured, formula, frequency_tolerance(layer_spec))
            if places is None:
                return f"{name} at length {length}: {_difference(measured, formula)}", count, worst
            if not np.isclose(factor, expected_factor, rtol=_TOLERANCE):
                problem = f"{name}: attention factor is {factor:.8g}, the formula gives {expected_factor:.8g}"
                return problem, count, worst
            expected = np.where(places < 0, 0.0, formula[places])
            turning = expected > 0
            count += measured.size
            worst = max(worst, float(np.abs(measured[turning] / expected[turning] - 1).max(initial=0.0)))
    return None, count, worst


def _local_spec(rope: ModelRope, kind: str) -> RopeSpec | None:
    """The RoPE of the layers of another type; None if their head size is not known."""
    parameters = dict(rope.local_parameters[kind])
    share = parameters.pop("partial_rotary_factor", None) or rope.partial_rotary_factor
    if rope.spec.num_rotated is not None:
        return None
    return read_parameters(parameters, int(rope.head_dim * share), rope.max_position_embeddings)


# --- in words ---------------------------------------------------------------------------------------------------------


def describe_layers(computed: Computed, rope: ModelRope) -> str:
    """Count the layers by what they do with positions."""
    if computed.layers is None:
        return f"{rope.describe_layers()} (as config.json says: {computed.stopped})"
    counts = Counter(_describe(layer, computed, rope) for layer in computed.layers)
    return "; ".join(f"{count} of {len(computed.layers)} {what}" for what, count in counts.most_common())


def layers_in_words(rope: ModelRope, directory: Path) -> str:
    """Return what the layers of the model in `directory` do with positions, without a plan.

    Families with a row of their own rotate in every layer, which config.json tells; others are built, where
    transformers is installed.
    """
    if rope.family is not UNLISTED:
        return rope.describe_layers()
    if not has("torch", "transformers"):
        return f"{rope.describe_layers()} (as config.json says)"
    return describe_layers(compute(read_config(directory), [rope.spec.original_max_position_embeddings]), rope)


def _describe(layer: Layer, computed: Computed, rope: ModelRope) -> str:
    if not layer.rotary:
        return "attend without RoPE" if layer.attends else "do not attend (linear, state-space or convolution)"
    is_local = not set(layer.rotary) & set(_extended(computed, rope))
    what = "keep a RoPE of their own" if is_local else "rotate"
    return f"{what} in a window of {layer.window:,} tokens" if layer.window else f"{what} with full attention"


def warn(computed: Computed, rope: ModelRope) -> str | None:
    """Return why an extension gains nothing for this model, or None."""
    extended = set(_extended(computed, rope))
    reach = [layer.window for layer in computed.layers or () if extended & set(layer.rotary)]
    length = rope.spec.original_max_position_embeddings
    if reach and all(window is not None and window <= length for window in reach):
        widest = max(window for window in reach if window is not None)
        others = any(layer.attends and not layer.rotary for layer in computed.layers or ())
        advice = (
            " The layers that see everything have no RoPE: raise max_position_embeddings instead." if others else ""
        )
        return (
            f"The extension gains nothing: only layers with a window of {widest:,} tokens have this RoPE, and no "
            f"distance in them exceeds it.{advice}"
        )
    return None
