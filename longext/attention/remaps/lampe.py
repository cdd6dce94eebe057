"""LaMPE: far positions are mapped to a length that follows the text's by a sigmoid."""

import math

from longext.attention.bands import REMAPS, WINDOW, RemapMethod, near_and_far
from longext.rope.spec import Parameter

REMAPS.register(
    "lampe",
    RemapMethod(
        title="LaMPE",
        reference="scar-on/LaMPE, ACL 2026",
        formula="d <= H as it is, else m(i) - m(j) + H - m(H) - 1 with m(p) = floor(p M / (N - 1))",
        parameters=(WINDOW, Parameter("reach", "length M that far positions are mapped to", least=1)),
        defaults=lambda L, N, pairs, given: {  # Llama 3's fit (L = 8,192), in units of L
            "window": max(1, L // 4),
            "reach": max(1, round(0.757 * L / (1 + math.exp(2.467 - 0.859 * N / L)))),
        },
        bands=lambda s: near_and_far(
            s.window + 1,
            lambda i: i * s.reach // (s.target_length - 1) + s.window - s.window * s.reach // (s.target_length - 1) - 1,
            lambda j: j * s.reach // (s.target_length - 1),
        ),
        colour="#cc79a7",
    ),
)
