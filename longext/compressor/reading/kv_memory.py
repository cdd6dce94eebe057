"""KV policies as `--memory` spells them: [ada-|pyramid-]NAME[-aware]:N for N slots, or :Rx for one of R tokens.

N+M and Rx+M keep the M newest tokens besides, whatever the policy says of them.
"""

from __future__ import annotations

from functools import partial

import torch

from longext.compressor.backbone import Backbone, close_states
from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.budgets import SHAPES, Budget
from longext.compressor.reading.eviction import QUESTION, PolicyTrail
from longext.compressor.reading.seen import KVPolicy
from longext.errors import ConfigError

AWARE = "-aware"


def is_policy(name: str) -> bool:
    """True if `name` is a KV policy, with or without the shape of its budget in front and "-aware" behind."""
    return _parts(name)[1] in KV_POLICIES


def _parts(name: str) -> tuple[str, str, bool]:
    shape = next((shape for shape in SHAPES if name.startswith(f"{shape}-")), "")
    name = name.removeprefix(f"{shape}-") if shape else name
    return shape or "even", name.removesuffix(AWARE), name.endswith(AWARE)


def policy_of(spec: str) -> KVPolicy:
    """Return the policy that `spec` names (ConfigError if it cannot be asked)."""
    _, name, aware = _parts(spec.partition(":")[0])
    kind = KV_POLICIES[name]
    if aware and not kind.can_ask:
        able = ", ".join(known for known in KV_POLICIES if KV_POLICIES[known].can_ask)
        raise ConfigError(f"--memory {name} scores by no query, so it knows no {AWARE}; {able} do.")
    return kind(aware)


def policy_summary(spec: str) -> str:
    """Return one line on a KV policy."""
    return KV_POLICIES.summary(_parts(spec.partition(":")[0])[1])


def open_policy(backbone: Backbone, spec: str, segment: int) -> tuple[partial[PolicyTrail], KVPolicy, Budget]:
    """Return (maker of trails, policy, budget) of a policy in chunks of `segment` tokens.

    Raises:
        ConfigError: no budget, no room for it, or a model whose attention or rotation cannot be used so.
    """
    name, _, size = spec.partition(":")
    chosen, plus, newest = size.partition("+")
    policy, shape = policy_of(spec), _parts(name)[0]
    read_again = QUESTION if policy.aware else segment if policy.repeats else 0
    room = backbone.window - segment - read_again
    number, is_ratio = chosen.removesuffix("x"), chosen.endswith("x")
    if not number.isdecimal() or int(number) < 1 or (plus and not newest.isdecimal()):
        raise ConfigError(
            f"--memory {name} takes its slots or a ratio, and the newest tokens that stay besides, as in {name}:256, "
            f"{name}:8x or {name}:192+64; got '{size}'."
        )
    slots, ratio = (0, int(number)) if is_ratio else (int(number), 0)
    policy.newest = int(newest) if plus else None
    more = policy.newest or 0
    budget = Budget(slots, ratio, max(0, room), len(backbone.layers), shape, more)
    if max(1, 2 * slots if shape == "pyramid" else slots) + more > room:
        besides = f" and {read_again} tokens that are read again" if read_again else ""
        raise ConfigError(
            f"--memory {spec} and a segment of {segment} tokens{besides} do not fit the model's {backbone.window} "
            f"positions: keep at most {max(0, (room - more) // 2 if shape == 'pyramid' else room - more)} slots"
            f"{f' beside {more:,} newest' if more else ''}, or shorten --segment."
        )
    backbone.check_rotation()
    attends = attends_by_interface(backbone)
    if not attends and (policy.needs_queries or shape != "even"):
        able = ", ".join(known for known in KV_POLICIES if not KV_POLICIES[known].needs_queries)
        raise ConfigError(
            f"{type(backbone.model).__name__} does not run its attention through transformers' attention interface, so "
            f"--memory {name} cannot see its queries: {able} work."
        )
    return partial(PolicyTrail, backbone, policy, budget, attends), policy, budget


@torch.no_grad()
def attends_by_interface(backbone: Backbone) -> bool:
    """True if the model attends through transformers' attention interface alone."""
    if not getattr(backbone.model, "_supports_attention_backend", False):
        return False
    tokens = torch.arange(6, device=backbone.device)[None]
    trail = PolicyTrail(backbone, KV_POLICIES["streaming"](), Budget(6, 0, 6, len(backbone.layers)))
    try:
        same = close_states(trail.advance(tokens), backbone.run(backbone.embed(tokens)))
    except (IndexError, RuntimeError, TypeError, ValueError):  # a cache of other states than keys and values (MLA)
        return False
    return same and all(layer.num_held == 6 for layer in trail.layers)
