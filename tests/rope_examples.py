"""The examples that every RoPE method brings, as specs and as requests of `extend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longext.rope.spec import ROPE_METHODS, RopeSpec, extension_methods

METHODS = extension_methods()  # `none` apart
CASES = [(name, i) for name in ROPE_METHODS for i in range(len(ROPE_METHODS[name].examples))]


def example(method: str, rotary_dim: int, number: int = 0) -> dict[str, Any]:
    """Return the fields of one example."""
    values = ROPE_METHODS[method].examples[number]
    return {key: value(rotary_dim) if callable(value) else value for key, value in values.items()}


def case_id(case: Any) -> str | None:
    """Return what pytest calls a case: the method and its parameters."""
    if not isinstance(case, tuple):
        return None
    values = ROPE_METHODS[case[0]].examples[case[1]]
    return "-".join([case[0], *(key if callable(value) else f"{key}={value}" for key, value in values.items())])


def spec_for(method: str, head_dim: int, theta: float, factor: float, length: int = 4096, **fields: Any) -> RopeSpec:
    """Return a spec whose whole head is rotated."""
    return RopeSpec(
        method=method,
        rope_theta=theta,
        rotary_dim=head_dim,
        original_max_position_embeddings=length,
        factor=factor,
        **fields,
    )


def options_for(method: str, rotary_dim: int, folder: Path) -> dict[str, Any]:
    """Return the keys of `ExtendConfig` for a method's plainest example; a file of factors goes to `folder`."""
    fields = example(method, rotary_dim)
    keys = {parameter.name: parameter.key for parameter in ROPE_METHODS[method].parameters}
    options = {keys[name]: value for name, value in fields.items() if keys[name] != "factors"}
    factors = {name: value for name, value in fields.items() if keys[name] == "factors"}
    if factors:
        file = folder / f"factors-{rotary_dim}.json"
        file.write_text(json.dumps(factors))
        options["factors"] = str(file)
    return options
