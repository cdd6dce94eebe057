"""Which compression ratios a trained compressor can work at, and how many memories then fit a model's window."""

from __future__ import annotations

from collections.abc import Sequence

from longext.compressor.base import COMPRESSORS, Compressor, CompressorSpec
from longext.errors import ConfigError


def find_ratio(compressor: Compressor, ratio: int | None) -> int:
    """Return the ratio to compress at: `ratio`, or the compressor's first where None.

    Raises:
        ConfigError: as `check_ratio`.
    """
    spec = compressor.spec
    chosen = spec.ratios[0] if ratio is None else ratio
    check_ratio(spec, chosen, compressor.backbone.window)
    return chosen


def check_ratios(ratios: Sequence[int], spec: CompressorSpec, window: int) -> tuple[int, ...]:
    """Return `ratios`; ConfigError unless they differ and a compressor of `spec` can make each, trained or not."""
    if not ratios or len(set(ratios)) < len(ratios):
        raise ConfigError(f"--ratio must be different whole numbers, got {','.join(map(str, ratios))}.")
    for ratio in ratios:
        check_ratio(spec, ratio, window, larger=True)
    return tuple(ratios)


def check_ratio(spec: CompressorSpec, ratio: int, window: int, *, larger: bool = False) -> None:
    """Raise ConfigError unless a compressor of `spec` can work at `ratio` in `window` positions.

    Any divisor of the segment does where ratios nest, else those of training.

    Args:
        larger: so do divisors above those of training, which need no slots that are not there.
    """
    import longext.compressor.architectures  # noqa: F401

    known = ", ".join(map(str, spec.ratios))
    if ratio < 1 or spec.segment % ratio:
        raise ConfigError(
            f"A ratio of {ratio} does not divide the compressor's segments of {spec.segment} tokens (it was trained at "
            f"{known})."
        )
    is_possible = COMPRESSORS[spec.arch].nested or (larger and ratio >= min(spec.ratios))
    if ratio not in spec.ratios and not is_possible:
        raise ConfigError(f"--ratio {ratio}: this {spec.arch} compressor was trained at {known}; choose of these.")
    if not COMPRESSORS[spec.arch].max_memories(spec, window, ratio):
        raise ConfigError(
            f"--ratio {ratio} leaves no room for a memory of {spec.segment // ratio} slots beside sink {spec.sink}, "
            f"overlap {spec.overlap} and segment {spec.segment} in the model's {window:,} positions: raise the ratio, "
            "or extend the model first (longext extend)."
        )


def num_memories(compressor: Compressor, ratio: int) -> int:
    """Return the most memories that a segment can read at once within the model's window."""
    return compressor.max_memories(compressor.spec, compressor.backbone.window, ratio)


def num_readable(compressor: Compressor, ratio: int, length: int) -> int:
    """Return the positions that stay readable of `length` tokens before a segment: sink, memory slots and overlap."""
    spec = compressor.spec
    if not length:
        return 0
    most = 1 if compressor.reads_last else num_memories(compressor, ratio)
    memories = min(spec.num_visible(length // spec.segment), most)
    return spec.sink + memories * compressor.slots(ratio) + min(spec.overlap, length)
