"""The command that serves a model in an engine, with every flag that its RoPE needs; or why the engine cannot."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.attention.bands import no_checkpoint
from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.gguf import is_gguf, read_gguf
from longext.checkpoint.gguf_rope import read_gguf_rope, rope_for
from longext.checkpoint.rope_config import OTHER_LENGTHS, ModelRope, read_model_rope, write_rope
from longext.checkpoint.source import read_config, refuse_adapter, resolve_model
from longext.conversion.config import ServeConfig
from longext.conversion.engines import LLAMA_CPP, REFUSED, RIGHT, Engine, kind_of, serving_engines
from longext.conversion.extend import exportable_parameters, plan_rope, written_rope
from longext.conversion.gguf.export import ARCHITECTURES
from longext.errors import ConfigError
from longext.options import RopeConfig
from longext.registry import did_you_mean
from longext.rope.spec import RopeParameters, RopeSpec

_FLAG_BEFORE = (0, 11, 1)  # vLLM had --rope-scaling and --rope-theta before this version (PR #28006)
_VERSION = re.compile(r"[A-Za-z]?\d[A-Za-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How one model is served.

    Attributes:
        engine: name and version that the flags are for.
        command: what to type.
        length: tokens that it serves.
        rope_parameters: what the engine is to compute.
        notes: what to know.
    """

    engine: str
    command: str
    length: int
    rope_parameters: RopeParameters
    notes: tuple[str, ...] = ()


def engine_named(name: str) -> Engine:
    """Return an engine of the table by its name, whatever its case (ConfigError: there is none)."""
    known = {each.name.lower(): each for each in serving_engines()}
    if name.lower() not in known:
        raise ConfigError(f"Unknown engine '{name}'. {did_you_mean(name.lower(), known)}")
    return known[name.lower()]


def serving(config: ServeConfig) -> Serving:
    """Return the command that serves `config.model`, extended by `config.method` if one is given.

    Raises:
        ConfigError: the engine does not compute this RoPE, or there are no flags for it.
        CheckpointError: the model cannot be read.
    """
    if config.method and (elsewhere := no_checkpoint(config.method)):
        raise ConfigError(f"No engine serves it: {elsewhere}")
    engine = engine_named(config.engine)
    if config.version is not None and not _VERSION.fullmatch(config.version):
        raise ConfigError(f"--version takes a version of {engine.name}, for example {engine.title.split()[-1]}.")
    if is_gguf(config.model):
        return _serve_gguf(config, engine)
    source = resolve_model(config.model, config.revision, weights=False)
    refuse_adapter(source)
    rope = read_model_rope(source)
    if config.method is None:
        spec, parameters, length = written_rope(source, rope), rope.parameters, rope.max_position_embeddings
    else:
        spec = plan_rope(dataclasses.replace(config.request, replace=config.replace), source, rope)[0]
        parameters = exportable_parameters(rope, spec)
        length = round(spec.original_max_position_embeddings * spec.factor)
    if engine.name == "llama.cpp":
        command = _for_llama_cpp(config, rope, spec, parameters, length)
    else:
        model = str(source) if config.model in BUNDLED_MODELS else config.model
        changes = config_changes(read_config(source), rope, spec, parameters, length) if config.method else {}
        command = _for_checkpoint(config, engine, model, parameters, length, changes)
    return Serving(
        engine=f"{engine.name} {config.version}" if config.version else engine.title,
        command=command,
        length=length,
        rope_parameters=parameters,
        notes=_notes(config, engine),
    )


def config_changes(
    config: dict[str, Any], rope: ModelRope, spec: RopeSpec, parameters: RopeParameters, length: int
) -> dict[str, Any]:
    """Return what a parsed config.json has to change for a RoPE, in the new spelling; under its text config's key.

    Engines put it in place of what is there: a rotated fraction and the RoPE of other layers are said again.
    """
    text = rope.text_of(write_rope(config, rope, spec, parameters, length))
    before = rope.text_of(config)
    keys = [rope.length_key, "rope_parameters", "original_max_position_embeddings", "layer_rope_theta"]
    keys += [key for key in OTHER_LENGTHS if key not in keys]
    always = ("rope_parameters", rope.length_key)
    changes = {key: text[key] for key in keys if key in always or (key in before and text[key] != before[key])}
    for name in reversed(rope.section.split(".") if rope.section else []):
        changes = {name: changes}
    return changes


def _for_checkpoint(
    config: ServeConfig,
    engine: Engine,
    model: str,
    parameters: RopeParameters,
    length: int,
    changes: dict[str, Any],
) -> str:
    """Return the command of an engine that reads config.json; `changes` of it go into a flag."""
    reading = engine.reading(kind_of(parameters))
    if reading.verdict != RIGHT:
        verb = "refuses this RoPE: it" if reading.verdict == REFUSED else "makes something else of this RoPE: it"
        raise ConfigError(f"{engine.title} {verb} {reading.what}. Which engine reads what: docs/engines.md.")
    command = engine.serve.replace(" N", f" {length}").replace("DIR", shlex.quote(model))
    if config.method is None:
        return command
    if not engine.override:
        raise ConfigError(
            f"{engine.title} has no flag for RoPE: longext extend {config.model} --method {config.method} writes a "
            "checkpoint that it serves."
        )
    is_old = engine.name == "vLLM" and _older(config.version, _FLAG_BEFORE)
    is_flat = isinstance(changes.get("rope_parameters"), dict) and "rope_type" in changes["rope_parameters"]
    if not is_flat and (is_old or engine.name != "vLLM"):
        raise ConfigError(
            f"{engine.title if not is_old else f'vLLM {config.version}'} has no flag for a RoPE in a text config or "
            f"for one of several layer types: longext extend {config.model} --method {config.method} writes a "
            "checkpoint that it serves."
        )
    if is_old:
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        flags = f"--rope-theta {_digits(parameters['rope_theta'])}"
        flags += "" if scaling["rope_type"] == "default" else f" --rope-scaling {shlex.quote(json.dumps(scaling))}"
        return f"VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 {command} {flags}"
    flag = next(part for part in engine.override.split() if "override" in part)
    return f"{command} {flag} {shlex.quote(json.dumps(changes))}"


def _for_llama_cpp(
    config: ServeConfig, rope: ModelRope, spec: RopeSpec, parameters: RopeParameters, length: int
) -> str:
    """Return the commands that make a .gguf of a checkpoint and serve it."""
    model = shlex.quote(config.model)
    serve = f"llama-server -m MODEL.gguf -c {length}"
    if rope.model_type in ARCHITECTURES:
        rope_for(ARCHITECTURES[rope.model_type], spec, length)
        first = f"longext export gguf {model} -o MODEL.gguf"
        if config.method is not None:
            flags = " ".join(_method_flags(config))
            first += f" && longext extend MODEL.gguf {flags} -o EXTENDED.gguf"
            serve = serve.replace("MODEL", "EXTENDED")
        return f"{first} && {serve}"
    reading = engine_named("llama.cpp").reading(kind_of(parameters))
    if reading.verdict != RIGHT or config.method is not None:
        why = f"its converter {reading.what}" if reading.what else "extend the checkpoint, which its converter reads"
        raise ConfigError(f"llama.cpp has no such RoPE for a model of type {rope.model_type}: {why}.")
    return f"python convert_hf_to_gguf.py {model} --outfile MODEL.gguf && {serve}"


def _digits(value: float) -> str:
    """Return a number with all of its digits, a whole one without a point."""
    return str(int(value)) if value == int(value) else repr(value)


def _method_flags(config: ServeConfig) -> list[str]:
    """Return the flags of `longext extend` that were given."""
    flags = [f"--method {config.method}"]
    for item in dataclasses.fields(RopeConfig):
        value, flag = getattr(config, item.name), item.name.replace("_", "-")
        if isinstance(value, bool):
            flags += [] if value == item.default else [f"--{flag}" if value else f"--no-{flag}"]
        elif value is not None:
            flags.append(f"--{flag} {shlex.quote(_digits(value) if isinstance(value, float) else str(value))}")
    return flags


def _serve_gguf(config: ServeConfig, engine: Engine) -> Serving:
    """Return the command that serves a .gguf."""
    if engine.name != "llama.cpp":
        raise ConfigError(f"{engine.title} is not known to read the RoPE of a .gguf. Give it a checkpoint.")
    if config.method is not None:
        raise ConfigError(
            f"A .gguf carries its RoPE: longext extend {config.model} {' '.join(_method_flags(config))} -o OUT.gguf, "
            "then serve that."
        )
    rope = read_gguf_rope(read_gguf(Path(config.model).expanduser()))
    length = rope.max_position_embeddings
    return Serving(
        engine=f"llama.cpp {config.version}" if config.version else LLAMA_CPP,
        command=f"llama-server -m {shlex.quote(config.model)} -c {length}",
        length=length,
        rope_parameters=rope.parameters,
        notes=_notes(config, engine),
    )


def _notes(config: ServeConfig, engine: Engine) -> tuple[str, ...]:
    notes = ["The RoPE is in what is served: give the engine none of its own, it would be applied twice."]
    if config.method is not None and engine.name != "llama.cpp":
        notes = []
    if config.version is not None and config.version.lstrip("v") != engine.title.split()[-1]:
        notes.append(f"{engine.title} is the version that was looked at (docs/engines.md), not {config.version}.")
    return tuple(notes)


def _older(version: str | None, than: tuple[int, ...]) -> bool:
    if version is None:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[: len(than)]) < than
