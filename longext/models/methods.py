"""How commands spell a method: "yarn", or with its parameters "dynamic:alpha=4:factor=8", "leaky-rerope:window=256"."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longext.attention.bands import REMAPS, check_parameters
from longext.conversion.config import ExtendConfig
from longext.errors import ConfigError
from longext.options import RopeConfig
from longext.registry import did_you_mean
from longext.rope.spec import ROPE_METHODS, RopeSpec
from longext.settings import build_config

if TYPE_CHECKING:
    from longext.conversion.extend import ExtensionPlan
    from longext.models.hf import HFLanguageModel


def method_request(text: str, model: str, revision: str | None = None, factor: float | None = None) -> ExtendConfig:
    """Return the `extend` request that "name" or "name:key=value:key=value" means.

    Args:
        factor: of a method that does not spell its own.

    Raises:
        ConfigError: unknown method or parameter.
    """
    name, settings = _split(text)
    _check_name(name)
    if name == "none" and settings:
        raise ConfigError(f"`none` is the model as it is and takes no parameters, got '{text}'.")
    typed: dict[str, Any] = {"model": model, "method": name, "revision": revision}
    if factor is not None and not any(setting.startswith(("factor=", "target_length=")) for setting in settings):
        typed["factor"] = factor
    return build_config(ExtendConfig, None, settings, typed)


_LENGTHS = ("factor", "target_length", "original_length")


@dataclass(frozen=True)
class RemapRequest:
    """A method of position remapping as commands spell it.

    Attributes:
        name: of the method.
        factor, target_length, original_length: as of `longext extend`; one of the first two.
        parameters: the method's own, as text.
    """

    name: str
    factor: float | None = None
    target_length: int | None = None
    original_length: int | None = None
    parameters: dict[str, str] = field(default_factory=dict)

    def target(self, trained_length: int) -> int:
        """Return the target length for a model of this trained length."""
        return self.target_length or round(trained_length * (self.factor or 1))


def remap_request(text: str, factor: float | None = None, target_length: int | None = None) -> RemapRequest | None:
    """Return what "name:key=value" means if it names a method of position remapping, else None.

    Args:
        factor, target_length: of a method that does not spell its own.

    Raises:
        ConfigError: a parameter that the method does not take, or cannot have; no factor and no target length.
    """
    name, settings = _split(text)
    if name not in REMAPS:
        return None
    lengths = [each for each in settings if each.partition("=")[0] in _LENGTHS]
    given = dict(each.partition("=")[::2] for each in settings if each not in lengths)
    is_spelled = any(each.startswith(("factor=", "target_length=")) for each in lengths)
    typed = {} if is_spelled else {"factor": factor, "target_length": target_length}
    sized: RopeConfig = build_config(RopeConfig, None, lengths, typed)
    if sized.factor is None and sized.target_length is None:
        told = f"--method {text} needs --factor (target length / trained length, for example 8)."
        raise ConfigError(told).about("factor")
    check_parameters(name, given)
    return RemapRequest(name, sized.factor, sized.target_length, sized.original_length, given)


def plan_method(
    text: str, model: str, revision: str | None, factor: float | None
) -> ExtensionPlan | RemapRequest | None:
    """Return the extension or remapping that a method is; None for "none". Raises as the two above."""
    from longext.conversion.extend import plan_extension

    remap = remap_request(text, factor)
    if remap is not None:
        return remap
    request = method_request(text, model, revision, factor)
    return None if request.method == "none" else plan_extension(request)


def apply_method(model: HFLanguageModel, plan: ExtensionPlan | RemapRequest | None, plain: dict[str, Any]) -> None:
    """Give a loaded model a method, in place of the one that it has.

    Args:
        plain: config.json of the model as it is, which None leaves.
    """
    from longext.conversion.extend import ExtensionPlan, extended_config

    if isinstance(plan, ExtensionPlan):
        model.set_rope(extended_config(plan))
        model.extended_length = plan.new_length  # which dynamic NTK keeps out of its config
    else:
        model.set_rope(plain)
        model.remap(plan)


def _split(text: str) -> tuple[str, list[str]]:
    """Return a method's name and its settings, "key=value" with underscores in the keys."""
    name, *settings = re.split(r":(?=[A-Za-z_-]+=|$)", text)
    pairs = (setting.partition("=") for setting in settings)
    return name, [f"{key.replace('-', '_')}{equals}{value}" for key, equals, value in pairs]


def _check_name(name: str) -> None:
    known = [*ROPE_METHODS, *REMAPS]
    if name not in known:
        raise ConfigError(f"Unknown method '{name}'. {did_you_mean(name, known)}")


def is_unchanged(method: str | None) -> bool:
    """Return True for no method, and for "none"."""
    return method in (None, "none")


def check_method(method: str | None, factor: float | None) -> None:
    """Raise ConfigError for a factor without a method (it would change nothing), or a method that is none."""
    if factor is not None and is_unchanged(method):
        told = f"--factor {factor:g} needs a --method to apply it, for example --method yarn."
        raise ConfigError(told).about("method")
    if method is not None and remap_request(method, factor) is None:
        method_request(method, "", factor=factor)


def described(spec: RopeSpec) -> str:
    """Return a method's formula with the parameters that were used."""
    method = ROPE_METHODS[spec.method]
    values = {"factor": spec.factor, **{each.name: getattr(spec, each.name) for each in method.parameters}}
    used = [f"{name} {value:g}" for name, value in values.items() if isinstance(value, (int, float))]
    return method.formula if spec.method == "none" else f"{method.formula}; here {', '.join(used)}"
