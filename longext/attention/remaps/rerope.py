"""ReRoPE: every distance beyond a window is the window."""

from longext.attention.bands import REMAPS, WINDOW, RemapMethod, near_and_far

REMAPS.register(
    "rerope",
    RemapMethod(
        title="ReRoPE",
        reference="bojone/rerope; https://kexue.fm/archives/9708",
        formula="min(d, W)",
        parameters=(WINDOW,),
        defaults=lambda trained, target, pairs, given: {"window": max(1, trained // 2)},
        bands=lambda s: near_and_far(s.window, lambda i: i * 0 + s.window, lambda j: j * 0),
        colour="#e69f00",
    ),
)
