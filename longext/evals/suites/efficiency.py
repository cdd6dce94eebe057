"""Time prefill and decoding and count KV bytes and peak memory: full attention, a window, a compressor.

Example: longext eval efficiency out/uio --lengths 4096,16384,65536 --ratio 8,32 --dtype bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError
from longext.evals.base import Eval, Outcome, Work, register
from longext.evals.limits import check_lengths
from longext.evals.views import TOKENS, Detail, Lines, Score, Section
from longext.options import RuntimeConfig
from longext.settings import LENGTH, MANY, option, override

if TYPE_CHECKING:
    from longext.evals.memory.efficiency import Subject

_MACHINE = frozenset({"model.device", "model.num_threads", "model.dtype", "model.attention"})


def _way(score: Score) -> str:
    ratio = score.field("ratio")
    return str(score.field("way")) if ratio is None else f"{score.field('way')} {ratio}x"


def _by_length(key: str, title: str, unit: str, lower: bool = True, **more: Any) -> Lines:
    return Lines(
        title,
        of=f"results.{key}",
        name=key.replace("_", "-"),
        unit=unit,
        lower_is_better=lower,
        variant=_way,
        axis=TOKENS,
        exact=True,
        **more,
    )


_SECTION = Section(
    name="efficiency",
    title="Efficiency",
    must_agree=_MACHINE,
    views=(
        _by_length(
            "prefill_seconds",
            "Prefill, seconds",
            "seconds",
            value="prefill (s)",
            details=(
                Detail("tokens/s", "prefill_tokens_per_second", "{:,.0f}"),
                Detail("us/token", "prefill_microseconds", "{:,.1f}"),
                Detail("formula", "marginal_bytes_formula", "{:,.0f}"),
                Detail("KV B/token", "kv_bytes_per_token", "{:,.0f}"),
            ),
            note="KV: bytes after the prefill, raw rest and sink included; formula: bytes of one more token",
        ),
        _by_length("decode_tokens_per_second", "Decoding, tokens a second", "rate", lower=False),
        _by_length("kv_bytes", "Bytes of keys and values held", "bytes"),
        _by_length("peak_bytes", "Peak memory above model and input", "bytes"),
    ),
)


@register("efficiency")
@dataclass(frozen=True, kw_only=True)
class Efficiency(Eval):
    """Time and memory of a growing context."""

    kind: ClassVar[str] = "efficiency"
    limit_option: ClassVar[str] = ""
    sections: ClassVar[tuple[Section, ...]] = (_SECTION,)

    model: str = override(RuntimeConfig, "model", help="A model, or the directory of a trained compressor.")
    seed: int = override(RuntimeConfig, "seed", help="Seed of the random tokens.")
    base: str | None = option(None, "The model it was trained on, if that has moved.")
    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096), "Context lengths in tokens, comma-separated.", le=LENGTH)
    ratio: tuple[int, ...] | None = option(None, "Ratios, comma-separated (default: those of training).")
    window: int | None = option(
        None, "Raw tokens of the window to compare with (default: the model's positions).", ge=2, le=LENGTH
    )
    num_new_tokens: int = option(16, "Tokens decoded behind the context.", ge=1)
    num_repeats: int = option(3, "Timed runs of each point; the best counts.", ge=1, le=MANY)

    def check(self) -> None:
        """Raise ConfigError for lengths that cannot be measured."""
        check_lengths(self.lengths, minimum=2)
        if self.num_processes > 1:
            raise ConfigError("--num-processes shares samples, and this evaluation times one process: leave it out.")

    def load_data(self) -> tuple[int, ...]:
        """Return the ratios to measure, none of a plain model; the text is random tokens."""
        from longext.evals.memory.efficiency import ratios_of

        return ratios_of(self)

    def open_model(self) -> Any:
        """Return the model, with its compressor if `model` is one."""
        from longext.evals.memory.efficiency import open_subject

        return open_subject(self)

    def measure(self, model: Subject, data: tuple[int, ...], work: Work) -> Outcome:
        """Return the record."""
        from longext.evals.memory.efficiency import measure_efficiency

        return measure_efficiency(self, model, data, work)
