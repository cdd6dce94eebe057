"""A method applied in memory equals the checkpoint that `extend` writes, loaded by plain transformers."""

from __future__ import annotations

import pytest
import torch
from extensions import books_config
from rope_examples import options_for
from transformers import AutoModelForCausalLM

from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import resolve_model
from longext.conversion import computed
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint
from longext.models.hf import load_language_model
from longext.models.methods import apply_method, plan_method
from longext.options import RuntimeConfig
from longext.rope.spec import ROPE_METHODS

IDS = torch.arange(3, 803)[None] % 8000


@pytest.mark.parametrize("method", ROPE_METHODS)
def test_set_rope_equals_the_written_checkpoint(books, method, tmp_path):
    factor = 1.0 if method == "none" else 8.0
    options = options_for(method, read_model_rope(resolve_model("books-5m")).spec.rotary_dim, tmp_path)
    asked = ":".join([method, *(f"{key}={value}" for key, value in options.items())])
    extend_checkpoint(
        ExtendConfig(model="books-5m", method=method, factor=factor, output=str(tmp_path / "out"), **options)
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = saved(IDS, use_cache=False).logits
        books.set_rope(books_config(asked, factor))
        books.reset_rope()
        assert torch.equal(books.model(IDS, use_cache=False).logits, expected)
        loaded = load_language_model(RuntimeConfig(model="books-5m", device="cpu"), asked, factor)
        assert torch.equal(loaded.model(IDS, use_cache=False).logits, expected)


def test_set_rope_and_back_is_the_identity(books):
    with torch.inference_mode():
        before = books.model(IDS, use_cache=False).logits
        plain = books.config
        books.set_rope(books_config("yarn", 8.0))
        assert not torch.equal(books.model(IDS, use_cache=False).logits, before)
        books.set_rope(plain)
        assert torch.equal(books.model(IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("method", ["dynamic", "yarn", "dca", "none"])
def test_a_method_in_place_of_another_has_its_length(books, method):
    apply_method(books, plan_method(method, "books-5m", None, 8.0), plain := dict(books.config))
    found = books.context_length
    apply_method(books, None, plain)
    assert found == (512 if method == "none" else 4096) and books.context_length == 512


def test_layers_are_found_whatever_the_caller_has_switched_off():
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            computed._compute.cache_clear()
            books_config("ntk", 3.5)  # raised: no layer that uses a RoPE


def test_yarn_at_factor_one_leaves_logits_alone(books):
    with torch.inference_mode():
        before = books.model(IDS, use_cache=False).logits
        books.set_rope(books_config("yarn", 1.0))
        assert torch.equal(books.model(IDS, use_cache=False).logits, before)


def test_a_mapped_model_scores_the_same(books):
    mapped = load_language_model(RuntimeConfig(model="books-5m", device="map"))
    assert torch.equal(mapped.score(IDS, 1).nll.cpu(), books.score(IDS, 1).nll) or mapped.device.type != "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_a_gpu_scores_like_the_cpu(books, dtype, tolerance):
    on_gpu = load_language_model(RuntimeConfig(model="books-5m", device="cuda", dtype=dtype))
    difference = on_gpu.score(IDS, 1).nll.cpu().float() - books.score(IDS, 1).nll
    assert difference.abs().mean() < tolerance


def test_frequencies_stay_float32_in_a_half_precision_model():
    model = load_language_model(RuntimeConfig(model="books-5m", device="cpu", dtype="bfloat16"), "yarn", 8.0)
    assert model.model.dtype == torch.bfloat16
    assert model.model.model.rotary_emb.inv_freq.dtype == torch.float32
