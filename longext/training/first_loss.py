"""The first loss of a run: does the loaded model rotate as planned, and does it still predict text?

A loss alone does not tell: position interpolation at factor 32 costs about as much before training as no rotation at
all, and a lost extension costs nothing inside the trained length (docs/longlora.md has the figures). So the rotation of
the loaded modules is held to the method's float64 formula first, at the trained and at the new length; the loss then
has to be a number, and not above a uniform guess where the model without the extension reads the text well.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longext.checkpoint import _built
from longext.checkpoint.rope_config import ModelRope, model_rope, write_rope
from longext.checkpoint.source import read_config
from longext.conversion.computed import Computed, Layer, compute, formula_problem
from longext.conversion.extend import exportable_parameters, trained_rope, written_rope
from longext.errors import CheckpointError, LongextError, LongextWarning, TrainingError
from longext.models.hf import HFLanguageModel
from longext.processes.group import gather, is_main_process, is_sharded
from longext.rope.reading import spec_from_json
from longext.rope.spec import RopeSpec, compute_inv_freq
from longext.training.loading import Extension

MOST_TOKENS = 2048
# nats; methods that keep the fastest dimension pair raised it by at most 0.52 at factors to 32 (docs/longlora.md)
USUAL_RISE = 1.0
_PHASE_TOLERANCE = 1e-6  # of position x frequency, which float32 computes to 2e-7


@dataclass(frozen=True)
class Ropes:
    """The RoPE of a run and the one it started from.

    Attributes:
        rope: what the config to train with holds.
        spec: the same as planned.
        unextended: config.json with the RoPE that the weights were trained with; None if the run keeps that.
    """

    rope: ModelRope
    spec: RopeSpec
    unextended: dict[str, Any] | None


@dataclass(frozen=True)
class FirstLoss:
    """What was found before the first step.

    Attributes:
        num_tokens: tokens of the first row that were read.
        extended, unextended: mean next-token loss in nats under the RoPE that is trained and under the one before it;
            None if it was not measured or is no number.
        uniform: ln(vocabulary): the loss of a guess that knows nothing.
        num_frequencies: frequencies of the loaded model that were held to the formula.
        largest_error: relative, among them.
    """

    num_tokens: int
    extended: float | None
    unextended: float | None
    uniform: float
    num_frequencies: int
    largest_error: float


def check_first_loss(
    model: HFLanguageModel, method: str, extension: Extension, row: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Hold a loaded model to the RoPE that the run plans, before anything is trained; return the record of it.

    The main process looks, and all processes learn what it found. Modules and random numbers are left as they were.

    Args:
        model: the model of the run, in eval mode under full attention, its weights those of the base.
        method: of the run; "none" keeps the RoPE that the base has.
        row: the first row of the run.

    Returns:
        The fields of `FirstLoss`, or {"skipped": why} if the check cannot run.

    Raises:
        TrainingError: the RoPE is wrong; in every process.
    """
    if is_sharded():
        return {"skipped": "no process has whole weights under FSDP or DeepSpeed"}
    record, problem = gather(_look(model, method, extension, row) if is_main_process() else None)[0]
    if problem is None:
        return dict(record)
    error = TrainingError(
        f"{problem} Nothing was trained. Restore the base model's config.json, and look at what changes its rotary "
        "modules after loading; `longext verify` checks a checkpoint."
    )
    error.everywhere = True
    raise error


def _look(
    model: HFLanguageModel, method: str, extension: Extension, row: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], str | None]:
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            ropes = plan_ropes(method, extension)
            found, problem = measure_first_loss(model, ropes, extension, row)
    except Exception as error:  # code of any model family runs in here, and what it cannot do is not the run's fault
        return {"skipped": _built.one_line(error)}, None
    if problem is None:
        _warn_of_a_rise(found, ropes.spec)
    return dataclasses.asdict(found), problem


def plan_ropes(method: str, extension: Extension) -> Ropes:
    """Return the RoPE that a run of `method` trains, and the one that its weights were trained with."""
    raw = read_config(extension.source)
    before = model_rope(raw, extension.source)
    origin, _ = trained_rope(extension.source, before)
    now = written_rope(extension.source, before)
    if method != "none":
        spec = spec_from_json(json.loads(json.dumps(extension.record["spec"])))  # tuples as JSON has them
        return Ropes(model_rope(extension.config, extension.source), spec, raw)
    if origin == now:
        return Ropes(before, now, None)
    length = origin.original_max_position_embeddings
    return Ropes(before, now, write_rope(raw, before, origin, exportable_parameters(before, origin), length))


def measure_first_loss(
    model: HFLanguageModel, ropes: Ropes, extension: Extension, row: dict[str, torch.Tensor]
) -> tuple[FirstLoss, str | None]:
    """Return what was found, and what is wrong with the RoPE or None; arguments as of `check_first_loss`.

    The loss is the mean over the next tokens of the row's first `MOST_TOKENS` tokens, or as many as the model was
    trained on, without padding. It is measured if the rotation is right.
    """
    problem, count, worst = rotation_problem(model.model, ropes, extension)
    ids = row["input_ids"][row["document_ids"] >= 0][: min(MOST_TOKENS, extension.trained_length)][None]
    uniform = math.log(model.model.get_output_embeddings().weight.shape[0])
    extended = unextended = None
    if problem is None and ids.shape[1] > 1:
        extended = unextended = _loss(model, ids)
        if ropes.unextended is not None:
            with modules_kept(model):
                model.set_rope(ropes.unextended)
                unextended = _loss(model, ids)
        fastest = compute_inv_freq(ropes.spec, ids.shape[1])[0][0]
        if fastest * ids.shape[1] > 1:  # weights that lose all positions may know less than a guess before training
            problem = loss_problem(extended, unextended, uniform)
    return FirstLoss(ids.shape[1], extended, unextended, uniform, count, worst), problem


def _loss(model: HFLanguageModel, ids: torch.Tensor) -> float | None:
    try:
        return float(model.score(ids, 1).nll.mean())
    except LongextError:  # a score is no number
        return None


def loss_problem(extended: float | None, unextended: float | None, uniform: float) -> str | None:
    """Return what two first losses and that of a uniform guess say against the RoPE, or None.

    Only a model that reads this text well without the extension, at less than half of the uniform guess's loss, is
    held to that guess: interpolation may take a text that is poorly read above it, and random weights are there.
    """
    if unextended is None:
        return None
    if extended is None:
        return f"The RoPE is wrong: the first loss is no number under it, and {unextended:.2f} nats without it."
    if extended > uniform and unextended < uniform / 2:
        return (
            f"The RoPE is wrong: the first loss is {extended:.2f} nats under it, above the {uniform:.2f} of a uniform "
            f"guess, and {unextended:.2f} without it."
        )
    return None


def _warn_of_a_rise(found: FirstLoss, spec: RopeSpec) -> None:
    """Warn of a loss that rises more than methods that keep the fastest dimensions were seen to raise it."""
    if found.extended is None or found.unextended is None or found.extended - found.unextended <= USUAL_RISE:
        return
    plain, _ = compute_inv_freq(dataclasses.replace(spec, method="none"))
    planned, _ = compute_inv_freq(spec, found.num_tokens)
    if planned[0] > 0.99 * plain[0]:
        warnings.warn(
            f"The first loss rises from {found.unextended:.2f} to {found.extended:.2f} nats through {spec.method}; "
            f"less than {USUAL_RISE:g} is usual for a method that keeps the fastest dimensions. Is the RoPE the one "
            "that was meant?",
            LongextWarning,
            stacklevel=2,
        )


# --- the rotation -----------------------------------------------------------------------------------------------------


def rotation_problem(model: Any, ropes: Ropes, extension: Extension) -> tuple[str | None, int, float]:
    """Hold the rotary modules of a loaded model to `ropes.spec`, at the trained and at the target length.

    Returns:
        (the first difference or None, how many frequencies were compared, the largest relative error)
    """
    lengths = sorted({ropes.spec.original_max_position_embeddings, extension.target_length + 1})
    fresh = _fresh(extension, lengths)
    loaded = _loaded(model, lengths, fresh.layers if fresh else None)
    if not loaded.rotary:
        raise CheckpointError(f"{type(model).__name__} has no rotary module that longext could run")
    problem, count, worst = formula_problem(loaded, ropes.rope, ropes.spec, lengths)
    if problem is None and count == 0:
        problem = "no layer of it uses a RoPE"
    if problem is None and fresh is not None:
        problem = _order_problem(loaded, fresh)
    problem = problem or next((text for text in (_far_problem(model, n) for n in lengths) if text), None)
    if problem is not None:
        problem = f"The loaded model does not rotate as `{ropes.spec.method}` says: {problem}."
    return problem, count, worst


def _fresh(extension: Extension, lengths: list[int]) -> Computed | None:
    """What transformers builds from the config alone; None of a model with code of its own."""
    try:
        return compute(extension.config, lengths)
    except CheckpointError:
        return None


def _loaded(model: Any, lengths: list[int], layers: tuple[Layer, ...] | None) -> Computed:
    """What the rotary modules of a loaded model compute; `layers` say which of them are used."""
    rotary = {
        (f"{name}:{kind}" if kind else name, length): _built.rotation(copy.deepcopy(module), kind, length)
        for name, module in _built.rotary_modules(model).items()
        for kind in _built.layer_types(module)
        for length in lengths
    }
    measured = {key: (np.asarray(values), factor) for key, (values, factor) in rotary.items()}
    return Computed(measured, layers, None, {})


def _order_problem(loaded: Computed, fresh: Computed) -> str | None:
    """Compare the frequencies place by place: the formula's are found by value, each family has its own order."""
    for key, (measured, _) in loaded.rotary.items():
        expected = fresh.rotary.get(key, (measured, 1.0))[0]
        if not np.allclose(measured, expected, rtol=1e-4, atol=1e-12):
            return f"{key[0]} has the right frequencies in another order"
    return None


def _far_problem(model: Any, length: int) -> str | None:
    """Compare the angles at the last position with position x frequency: positions in half precision lose digits."""
    last = length - 1
    for name, module in _built.rotary_modules(model).items():
        for kind in _built.layer_types(module):
            cos, sin = _built.cos_sin(copy.deepcopy(module), kind, length)
            angles = last * torch.atan2(sin[0], cos[0])
            factor = torch.hypot(sin[0], cos[0])
            error = torch.hypot(cos[1] - factor * angles.cos(), sin[1] - factor * angles.sin())
            if bool((error > factor * (1e-5 + _PHASE_TOLERANCE * angles.abs())).any()):
                return f"{name} at position {last:,}: angles are off by up to {float(error.max()):.2g} rad"
    return None


@contextlib.contextmanager
def modules_kept(model: HFLanguageModel) -> Iterator[None]:
    """Undo on leaving what `set_rope` changes: values and submodules of the model's modules, and its config."""
    states = [(module, dict(vars(module)), dict(module._modules)) for module in model.model.modules()]
    config, length = model.config, model.extended_length
    try:
        yield
    finally:
        model.config, model.extended_length = config, length
        for module, values, children in states:
            module._modules.clear()
            module._modules.update(children)
            vars(module).clear()
            vars(module).update(values)
