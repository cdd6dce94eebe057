"""Methods as commands spell them: name:key=value, in every command that takes --method."""

from __future__ import annotations

import pytest

from longext.conversion.config import ExtendConfig
from longext.errors import ConfigError
from longext.evals.suites.ppl import Perplexity
from longext.models.hf import load_language_model
from longext.models.methods import check_method, described, method_request
from longext.options import RuntimeConfig
from longext.rope.spec import RopeSpec


def test_a_method_brings_its_parameters():
    assert method_request("dynamic:alpha=4", "m", None, 8.0) == ExtendConfig(
        model="m", method="dynamic", factor=8.0, alpha=4.0
    )
    assert method_request("yarn:factor=2:beta-fast=16", "m", "main", 8.0) == ExtendConfig(
        model="m", method="yarn", factor=2.0, beta_fast=16.0, revision="main"
    )


@pytest.mark.parametrize("text", ["dynamo", "none:factor=2", "dynamic:alpha", "dynamic:beta=2", "dynamic:alpha=x"])
def test_what_is_no_method_is_refused_before_anything_is_loaded(text):
    with pytest.raises(ConfigError):
        check_method(text, None)


def test_the_loaded_model_has_the_parameters():
    model = load_language_model(RuntimeConfig(model="books-5m", device="cpu"), "dynamic:alpha=4", 8.0)
    assert model.config["rope_parameters"]["factor"] == 4.0  # transformers' factor of dynamic is alpha
    assert model.rope_type == "dynamic"


def test_a_formula_says_the_parameters_that_were_used():
    spec = RopeSpec(
        method="dynamic",
        rope_theta=10_000.0,
        rotary_dim=64,
        original_max_position_embeddings=512,
        factor=8.0,
        alpha=4.0,
    )
    assert described(spec).endswith("here factor 8, alpha 4")


@pytest.mark.parametrize(("lengths", "stride"), [((512, 1024), 256), ((257,), 256), ((256, 512), 128), ((64,), 32)])
def test_the_default_stride_fits_the_shortest_window(lengths, stride):
    config = Perplexity(model="m", lengths=lengths)
    config.check()
    assert config.step == stride
    with pytest.raises(ConfigError, match="--stride must be below the shortest window"):
        Perplexity(model="m", lengths=lengths, stride=min(lengths)).check()
