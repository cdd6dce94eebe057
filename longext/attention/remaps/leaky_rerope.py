"""Leaky ReRoPE: distances beyond a window grow by 1/k a token."""

from longext.attention.bands import REMAPS, WINDOW, RemapMethod, group_of, near_and_far
from longext.rope.spec import Parameter

REMAPS.register(
    "leaky-rerope",
    RemapMethod(
        title="Leaky ReRoPE",
        reference="bojone/rerope; https://kexue.fm/archives/9708",
        formula="d < W as it is, else W + (d - W) / k",
        parameters=(WINDOW, Parameter("k", "divisor of distances beyond the window", least=1)),
        defaults=lambda L, N, pairs, given: {
            "window": (W := given.get("window") or max(1, L // 4)),
            "k": group_of(L, N, W, 0.9),
        },
        bands=lambda s: near_and_far(s.window, lambda i: (i + s.window * (s.k - 1)) / s.k, lambda j: j / s.k),
        colour="#d55e00",
    ),
)
