"""Extend a checkpoint's context without training: rewrite its config, link its weights, never load them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longext.attention.bands import no_checkpoint
from longext.checkpoint.bundled import is_bundled
from longext.checkpoint.families import UNLISTED
from longext.checkpoint.ranges import MAX_FACTOR
from longext.checkpoint.rope_config import ModelRope, one_spelling, read_model_rope, write_rope
from longext.checkpoint.source import read_config, refuse_adapter, resolve_model
from longext.checkpoint.weights import Shard, read_shards, weight_index
from longext.conversion.card import license_of, model_card
from longext.conversion.computed import compare, compute, describe_layers, warn
from longext.conversion.config import ExtendConfig
from longext.conversion.engines import engine_notes
from longext.conversion.files import (
    mark_files,
    place_file,
    place_side_file,
    raise_lengths,
    side_files,
    write_json,
)
from longext.errors import CheckpointError, ConfigError
from longext.extras import has
from longext.manifest import read_manifest, write_manifest, write_text
from longext.rope.formulas import bake_as_longrope, ramp_of
from longext.rope.reading import spec_from_json
from longext.rope.spec import (
    ROPE_METHODS,
    RopeParameters,
    RopeSpec,
    compute_inv_freq,
    methods_that,
    rope_parameters,
)
from longext.staging import check_output, staged_directory
from longext.untrusted import fields, is_a, read_json

_LINKED_FROM = 2**20  # larger side files (tokenizers of big vocabularies) are linked as the weights are


@dataclass(frozen=True, kw_only=True)
class ExtensionPlan:
    """Everything `extend` is going to do, before it does it.

    Attributes:
        source: directory of the base model.
        rope: its RoPE.
        origin: the RoPE of the weights as they were trained (differs from `rope.spec` on a longext output).
        spec: the new RoPE.
        parameters: its standard `rope_parameters`.
        old_length: `max_position_embeddings` of the base.
        new_length: the context length the extension is for.
        relation: "extends", "composes with" or "replaces" the RoPE that was there.
        shards: the weight files.
        side_files: small files that are copied.
        layout: the spelling that is written (`write_rope`).
        layers: which layers the extension reaches, in words.
        warnings: what the user should know before using it, one line each.
        is_checked: it was held to what transformers builds.
    """

    config: ExtendConfig
    source: Path
    rope: ModelRope
    origin: RopeSpec
    spec: RopeSpec
    parameters: RopeParameters
    old_length: int
    new_length: int
    relation: str
    shards: tuple[Shard, ...]
    side_files: tuple[Path, ...]
    layout: str = "both"
    layers: str = ""
    warnings: tuple[str, ...] = ()
    is_checked: bool = False

    @property
    def config_length(self) -> int:
        """`max_position_embeddings` to write: dynamic NTK measures a sequence against it, so it stays L there."""
        return self.spec.original_max_position_embeddings if self.keeps_length else self.new_length

    @property
    def keeps_length(self) -> bool:
        """True if the written `max_position_embeddings` is the trained length."""
        return ROPE_METHODS[self.spec.method].keeps_length

    @property
    def weight_bytes(self) -> int:
        """Total size of the weight files."""
        return sum(shard.size for shard in self.shards)


def plan_extension(config: ExtendConfig) -> ExtensionPlan:
    """Work out an extension from config.json and the safetensors headers, and hold it to what transformers builds.

    That comparison is left out without `config.check`, and where torch or transformers are not installed.

    Raises:
        CheckpointError: the model cannot be read or extended, or would not compute what is planned.
        ConfigError: a parameter is out of range, or the model's existing RoPE cannot be combined with the method.
    """
    if elsewhere := no_checkpoint(config.method):
        raise ConfigError(elsewhere)
    ROPE_METHODS[config.method]
    source = resolve_model(config.model, config.revision)
    refuse_adapter(source)
    rope = read_model_rope(source)
    spec, origin, relation = plan_rope(config, source, rope)
    parameters = exportable_parameters(rope, spec)
    new_length = round(spec.original_max_position_embeddings * spec.factor)
    if spec == rope.spec and config.target_length is None and config.original_length is None:
        new_length = rope.max_position_embeddings  # nothing changes; Llama 3.1 reads more than L times its factor
    plan = ExtensionPlan(
        config=config,
        source=source,
        rope=rope,
        origin=origin,
        spec=spec,
        parameters=parameters,
        old_length=rope.max_position_embeddings,
        new_length=new_length,
        relation=relation,
        shards=tuple(read_shards(source)),
        side_files=side_files(source),
        layers=f"{rope.describe_layers()} (as config.json says)",
        warnings=(*engine_notes(parameters), *_length_note(config, source, rope, spec, new_length)),
    )
    return checked(plan) if config.check and has("torch", "transformers") else plan


def _length_note(
    config: ExtendConfig, source: Path, rope: ModelRope, spec: RopeSpec, new_length: int
) -> tuple[str, ...]:
    """One line if trained weights already read `new_length` tokens by their config, and nobody said otherwise."""
    old, trained = rope.max_position_embeddings, spec.original_max_position_embeddings
    is_same = spec == rope.spec and new_length == old
    if spec.factor == 1 or is_same or new_length > old or config.original_length is not None:
        return ()
    if not trained_rope(source, rope)[1]:
        return ()
    what = "gains no length" if new_length == old else f"shortens the model to {new_length:,}"
    return (
        f"This {what}: config.json says {old:,} tokens already, and factors count from the {trained:,} of pre-training "
        f"(factor {old / trained:g} is {old:,}). Give --target-length above {old:,}, or state --original-length.",
    )


def checked(plan: ExtensionPlan) -> ExtensionPlan:
    """Return `plan` in the spelling whose built model computes it, with its layers as that model has them.

    Raises:
        CheckpointError: no spelling does; carries the first difference.
    """
    lengths = sorted({plan.spec.original_max_position_embeddings, plan.new_length + 1})
    base = compute(read_config(plan.source), lengths)
    problem: CheckpointError | None = None
    for layout in ("both", "new"):
        chosen = replace(plan, layout=layout)
        written = extended_config(chosen)
        # a family with a row has an old spelling that its tests hold; of others it is written if the class reads it
        is_tried = layout == "both" and plan.rope.family is UNLISTED
        try:
            compare(base, compute(written, lengths), plan.rope, plan.spec, lengths)
            if is_tried:
                alone = compute(one_spelling(written, plan.rope, "old"), lengths, layers=False)
                compare(base, alone, plan.rope, plan.spec, lengths)
        except CheckpointError as error:
            problem = problem or error
            continue
        gains_nothing = warn(base, plan.rope)
        warnings = (*plan.warnings, gains_nothing) if gains_nothing else plan.warnings
        return replace(chosen, layers=describe_layers(base, plan.rope), warnings=warnings, is_checked=True)
    assert problem is not None
    raise problem


def plan_rope(config: ExtendConfig, source: Path, rope: ModelRope) -> tuple[RopeSpec, RopeSpec, str]:
    """Return (the new RoPE, the RoPE the weights were trained with, how the two relate).

    Factors are absolute: target length / pre-training length, whatever was there before.
    """
    origin, was_trained = trained_rope(source, rope)
    if config.original_length is not None:
        if config.original_length < 1:
            raise ConfigError(f"`original_length` must be >= 1, got {config.original_length}.").about("trained length")
        origin = replace(origin, original_max_position_embeddings=config.original_length)
    trained = ROPE_METHODS[origin.method]
    is_plain = trained.is_exact_inside or (trained.is_scaling and origin.factor == 1)
    composes = origin.method == config.method and not is_plain
    if not (is_plain or composes or config.replace):
        raise ConfigError(
            f"{config.model} was trained with {origin.method} RoPE (factor {origin.factor:g} of "
            f"{origin.original_max_position_embeddings} tokens): `{config.method}` would undo what it learned. "
            f"Use `{origin.method}` with a larger factor, or start from the bare base theta: longext extend --replace."
        ).about("rope")
    spec = new_spec(config, _growing(origin) if composes else bare_spec(origin))
    if composes and spec.factor < origin.factor:
        raise ConfigError(
            f"{config.model} already has {origin.method} factor {origin.factor:g}; factors are absolute, against the "
            f"{origin.original_max_position_embeddings} tokens of pre-training: give more, not {spec.factor:g}."
        ).about("trained length")
    if composes:
        relation = "composes with"
    else:
        relation = "extends" if is_plain and was_trained else "replaces"
    return spec, origin, relation


def _growing(spec: RopeSpec) -> RopeSpec:
    """`spec` without an attention factor that is its method's own: that follows from the factor, so it grows too."""
    plain = replace(spec, attention_factor=None)
    own = ROPE_METHODS[spec.method].attention_factor(plain)
    is_own = spec.attention_factor is not None and math.isclose(spec.attention_factor, own, rel_tol=1e-6)
    return plain if is_own else spec


def trained_rope(source: Path, rope: ModelRope) -> tuple[RopeSpec, bool]:
    """Return the RoPE the weights were trained with, and False if the config holds a later, training-free one.

    longext's own run.json remembers it, as long as nobody changed the config since. After training (a merged
    adapter) it is the RoPE that is there, spelled as the method that made it.
    """
    extension = _record(source, rope)
    if extension is None or extension.get("trained"):
        return written_rope(source, rope), True
    return spec_from_json(extension["origin"]), False


def written_rope(source: Path, rope: ModelRope) -> RopeSpec:
    """Return the RoPE that the config holds: as run.json spells it if the two agree, else as it reads."""
    extension = _record(source, rope)
    return rope.spec if extension is None else spec_from_json(extension["spec"])


def _record(source: Path, rope: ModelRope) -> dict[str, Any] | None:
    """The extension record in run.json, unless somebody changed the config since."""
    extension: dict[str, Any] | None = read_manifest(source).get("extension")
    if not extension or not {"spec", "origin"} <= set(extension) or extension["rope_parameters"] != rope.parameters:
        return None
    return extension


def bare_spec(spec: RopeSpec) -> RopeSpec:
    """The unscaled RoPE under a scaled one: its base theta and pre-training length, and what belongs to the model."""
    return RopeSpec(
        mscale=spec.mscale,
        mscale_all_dim=spec.mscale_all_dim,
        num_rotated=spec.num_rotated,
        method="none",
        rope_theta=spec.rope_theta,
        rotary_dim=spec.rotary_dim,
        original_max_position_embeddings=spec.original_max_position_embeddings,
    )


def new_spec(config: ExtendConfig, start: RopeSpec) -> RopeSpec:
    """Fill a RopeSpec from the typed parameters; those the method does not take are errors, not silence."""
    method = ROPE_METHODS[config.method]
    takes = {parameter.key: parameter.name for parameter in method.parameters}
    for other in ROPE_METHODS.values():
        for key in (parameter.key for parameter in other.parameters):
            if key not in takes and getattr(config, key, None) is not None:
                names = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise ConfigError(f"`{config.method}` has no parameter `{key}`: {names}.")
    values = {name: getattr(config, key) for key, name in takes.items() if key != "factors"}
    values = {name: value for name, value in values.items() if value is not None}
    if config.factors is not None:
        values.update(read_factors(Path(config.factors)))
    factor = resolve_factor(config, start.original_max_position_embeddings, values.pop("factor", None))
    if config.method == "none" and factor != 1:
        told = f"`none` leaves the RoPE as it is: its factor is 1, got {factor:g}. Choose a method."
        raise ConfigError(told).about("method")
    spec = replace(start, **{**values, "method": config.method, "factor": factor})
    if config.truncate is not None and ramp_of(spec) == "paper":
        raise ConfigError("`truncate` is for the code ramp: add --ramp code, or leave it out.")
    return spec


def resolve_factor(config: ExtendConfig, original: int, from_file: float | None) -> float:
    """Return s from `--factor` or `--target-length`; exact, never rounded up.

    Raises:
        ConfigError: none or both given, a factor below 1, or a target below the trained length.
    """
    if config.factor is not None and config.target_length is not None:
        raise ConfigError("Give either --factor or --target-length, not both.").about("factor")
    if config.target_length is not None:
        if config.target_length < original:
            raise ConfigError(
                f"--target-length must be at least the trained length {original}, got {config.target_length}. "
                "If the model was trained on less than its config says, state `original_length`."
            ).about("trained length")
        return config.target_length / original
    factor = config.factor if config.factor is not None else from_file
    if factor is None and config.method == "none":
        return 1.0
    if factor is None:
        told = f"Give --factor (for example 8) or --target-length (for example {8 * original})."
        raise ConfigError(told).about("factor")
    if factor > MAX_FACTOR:
        raise ConfigError(f"--factor must be at most {MAX_FACTOR:g}, got {factor:g}.").about("factor")
    if not factor >= 1:
        told = f"--factor must be >= 1 (target length / trained length {original}), got {factor:g}."
        raise ConfigError(told).about("factor")
    return float(factor)


def read_factors(path: Path) -> dict[str, Any]:
    """Return LongRoPE factors from a JSON file: `long_factor`, optional `short_factor`, `factor`, `attention_factor`.

    Raises:
        ConfigError: missing file, broken JSON, no `long_factor`, or values that are not positive numbers.
    """
    try:
        values = read_json(path, ConfigError, advice="Write it again.", want=dict)
    except FileNotFoundError as error:
        raise ConfigError(f"--factors {path}: there is no such file.") from error
    known = {"long_factor", "short_factor", "factor", "attention_factor"}
    if "long_factor" not in values or set(values) - known:
        raise ConfigError(
            f"--factors {path}: needs the key long_factor, may have {', '.join(sorted(known))}; got {sorted(values)}."
        )
    fields(values, f"--factors {path}", dict.fromkeys(("factor", "attention_factor"), (float, None)), ConfigError)
    for name in ("long_factor", "short_factor"):
        numbers = values.get(name, [1.0])
        if not isinstance(numbers, list) or not all(is_a(x, float) and x > 0 for x in numbers):
            raise ConfigError(f"--factors {path}: `{name}` must be a list of numbers above 0.")
    entries = {key: value for key, value in values.items() if value is not None}
    return {key: tuple(value) if isinstance(value, list) else float(value) for key, value in entries.items()}


def exportable_parameters(rope: ModelRope, spec: RopeSpec) -> RopeParameters:
    """Return rope_parameters that this model type's config accepts, baked as `longrope` if it takes nothing else.

    Raises:
        ConfigError: a length-dependent method on a family that cannot carry it.
    """
    _refuse_keys(rope, spec)
    parameters = rope_parameters(spec)
    accepted = rope.family.rope_types
    if accepted is None or parameters["rope_type"] in accepted:
        return _with_carried(parameters, rope, spec)
    if ROPE_METHODS[spec.method].keeps_length:
        raise ConfigError(
            f"`{spec.method}` depends on the sequence length, and a {rope.model_type} config accepts only "
            f"{', '.join(sorted(accepted))}. Choose one of {methods_that(lambda other: not other.keeps_length)}."
        )
    return _with_carried(bake_as_longrope(spec, *compute_inv_freq(spec)), rope, spec)


def _refuse_keys(rope: ModelRope, spec: RopeSpec) -> None:
    """Refuse what cannot be carried over to another RoPE: unknown keys, bases by layer under some methods."""
    if rope.unknown:
        raise ConfigError(
            f"The model's rope_parameters hold `{rope.unknown[0]}`, which longext has no meaning for: it may be wrong "
            "under a new RoPE. If the model does not need it, delete it from config.json."
        )
    bases = sorted(set(rope.layer_theta) - {0.0})
    if spec.method == "abf" and len(bases) > 1:
        listed = ", ".join(f"{base:g}" for base in bases)
        raise ConfigError(f"`abf` gives all layers one base, this model's have {listed}. Use ntk, which raises each.")
    if bases and not math.isclose(rope.spec.rope_theta, spec.rope_theta, rel_tol=1e-9):
        raise ConfigError(
            "The bases of this model's layers were raised by an extension: extend its base model instead."
        )


def _with_carried(parameters: RopeParameters, rope: ModelRope, spec: RopeSpec) -> RopeParameters:
    """Add the keys that stay true under any RoPE."""
    carried = dict(rope.carried)
    if "llama_4_scaling_beta" in carried:  # queries grow with the logarithm of the position over this length
        carried["original_max_position_embeddings"] = spec.original_max_position_embeddings
    return {**parameters, **carried}


def extend_checkpoint(config: ExtendConfig) -> ExtensionPlan:
    """Write the extended checkpoint to `config.output` and return what was done.

    The output appears under its name only when it is complete. Weight files are hard-linked (copied across devices).

    Raises:
        ConfigError, CheckpointError: as `plan_extension`; or the output exists.
    """
    if config.output is None:
        raise ConfigError("Give an output directory with -o.")
    output = Path(config.output)
    plan = plan_extension(config)
    check_output(output, config.force, protected=plan.source)
    write_extension(plan, output)
    return plan


def write_extension(plan: ExtensionPlan, output: Path) -> None:
    """Write `plan` to `output`: links, rewritten config and tokenizer length, model card, run.json."""
    with staged_directory(output, plan.config.force) as staging:
        force_copy = plan.config.copy or is_bundled(plan.source)
        for shard in plan.shards:
            place_file(shard.path, staging / shard.path.name, force_copy)
        for file in plan.side_files:
            place_side_file(file, staging, force_copy or file.stat().st_size < _LINKED_FROM)
        if index := weight_index(plan.source):
            shutil.copyfile(index, staging / index.name)
        write_json(staging / "config.json", extended_config(plan))
        raise_lengths(staging, plan.new_length)
        record = {**provenance(plan), "files": mark_files(staging / shard.path.name for shard in plan.shards)}
        card = model_card(record, plan.layers, license_of(plan.source))
        write_text(staging / "README.md", card)
        write_manifest(staging, "extend", plan.config, extension=record)


def extended_config(plan: ExtensionPlan) -> dict[str, Any]:
    """Return the new config.json: the base's, with the new RoPE in both layouts."""
    config: dict[str, Any] = write_rope(
        read_config(plan.source), plan.rope, plan.spec, plan.parameters, plan.config_length, plan.layout
    )
    return config


def provenance(plan: ExtensionPlan) -> dict[str, Any]:
    """Return what a later `extend` or `verify` needs: the trained RoPE, the new one, and how it was written."""
    return {
        "base_model": plan.config.model,
        "base_revision": plan.config.revision,
        "base_path": str(plan.source.resolve()),
        "relation": plan.relation,
        "trained": False,
        "origin": dataclasses.asdict(plan.origin),
        "spec": dataclasses.asdict(plan.spec),
        "rope_parameters": plan.parameters,
        "old_rope_parameters": plan.rope.parameters,
        "old_length": plan.old_length,
        "new_length": plan.new_length,
        "formula": ROPE_METHODS[plan.spec.method].formula,
        "reference": ROPE_METHODS[plan.spec.method].reference,
        "checked": plan.is_checked,
        "layout": plan.layout,
        "warnings": list(plan.warnings),
    }
