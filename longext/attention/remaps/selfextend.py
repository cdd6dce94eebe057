"""SelfExtend: positions beyond a window are shared by groups of tokens."""

import math

from longext.attention.bands import REMAPS, WINDOW, RemapMethod, group_of, near_and_far
from longext.rope.spec import Parameter

REMAPS.register(
    "selfextend",
    RemapMethod(
        title="SelfExtend",
        reference="arXiv 2401.01325",
        formula="d < W as it is, else floor(i / G) - floor(j / G) + W - floor(W / G)",
        parameters=(WINDOW, Parameter("group", "tokens that share a position beyond the window", least=1)),
        defaults=lambda L, N, pairs, given: {
            "window": (W := given.get("window") or max(1, L // 4)),
            "group": math.ceil(group_of(L, N, W, 0.6)),
        },
        bands=lambda s: near_and_far(
            s.window, lambda i: i // s.group + s.window - s.window // s.group, lambda j: j // s.group
        ),
        colour="#009e73",
    ),
)
