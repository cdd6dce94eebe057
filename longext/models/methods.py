"""How commands spell an extension method: "yarn", or with its parameters "dynamic:alpha=4:factor=8"."""

from __future__ import annotations

import re
from typing import Any

from longext.conversion.config import ExtendConfig
from longext.errors import ConfigError
from longext.rope.spec import ROPE_METHODS, RopeSpec
from longext.settings import build_config


def method_request(text: str, model: str, revision: str | None = None, factor: float | None = None) -> ExtendConfig:
    """Return the `extend` request that "name" or "name:key=value:key=value" means.

    Args:
        factor: of a method that does not spell its own.

    Raises:
        ConfigError: unknown method or parameter.
    """
    name, *settings = re.split(r":(?=[A-Za-z_-]+=|$)", text)
    ROPE_METHODS[name]
    if name == "none" and settings:
        raise ConfigError(f"`none` is the model as it is and takes no parameters, got '{text}'.")
    settings = [
        f"{key.replace('-', '_')}{equals}{value}" for key, equals, value in (s.partition("=") for s in settings)
    ]
    typed: dict[str, Any] = {"model": model, "method": name, "revision": revision}
    if factor is not None and not any(setting.startswith(("factor=", "target_length=")) for setting in settings):
        typed["factor"] = factor
    return build_config(ExtendConfig, None, settings, typed)


def is_unchanged(method: str | None) -> bool:
    """Return True for no method, and for "none"."""
    return method in (None, "none")


def check_method(method: str | None, factor: float | None) -> None:
    """Raise ConfigError for a factor without a method (it would change nothing), or a method that is none."""
    if factor is not None and is_unchanged(method):
        raise ConfigError(f"--factor {factor:g} needs a --method to apply it, for example --method yarn.")
    if method is not None:
        method_request(method, "", factor=factor)


def described(spec: RopeSpec) -> str:
    """Return a method's formula with the parameters that were used."""
    method = ROPE_METHODS[spec.method]
    values = {"factor": spec.factor, **{each.name: getattr(spec, each.name) for each in method.parameters}}
    used = [f"{name} {value:g}" for name, value in values.items() if isinstance(value, (int, float))]
    return method.formula if spec.method == "none" else f"{method.formula}; here {', '.join(used)}"
