"""A window of the nearest tokens and the first few: the control that reads nothing far."""

from longext.attention.bands import REMAPS, WINDOW, Band, RemapMethod
from longext.rope.spec import Parameter

REMAPS.register(
    "window",
    RemapMethod(
        title="window",
        reference="LM-Infinite, arXiv 2308.16137; StreamingLLM, arXiv 2309.17453",
        formula="d < W as it is; the first tokens at most W away; nothing else is seen",
        parameters=(WINDOW, Parameter("sinks", "first tokens that stay in sight", least=0)),
        defaults=lambda trained, target, pairs, given: {"window": trained, "sinks": 0},
        bands=lambda s: [
            Band(lambda i: i - (s.window - 1), lambda i: i + 1),
            Band(lambda i: i * 0, lambda i: (i - (s.window - 1)).clip(max=s.sinks), lambda i: i.clip(max=s.window)),
        ],
        colour="#7f7f7f",
    ),
)
