"""DPE: SelfExtend with a group size of its own for each group of dimension pairs."""

import math

from longext.attention.bands import REMAPS, WINDOW, RemapMethod, group_of, near_and_far, per_pair
from longext.rope.spec import Parameter

REMAPS.register(
    "dpe",
    RemapMethod(
        title="DPE",
        reference="arXiv 2504.18857",
        formula="SelfExtend with its own G for each of equally many dimension pairs, the fastest first",
        parameters=(WINDOW, Parameter("factors", "group sizes, the fastest pairs first: 2-8-2-8-32-32-32-4", least=1)),
        defaults=lambda L, N, pairs, given: {
            "window": (W := given.get("window") or max(1, L // 8)),
            "factors": (math.ceil(group_of(L, N, W, 0.6)),),
        },
        bands=lambda s: near_and_far(
            s.window,
            lambda i: per_pair(i, s.factors, s.num_pairs, lambda p, G: p // G + s.window - s.window // G),
            lambda j: per_pair(j, s.factors, s.num_pairs, lambda p, G: p // G),
        ),
        colour="#332288",
    ),
)
