"""Show a model's RoPE and what a method would do to it.

Base, wavelengths, turns in the trained window, dimensions that never complete a turn.

Example: longext inspect books-5m --method yarn --factor 8
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.conversion.config import ExtendConfig
from longext.errors import CheckpointError, ConfigError
from longext.manifest import result_record

if TYPE_CHECKING:
    from longext.checkpoint.rope_config import ModelRope
    from longext.rope.spec import RopeSpec


def run(config: ExtendConfig, as_json: bool) -> None:
    """Read the RoPE, apply the method to it if one is given, show what each dimension does."""
    from longext.checkpoint.gguf import is_gguf
    from longext.checkpoint.rope_config import read_model_rope
    from longext.checkpoint.source import resolve_model
    from longext.conversion.computed import layers_in_words
    from longext.conversion.extend import exportable_parameters, plan_rope

    if config.method == "none" and (config.factor, config.target_length) != (None, None):
        raise ConfigError("--factor and --target-length need a --method, for example --method yarn.").about("method")
    if is_gguf(config.model):
        _inspect_gguf(config, as_json)
        return
    _refuse_memory(config.model)
    directory = resolve_model(config.model, config.revision, weights=False)
    rope = read_model_rope(directory)
    spec = rope.spec
    if config.method != "none":
        spec = plan_rope(dataclasses.replace(config, replace=True), directory, rope)[0]
        exportable_parameters(rope, spec)
    _show(config, rope, spec, layers_in_words(rope, directory), as_json)


def _refuse_memory(model: str) -> None:
    """Raise ConfigError for a file of `longext memory`, with the command that shows it."""
    from longext.checkpoint.weights import read_header

    metadata: Mapping[str, str] = {}
    with contextlib.suppress(CheckpointError, OSError):
        metadata = read_header(Path(model).expanduser()).metadata
    if "longext" in metadata:
        raise ConfigError(f"{model} is a memory, not a model: longext memory inspect {model} says what it holds.")


def _inspect_gguf(config: ExtendConfig, as_json: bool) -> None:
    from longext.checkpoint.gguf import read_gguf
    from longext.checkpoint.gguf_rope import READ_FREQS, READ_KEYS, read_gguf_rope
    from longext.conversion.gguf.extend import plan_gguf, read_record
    from longext.rope.reading import spec_from_json

    file = read_gguf(Path(config.model).expanduser())
    rope, record = read_gguf_rope(file), read_record(file)
    if record:  # the method by its own name, and the length before it
        rope = dataclasses.replace(rope, spec=spec_from_json(record["spec"]))
    spec = rope.spec if config.method == "none" else plan_gguf(dataclasses.replace(config, copy=False)).spec
    carries = "keys of one base, linear or yarn" if file.architecture in READ_KEYS else "no RoPE that longext knows"
    carries = "any frequencies and temperature" if file.architecture in READ_FREQS else carries
    _show(config, rope, spec, f"llama.cpp's graph of this architecture carries {carries}", as_json)


def _show(config: ExtendConfig, rope: ModelRope, spec: RopeSpec, layers: str, as_json: bool) -> None:
    from longext.cli.output import deliver, open_output
    from longext.report.commands.model import dimension_table, in_sentences
    from longext.report.results import Contents, output_directory
    from longext.rope.analysis import dimension_rows

    has_method = config.method != "none"
    trained = spec.original_max_position_embeddings  # --set original_length may have said another
    rope = dataclasses.replace(rope, spec=dataclasses.replace(rope.spec, original_max_position_embeddings=trained))
    target = round(trained * spec.factor) if has_method else trained
    rows = dimension_rows(rope.spec, spec, target)
    never = [row.index for row in rows if not row.completes_a_turn]
    title = "RoPE of " + (f"{config.model} with {config.method} {spec.factor:g}x" if has_method else config.model)
    output = output_directory(config.output, "inspect", config.model)
    open_output(output, config)

    def figures() -> dict[str, Any]:
        from longext.report.plots import rope_dimensions

        picture = rope_dimensions(rows, trained=trained, target=target, title=title, has_method=has_method)
        return {"rope": picture}

    contents = Contents(
        command="inspect",
        config=config,
        record=_record(config, rope, spec, rows, never),
        tables=lambda: [dimension_table(rows, trained, target if has_method else None, title)],
        figures=figures,
    )
    lead = in_sentences(rows, config.model, trained, spec if has_method else None)
    deliver(output, contents, as_json=as_json, lead=[*lead, ""], notes=_notes(rope, layers, len(rows), never))


def _notes(rope: ModelRope, layers: str, num_pairs: int, never: list[int]) -> list[str]:
    fraction = "" if rope.partial_rotary_factor == 1 else f" ({rope.partial_rotary_factor:g} of the head)"
    trained, claimed = rope.spec.original_max_position_embeddings, rope.max_position_embeddings
    which = f": {never[0]} to {never[-1]}" if never else ""
    return [
        f"model type {rope.model_type}, head_dim {rope.head_dim}, rotary dimensions {rope.spec.rotary_dim}{fraction}",
        f"rope {rope.parameters}",
        f"trained length {trained:,}, length by config.json {claimed:,}; {layers}",
        f"{len(never)} of {num_pairs} dimension pairs never complete a turn in training{which}",
    ]


def _record(config: ExtendConfig, rope: ModelRope, spec: RopeSpec, rows: list[Any], never: list[int]) -> dict[str, Any]:
    return result_record(
        "inspect",
        model=config.model,
        model_type=rope.model_type,
        head_dim=rope.head_dim,
        rotary_dim=rope.spec.rotary_dim,
        rope_parameters=rope.parameters,
        local_parameters=rope.local_parameters,
        trained_length=rope.spec.original_max_position_embeddings,
        max_position_embeddings=rope.max_position_embeddings,
        sliding_window=rope.sliding_window,
        method=dataclasses.asdict(spec),
        never_complete_a_turn=never,
        dimensions=[dataclasses.asdict(row) for row in rows],
    )


FLAGS = ("model", "method", "factor", "target_length", "output", "revision", "force")
COMMANDS.register(
    "inspect",
    Command(config=ExtendConfig, run=run, takes_recipes_of="extend", defaults={"method": "none"}, only=FLAGS),
)
