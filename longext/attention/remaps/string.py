"""STRING: far distances are shifted back into those that training has seen often."""

from longext.attention.bands import REMAPS, RemapMethod, near_and_far
from longext.rope.spec import Parameter

REMAPS.register(
    "string",
    RemapMethod(
        title="STRING",
        reference="arXiv 2410.18745",
        formula="d < S as it is, else d - S + W; for lengths within the trained one",
        parameters=(
            Parameter("shift", "distance S from which on positions are shifted back by S - W", least=1),
            Parameter("window", "smallest distance W after the shift", least=0),
        ),
        defaults=lambda L, N, pairs, given: {"shift": max(1, L // 3), "window": min(128, L // 12)},
        bands=lambda s: near_and_far(s.shift, lambda i: i - s.shift + s.window, lambda j: j),
        exact=lambda s: s.shift,
        colour="#56b4e9",
        trains=True,
    ),
)
