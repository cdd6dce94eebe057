"""The frequencies of every method against transformers' initialisers and against code written here from the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longext.rope.methods import ROPE_METHODS, RopeSpec, compute_inv_freq, rope_parameters

RTOL = 1e-6
LENGTH = 4096
SHAPES = list(itertools.product((64, 80, 96, 128), (1e4, 5e5, 1e6)))
FACTORS = (2.0, 4.0, 7.5, 16.0, 32.0)


def tolerance(keys, factor):
    """1e-6 for every method as it comes; with other ramp ends, what float32 allows.

    transformers computes the ramp in float32: an error of 2^-23 in a gamma near 0 is `factor` times as large relative
    to the frequency, 3.8e-6 at factor 32.
    """
    return RTOL if not keys else max(RTOL, factor * 2**-23)


# (method, parameters): every method and every option that changes frequencies or temperature
CASES = [
    ("none", {}),
    ("linear", {}),
    ("ntk", {}),
    ("abf", {"new_rope_theta": 5e6}),
    ("ntk-by-parts", {}),
    ("ntk-by-parts", {"ramp": "code"}),
    ("ntk-by-parts", {"beta_fast": 16.0, "beta_slow": 2.0}),
    ("ntk-by-parts", {"attention_factor": 1.1}),
    ("yarn", {}),
    ("yarn", {"ramp": "paper"}),
    ("yarn", {"truncate": False}),
    ("yarn", {"attention_factor": 1.25, "beta_fast": 48.0, "beta_slow": 2.0}),
    ("llama3", {}),
    ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 8.0}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in keys.items())]) for name, keys in CASES]


def spec_for(method, head_dim, theta, factor, **keys):
    return RopeSpec(
        method=method,
        rope_theta=theta,
        rotary_dim=head_dim,
        original_max_position_embeddings=LENGTH,
        factor=factor,
        **keys,
    )


def llama_config(spec):
    keeps = ROPE_METHODS[spec.method].keeps_length
    return LlamaConfig(
        hidden_size=4 * spec.rotary_dim,
        num_attention_heads=4,
        head_dim=spec.rotary_dim,
        max_position_embeddings=LENGTH if keeps else round(LENGTH * spec.factor),
        rope_parameters=rope_parameters(spec),
    )


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize(("method", "keys"), CASES, ids=IDS)
def test_export_reproduces_the_paper_through_transformers(method, keys, head_dim, theta):
    for factor in FACTORS:
        spec = spec_for(method, head_dim, theta, factor, **keys)
        module = LlamaRotaryEmbedding(llama_config(spec))
        expected, temperature = compute_inv_freq(spec, round(LENGTH * factor))
        np.testing.assert_allclose(module.inv_freq.double().numpy(), expected, rtol=tolerance(keys, factor))
        assert module.attention_scaling == pytest.approx(temperature, rel=RTOL)


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_dynamic_ntk_at_every_length(head_dim, theta, alpha):
    spec = spec_for("dynamic", head_dim, theta, 8.0, alpha=alpha)
    for length in (100, LENGTH, LENGTH + 1, 3 * LENGTH, 32 * LENGTH):
        inv_freq, scaling = ROPE_INIT_FUNCTIONS["dynamic"](llama_config(spec), torch.device("cpu"), seq_len=length)
        expected, temperature = compute_inv_freq(spec, length)
        np.testing.assert_allclose(inv_freq.double().numpy(), expected, rtol=RTOL)
        assert scaling == temperature == 1.0


@pytest.mark.parametrize("given", [None, 1.0, 1.3])
def test_longrope_on_both_sides_of_the_trained_length(given):
    short = tuple(np.linspace(1, 1.5, 32))
    long = tuple(np.linspace(1, 16, 32))
    spec = spec_for("longrope", 64, 1e4, 16.0, short_factor=short, long_factor=long, attention_factor=given)
    module = LlamaRotaryEmbedding(llama_config(spec))
    for length in (LENGTH, LENGTH + 1):
        module(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
        expected, temperature = compute_inv_freq(spec, length)
        np.testing.assert_allclose(module.inv_freq.double().numpy(), expected, rtol=RTOL)
        assert module.attention_scaling == pytest.approx(temperature, rel=RTOL)


def yarn_authors_inv_freq(dim, base, length, scale, beta_fast=32, beta_slow=1):
    """The ramp of the YaRN authors' code, written out from its description (float64, one dimension at a time)."""
    low = math.floor(dim * math.log(length / (beta_fast * 2 * math.pi)) / (2 * math.log(base)))
    high = math.ceil(dim * math.log(length / (beta_slow * 2 * math.pi)) / (2 * math.log(base)))
    low, high = max(low, 0), min(high, dim - 1)
    values = []
    for i in range(dim // 2):
        frequency = 1 / base ** (2 * i / dim)
        keep = 1 - min(1, max(0, (i - low) / (high - low)))
        values.append(frequency / scale * (1 - keep) + frequency * keep)
    return np.array(values), 0.1 * math.log(scale) + 1


def by_parts_paper_inv_freq(dim, base, length, scale, alpha=1, beta=32):
    """Equations 17 to 20 of arXiv 2309.00071 for one dimension at a time."""
    values = []
    for d in range(dim // 2):
        frequency = base ** (-2 * d / dim)
        turns = length / (2 * math.pi / frequency)
        gamma = 0 if turns < alpha else 1 if turns > beta else (turns - alpha) / (beta - alpha)
        values.append((1 - gamma) * frequency / scale + gamma * frequency)
    return np.array(values)


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
def test_default_yarn_is_the_authors_code_and_by_parts_the_papers_equation(head_dim, theta):
    for factor in FACTORS:
        yarn, temperature = compute_inv_freq(spec_for("yarn", head_dim, theta, factor))
        expected, expected_temperature = yarn_authors_inv_freq(head_dim, theta, LENGTH, factor)
        np.testing.assert_allclose(yarn, expected, rtol=1e-12)
        assert temperature == pytest.approx(expected_temperature, rel=1e-12)
        by_parts, unit = compute_inv_freq(spec_for("ntk-by-parts", head_dim, theta, factor))
        np.testing.assert_allclose(by_parts, by_parts_paper_inv_freq(head_dim, theta, LENGTH, factor), rtol=1e-12)
        assert unit == 1.0


def test_the_two_ramps_are_different_methods():
    paper, _ = compute_inv_freq(spec_for("ntk-by-parts", 128, 1e4, 8.0))
    code, _ = compute_inv_freq(spec_for("ntk-by-parts", 128, 1e4, 8.0, ramp="code"))
    assert abs(code / paper - 1).max() > 0.5


def test_ntk_interpolates_the_slowest_dimension_by_exactly_the_factor():
    before, _ = compute_inv_freq(spec_for("none", 128, 1e4, 1.0))
    after, _ = compute_inv_freq(spec_for("ntk", 128, 1e4, 8.0))
    assert before[-1] / after[-1] == pytest.approx(8.0, rel=1e-12)
    assert after[0] == before[0] == 1.0


def test_yarn_temperature_enters_the_logits_squared():
    spec = spec_for("yarn", 64, 1e4, 16.0)
    cos, sin = LlamaRotaryEmbedding(llama_config(spec))(torch.zeros(1), torch.arange(5)[None])
    norm = (cos**2 + sin**2).double()
    np.testing.assert_allclose(norm.numpy(), (0.1 * math.log(16) + 1) ** 2, rtol=1e-6)


@pytest.mark.parametrize("method", [m for m in ROPE_METHODS if m not in ("abf", "longrope")])
def test_factor_one_is_the_identity(method):
    plain, _ = compute_inv_freq(spec_for("none", 96, 1e4, 1.0))
    spec = spec_for(method, 96, 1e4, 1.0)
    same, temperature = compute_inv_freq(spec)
    assert (same == plain).all()
    assert temperature == 1.0
    module, base = (LlamaRotaryEmbedding(llama_config(s)) for s in (spec, spec_for("none", 96, 1e4, 1.0)))
    assert torch.equal(module.inv_freq, base.inv_freq)


@pytest.mark.parametrize("method", ["yarn", "ntk-by-parts", "llama3", "linear", "ntk"])
def test_the_formula_tends_to_the_identity(method):
    plain, _ = compute_inv_freq(spec_for("none", 96, 1e4, 1.0))
    near, temperature = compute_inv_freq(spec_for(method, 96, 1e4, 1.0 + 1e-9))
    np.testing.assert_allclose(near, plain, rtol=1e-8)
    assert temperature == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("method", [m for m in ROPE_METHODS if m not in ("abf", "longrope", "dynamic", "none")])
def test_frequencies_fall_with_dimension_and_with_the_factor(method):
    rows = [compute_inv_freq(spec_for(method, 128, 1e4, factor))[0] for factor in FACTORS]
    assert all((np.diff(row) < 0).all() for row in rows)
    assert all((b <= a + 1e-15).all() for a, b in itertools.pairwise(rows))
