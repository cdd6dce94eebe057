"""The frequencies of every method against transformers' initialisers and against code written here from the papers."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from rope_examples import CASES, METHODS, case_id, example, spec_for
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longext.errors import ConfigError
from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq, rope_parameters

RTOL = 1e-6
LENGTH = 4096
SHAPES = list(itertools.product((64, 80, 96, 128), (1e4, 5e5, 1e6)))
FACTORS = (2.0, 4.0, 7.5, 16.0, 32.0)
RAMPS = {"ramp", "truncate", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"}


def tolerance(keys, factor):
    """1e-6 for every method as it comes; with another ramp, what float32 allows.

    transformers computes the ramp in float32: an error of 2^-23 in a gamma near 0 is `factor` times as large relative
    to the frequency, 3.8e-6 at factor 32.
    """
    return max(RTOL, factor * 2**-23) if RAMPS & keys.keys() else RTOL


def llama_config(spec):
    keeps = ROPE_METHODS[spec.method].keeps_length
    return LlamaConfig(
        hidden_size=4 * spec.rotary_dim,
        num_attention_heads=4,
        head_dim=spec.rotary_dim,
        max_position_embeddings=LENGTH if keeps else round(LENGTH * spec.factor),
        rope_parameters=rope_parameters(spec),
    )


def test_every_method_brings_examples():
    assert [name for name in ROPE_METHODS if not ROPE_METHODS[name].examples] == []


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_export_reproduces_the_paper_through_transformers(case, head_dim, theta):
    method, keys = case[0], example(case[0], head_dim, case[1])
    for factor in FACTORS:
        spec = spec_for(method, head_dim, theta, factor, **keys)
        module = LlamaRotaryEmbedding(llama_config(spec))
        end = round(LENGTH * factor)
        lengths = (100, LENGTH, LENGTH + 1, end, 32 * LENGTH) if ROPE_METHODS[method].follows_length else (None, end)
        for length in lengths:
            if length is not None:
                module(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
            expected, temperature = compute_inv_freq(spec, length)
            np.testing.assert_allclose(module.inv_freq.double().numpy(), expected, rtol=tolerance(keys, factor))
            assert module.attention_scaling == pytest.approx(temperature, rel=RTOL if temperature != 1 else 0, abs=0)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_plainest_example_is_written_as_the_type_that_the_method_names(case):
    method = ROPE_METHODS[case[0]]
    written = rope_parameters(spec_for(case[0], 64, 1e4, 4.0, **example(case[0], 64, case[1])))["rope_type"]
    assert written == method.rope_type if case[1] == 0 else written in ROPE_INIT_FUNCTIONS or written == "default"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_parameters_that_an_example_sets_are_the_methods_own(case):
    parameters = {parameter.name for parameter in ROPE_METHODS[case[0]].parameters}
    assert example(case[0], 64, case[1]).keys() <= parameters <= {field.name for field in fields(RopeSpec)}


@pytest.mark.parametrize("name", ROPE_METHODS)
def test_a_method_is_what_it_says_of_itself(name):
    method, keys = ROPE_METHODS[name], example(name, 64)
    plain, _ = compute_inv_freq(spec_for("none", 64, 1e4, 1.0))
    inside, beyond = (compute_inv_freq(spec_for(name, 64, 1e4, 4.0, **keys), n)[0] for n in (LENGTH, 4 * LENGTH))
    at_one, temperature = compute_inv_freq(spec_for(name, 64, 1e4, 1.0, **keys))
    assert method.is_exact_inside == (inside == plain).all()
    assert method.follows_length == (inside != beyond).any()
    is_unchanged = np.allclose(at_one, plain, rtol=1e-9) and temperature == 1.0
    assert method.is_scaling == (is_unchanged and not method.follows_length)
    assert [other for other in ROPE_METHODS if ROPE_METHODS[other].colour == method.colour] == [name]


@pytest.mark.parametrize(
    ("method", "keys", "text"),
    [
        ("linear", {"factor": 0.5}, "`factor` must be a number >= 1 (target length / trained length), got 0.5."),
        ("dynamic", {"alpha": 0.5}, "`alpha` must be >= 1, got 0.5."),
        ("yarn", {"attention_factor": math.nan}, "`attention_factor` must be above 0, got nan."),
        ("yarn", {"ramp": "codes"}, "`ramp` must be 'code' or 'paper', got 'codes'."),
        ("yarn", {"beta_slow": 0.0}, "`beta_fast` must be above `beta_slow` and both above 0, got 32 and 0."),
        ("llama3", {"low_freq_factor": 4.0}, "`high_freq_factor` must be above `low_freq_factor` and both above 0"),
        ("cope", {"num_clipped": 33}, "`num_clipped` must be at most 32 (pairs), got 33."),
        ("cope", {"num_clipped": -1}, "`num_clipped` must be >= 0, got -1."),
        ("cope", {"new_rope_theta": 100.0}, "--rope-theta must not be below the model's own 10000, got 100."),
        ("cope", {"clip": "soft"}, "`clip` must be 'cosine' or 'hard', got 'soft'."),
        ("resonance", {"waves": "abf"}, "`waves` must be 'yarn' or 'ntk' or 'linear' or 'none', got 'abf'."),
        ("p-rope", {"rotary_share": 1.5}, "`rotary_share` must be at most 1 (all pairs turn), got 1.5."),
        ("longrope", {"long_factor": (1.0,)}, "`long_factor` must have 32 numbers (rotary dimensions / 2), got 1."),
        (
            "yarn",
            {"num_rotated": 8},
            "proportional RoPE (some dimensions of a head stay unrotated): choose one of abf,",
        ),
    ],
)
def test_a_parameter_out_of_range_is_refused(method, keys, text):
    for question in (compute_inv_freq, rope_parameters):
        with pytest.raises(ConfigError, match=re.escape(text)):
            question(spec_for(method, 64, 1e4, **{"factor": 4.0, **keys}))


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


def test_cope_is_the_authors_code():
    """Values of github.com/hrlics/CoPE at ed52ba5 (float32, run on Llama 3 8B's shape): 20 pairs are theirs too."""
    soft, _ = compute_inv_freq(spec_for("cope", 128, 5e5, 8.0, 8192, new_rope_theta=1e7))
    hard, _ = compute_inv_freq(spec_for("cope", 128, 5e5, 8.0, 8192, new_rope_theta=1e7, clip="hard"))
    theirs = [1.9809568e-5, 1.5399264e-5, 1.1889217e-5, 8.6408158e-7, 1.1284762e-9]
    np.testing.assert_allclose(soft[[43, 44, 45, 53, 62]], theirs, rtol=2e-6)
    assert soft[63] < 1e-20
    np.testing.assert_allclose(hard[:44], soft[:44], rtol=0)
    assert (hard[44:] < 1e-18).all()


def test_resonance_is_the_authors_code():
    """Wavelengths of github.com/sheryc/resonance_rope at 4a7f5a7 (float32, run): with YaRN, with NTK, alone."""
    pairs = [0, 1, 10, 20, 30, 40, 63]
    waves = {
        "yarn": [6, 7, 26, 112, 710, 6078, 435281],
        "ntk": [6, 7, 37, 216, 1268, 7440, 435281],
        "none": [6, 7, 26, 112, 471, 1987, 54410],
    }
    for under, expected in waves.items():
        inv_freq, temperature = compute_inv_freq(spec_for("resonance", 128, 1e4, 8.0, waves=under))
        np.testing.assert_allclose(2 * np.pi / inv_freq[pairs], expected, rtol=1e-12)
        assert temperature == pytest.approx(1.2079442 if under == "yarn" else 1.0)


def test_pairs_that_stop_are_those_that_make_no_turn_in_training():
    """64 dimensions, L = 512, base 10,000: the critical pair is 16 (arXiv 2502.20082), and p = 1/4 keeps 8."""
    plain, _ = compute_inv_freq(spec_for("none", 64, 1e4, 1.0, 512))
    for kept, share in ((16, None), (8, 0.25), (0, 0.0), (32, 1.0)):
        inv_freq, _ = compute_inv_freq(spec_for("p-rope", 64, 1e4, 8.0, 512, rotary_share=share))
        assert (inv_freq[:kept] == plain[:kept]).all()
        assert (inv_freq[kept:] < 1e-14).all()


def test_a_stopped_pair_does_not_turn_in_float32_a_million_positions_on():
    module = LlamaRotaryEmbedding(llama_config(spec_for("drope", 64, 1e4, 32.0)))
    cos, sin = module(torch.zeros(1), torch.tensor([[0, 1, 32 * LENGTH, 10**6]]))
    assert torch.equal(cos, torch.ones_like(cos))
    assert sin.abs().max() < 2e-9


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


SCALING = [name for name in METHODS if ROPE_METHODS[name].is_scaling]


@pytest.mark.parametrize("method", [*SCALING, *(name for name in ROPE_METHODS if ROPE_METHODS[name].is_exact_inside)])
def test_factor_one_is_the_identity(method):
    plain, _ = compute_inv_freq(spec_for("none", 96, 1e4, 1.0))
    spec = spec_for(method, 96, 1e4, 1.0)
    same, temperature = compute_inv_freq(spec)
    assert (same == plain).all()
    assert temperature == 1.0
    module, base = (LlamaRotaryEmbedding(llama_config(s)) for s in (spec, spec_for("none", 96, 1e4, 1.0)))
    assert torch.equal(module.inv_freq, base.inv_freq)


@pytest.mark.parametrize("method", SCALING)
def test_the_formula_tends_to_the_identity(method):
    plain, _ = compute_inv_freq(spec_for("none", 96, 1e4, 1.0))
    near, temperature = compute_inv_freq(spec_for(method, 96, 1e4, 1.0 + 1e-9))
    np.testing.assert_allclose(near, plain, rtol=1e-8)
    assert temperature == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("method", SCALING)
def test_frequencies_fall_with_dimension_and_with_the_factor(method):
    rows = [compute_inv_freq(spec_for(method, 128, 1e4, factor))[0] for factor in FACTORS]
    assert all((np.diff(row) < 0).all() for row in rows)
    assert all((b <= a + 1e-15).all() for a, b in itertools.pairwise(rows))
