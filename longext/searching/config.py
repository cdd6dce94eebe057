"""Settings of `search`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.options import DataConfig, RuntimeConfig
from longext.searching.searcher import SEARCHERS
from longext.settings import LENGTH, MANY, option, override


@dataclass(frozen=True, kw_only=True)
class SearchConfig(RuntimeConfig, DataConfig):
    """`longext search`: one model, one target length, one way to search."""

    target_length: int | None = option(None, "Target length in tokens; required.", ge=2, le=LENGTH, panel="Method")
    original_length: int | None = option(
        None, "Pre-training length, where the config does not say it.", le=LENGTH, panel="Method"
    )
    searcher: str = option("curve", "How to search", names=lambda: SEARCHERS, panel="Method")
    evaluations: int | None = option(
        None, "Most candidates to try (default: 64, 1,344 and 1,408 of the searchers).", ge=4, le=MANY, panel="Method"
    )
    short_price: float | None = option(
        None, "Most that the temperature may raise short perplexity, 0.01 is 1 % (curve).", ge=0, panel="Method"
    )
    num_samples: int = option(8, "Samples of the target length that a candidate is tried on.", ge=2, le=MANY)
    text_weight: float = option(20.0, "Weight of text loss above YaRN's, nats a token (curve).", ge=0)
    short_weight: float = option(1.0, "Weight of short loss that the temperature adds, nats a token (curve).", ge=0)
    eval_data: str | None = option(
        None, "Text for the final judgement (default: a third of --data is kept back).", panel="Data"
    )
    num_trials: int = option(4, "Final passkey prompts at each of five depths.", ge=1, le=MANY)
    seed: int = override(RuntimeConfig, "seed", help="Seed of samples and search; the judgement has others.")
