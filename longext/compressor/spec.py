"""What a compressor is, as compressor.json keeps it, and which specs and compression ratios a model has room for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.schedule import Ratio, Schedule
from longext.errors import CheckpointError, ConfigError
from longext.untrusted import build


@dataclass(frozen=True, kw_only=True)
class CompressorSpec:
    """What a trained compressor is.

    Attributes:
        arch: a name in `COMPRESSORS`.
        segment: l, tokens of a segment.
        ratios: the compression ratios it was trained on; the first is the default.
        sink: raw tokens of the document's start that stay readable (keys and values; 0 for none).
        overlap: raw tokens before a segment that stay readable in addition to the memories.
        memory: "kv" or "soft".
        rank, alpha: of its adapters.
    """

    arch: str = "uio"
    segment: int = 1024
    ratios: tuple[int, ...] = (8,)
    sink: int = 1
    overlap: int = 0
    memory: str = "kv"
    rank: int = 128
    alpha: float = 512.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ratios": list(self.ratios)}

    @classmethod
    def from_json(cls, values: Any, where: str = "The compressor's spec") -> CompressorSpec:
        """Return the spec that `to_json` wrote; `where` is its place as an error names it.

        Raises:
            CheckpointError: an unknown or missing key, a value of another type, or a count that cannot be.
        """
        spec: CompressorSpec = build(cls, values, where, CheckpointError, "Restore the file.")
        counts = (spec.segment, spec.rank, *spec.ratios, spec.sink + 1, spec.overlap + 1)
        if not spec.ratios or not all(1 <= count <= 2**31 for count in counts):
            raise CheckpointError(f"{where} has counts that no compressor has ({counts}). Restore the file.")
        return spec

    def schedule(self, window: int, ratio: Ratio | None = None) -> Schedule:
        """Return what segments read in a model of `window` positions; None: at the ratio that makes most slots."""
        return Schedule.of(COMPRESSORS[self.arch], self, ratio or min(self.ratios), window)


def check_spec(spec: CompressorSpec, window: int) -> None:
    """Raise ConfigError for an unknown architecture, a ratio that does not divide it, too small a window."""
    kind = COMPRESSORS[spec.arch]
    if spec.memory not in kind.memories:
        raise ConfigError(f"--memory-kind of {spec.arch} must be {' or '.join(kind.memories)}, got '{spec.memory}'.")
    for ratio in spec.ratios:
        if ratio < 1 or spec.segment % ratio:
            divisors = [n for n in (2, 4, 8, 16, 32, 64) if spec.segment % n == 0]
            raise ConfigError(
                f"--ratio {ratio} does not divide --segment {spec.segment}: choose of "
                f"{', '.join(map(str, divisors)) or 'its divisors'}."
            )
    _check_different(spec.ratios)
    if spec.sink and kind.trains_reader and spec.memory == "kv":
        raise ConfigError(f"{spec.arch} trains its reader, so sink tokens have no fixed keys: use --sink 0.")
    if kind.reads_last and len(spec.ratios) > 1:
        raise ConfigError(f"{spec.arch} hands one memory of fixed size on: give one --ratio.")
    if spec.sink >= spec.segment:
        raise ConfigError(
            f"--sink {spec.sink} must be below --segment {spec.segment}: the first segment holds the sink tokens."
        )
    if not spec.schedule(window, max(spec.ratios)).capacity:
        raise ConfigError(
            f"--segment {spec.segment} with --sink {spec.sink} and --overlap {spec.overlap} leaves no room for "
            f"memories in the model's {window} positions: choose a shorter --segment, or extend the model first "
            "(longext extend)."
        )


def check_ratios(ratios: Sequence[int], spec: CompressorSpec, window: int) -> tuple[int, ...]:
    """Return `ratios`; ConfigError unless they differ and a compressor of `spec` can make each, trained or not."""
    _check_different(ratios)
    for ratio in ratios:
        check_ratio(spec, ratio, window, larger=True)
    return tuple(ratios)


def _check_different(ratios: Sequence[int]) -> None:
    if not ratios or len(set(ratios)) < len(ratios):
        raise ConfigError(f"--ratio must be different whole numbers, got {','.join(map(str, ratios))}.")


def check_ratio(spec: CompressorSpec, ratio: int, window: int, *, larger: bool = False) -> None:
    """Raise ConfigError unless a compressor of `spec` can work at `ratio` in `window` positions.

    Any divisor of the segment does if ratios nest, else those of training.

    Args:
        larger: so do divisors above those of training, which need no slots that are not there.
    """
    known = ", ".join(map(str, spec.ratios))
    if ratio < 1 or spec.segment % ratio:
        raise ConfigError(
            f"A ratio of {ratio} does not divide the compressor's segments of {spec.segment} tokens (it was trained at "
            f"{known})."
        )
    is_possible = COMPRESSORS[spec.arch].nested or (larger and ratio >= min(spec.ratios))
    if ratio not in spec.ratios and not is_possible:
        raise ConfigError(f"--ratio {ratio}: this {spec.arch} compressor was trained at {known}; choose of these.")
    if not spec.schedule(window, ratio).capacity:
        raise ConfigError(
            f"--ratio {ratio} leaves no room for a memory of {spec.segment // ratio} slots next to sink {spec.sink}, "
            f"overlap {spec.overlap} and segment {spec.segment} in the model's {window:,} positions: raise the ratio, "
            "or extend the model first (longext extend)."
        )


def check_fading(spec: CompressorSpec, ratios: tuple[int, ...], window: int) -> None:
    """Raise ConfigError unless a compressor of `spec` can read memories at these ratios by distance."""
    spelled = ",".join(map(str, ratios))
    if not COMPRESSORS[spec.arch].nested:
        raise ConfigError(
            f"Ratios by distance ({spelled}) need memories that can be thinned, and those of {spec.arch} cannot: give "
            "one ratio, or train uio or anchor."
        )
    for ratio in ratios:
        check_ratio(spec, ratio, window)
    if any(later % ratio or later == ratio for ratio, later in itertools.pairwise(ratios)):
        raise ConfigError(f"Ratios by distance must each be a multiple of the one before, as in 2,4,8; got {spelled}.")
    near = 2 ** (len(ratios) - 1) - 1
    if spec.schedule(window, ratios).capacity <= near:
        raise ConfigError(
            f"Ratios {spelled} by distance take {near * spec.segment:,} tokens before the last one is reached, and "
            f"their slots do not fit the model's {window:,} positions next to sink {spec.sink}, overlap {spec.overlap} "
            f"and segment {spec.segment}: leave out the first ratios, or extend the model first (longext extend)."
        )
