"""Clipped RoPE: a raised base, and the slowest pairs faded out."""

from __future__ import annotations

from longext.errors import ConfigError
from longext.rope.formulas import ATTENTION_FACTOR, bake_as_longrope, base_inv_freq, stop
from longext.rope.methods.ntk import ntk_rope_theta
from longext.rope.spec import ROPE_METHODS, Array, Parameter, RopeMethod, RopeSpec


def _count(spec: RopeSpec) -> int:
    """Return how many pairs are clipped: those that turn by less than a radian in L, the authors' 20 on Llama 3 8B."""
    if spec.num_clipped is not None:
        return spec.num_clipped
    return int((base_inv_freq(spec) * spec.original_max_position_embeddings < 1).sum())


def _inv_freq(spec: RopeSpec, _: int | None = None) -> Array:
    import numpy as np

    inv_freq = base_inv_freq(spec, spec.new_rope_theta or ntk_rope_theta(spec, spec.factor))
    count = _count(spec)
    mask = np.ones_like(inv_freq)
    mask[len(mask) - count :] = (1 + np.cos(np.linspace(0, np.pi, count))) / 2 if spec.clip == "cosine" else 0
    return stop(spec, inv_freq * mask, mask == 0)


def _check(spec: RopeSpec) -> None:
    if _count(spec) > spec.rotary_dim // 2:
        raise ConfigError(f"`num_clipped` must be at most {spec.rotary_dim // 2} (pairs), got {spec.num_clipped}.")
    if spec.new_rope_theta is not None and spec.new_rope_theta < spec.rope_theta:
        raise ConfigError(
            f"--rope-theta must not be below the model's own {spec.rope_theta:g}, got {spec.new_rope_theta:g}."
        )


ROPE_METHODS.register(
    "cope",
    RopeMethod(
        title="CoPE (clipped RoPE)",
        reference="arXiv 2602.05258 (github.com/hrlics/CoPE)",
        formula="inv_freq_i = m_i theta'^(-2i/d), m = 1, for the slowest n pairs (1 + cos phi) / 2, phi from 0 to pi",
        rope_type="longrope",
        inv_freq=_inv_freq,
        attention_factor=lambda spec: spec.attention_factor or 1.0,
        export=lambda spec: bake_as_longrope(spec, _inv_freq(spec), spec.attention_factor or 1.0),
        check=_check,
        parameters=(
            Parameter("new_rope_theta", "the raised base", flag="rope_theta"),
            Parameter(
                "num_clipped", "how many of the slowest pairs are clipped (those of less than 1 rad in L)", least=0
            ),
            Parameter("clip", "fade out with a cosine (default) or set to 0", choices=("cosine", "hard")),
            ATTENTION_FACTOR,
        ),
        examples=({}, {"clip": "hard"}, {"new_rope_theta": 1e7, "num_clipped": 20, "attention_factor": 1.1}),
        colour="#332288",
        is_scaling=False,
    ),
)
