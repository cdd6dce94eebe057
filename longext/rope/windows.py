"""Two windows in one checkpoint: short texts keep the RoPE of the weights, longer ones get a new one (`longrope`)."""

from __future__ import annotations

from longext.errors import ConfigError
from longext.rope.formulas import base_inv_freq
from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq, methods_that


def trained_window(spec: RopeSpec) -> int:
    """Return how many tokens weights were trained on under `spec`."""
    stretch = 1.0 if ROPE_METHODS[spec.method].is_exact_inside else spec.factor
    return round(spec.original_max_position_embeddings * stretch)


def join_windows(original: RopeSpec, new: RopeSpec, target_length: int) -> RopeSpec:
    """Return `longrope` whose short factors are `original` and whose long factors are `new` at `target_length`.

    transformers takes the short factors for sequences of up to the trained window of `original` (LongRoPE2, arXiv
    2502.20082, section 3.3). Both windows have the temperature of `original`, since the type has one for both.

    Args:
        original: the RoPE that the weights were trained with.
        new: that of longer sequences; its `attention_factor`, if given, must be that of `original`.

    Raises:
        ConfigError: one of the two follows the length of the sequence, or they have different temperatures.
    """
    for spec in (original, new):
        if ROPE_METHODS[spec.method].follows_length and not (spec is new and spec.method == "longrope"):
            static = methods_that(lambda method: not method.follows_length)
            raise ConfigError(
                f"Two windows need one RoPE each, and `{spec.method}` follows the length: choose one of {static}."
            )
    short, temperature = compute_inv_freq(original)
    long, _ = compute_inv_freq(new, target_length)
    if new.attention_factor not in (None, temperature):
        raise ConfigError(
            f"Two windows share one temperature, that of the original RoPE ({temperature:g}), got --attention-factor "
            f"{new.attention_factor:g}: leave it out."
        )
    window = trained_window(original)
    return RopeSpec(
        method="longrope",
        rope_theta=original.rope_theta,
        rotary_dim=original.rotary_dim,
        original_max_position_embeddings=window,
        factor=target_length / window,
        attention_factor=temperature,
        mscale=original.mscale,
        mscale_all_dim=original.mscale_all_dim,
        num_rotated=original.num_rotated,
        short_factor=tuple((base_inv_freq(original) / short).tolist()),
        long_factor=tuple((base_inv_freq(original) / long).tolist()),
    )
