"""Keys of rope_parameters beside the frequencies: what is carried, what grows with the factor, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import LENGTH, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from longext.checkpoint import _built
from longext.checkpoint.source import read_config
from longext.conversion import extend
from longext.conversion.computed import _places, compute
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint, plan_extension
from longext.conversion.verify import verify_checkpoint
from longext.errors import CheckpointError, LongextError
from longext.models.hf import HFLanguageModel

MSCALE = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 2.0, "original_max_position_embeddings": 32}
MSCALE |= {"mscale": 1.0, "mscale_all_dim": 0.8}


def saved(model_type: str, directory: Path, rope: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Save a tiny random model, its RoPE replaced."""
    config = tiny_config(model_type)
    for key, value in {**keys, **({"rope_parameters": rope} if rope else {})}.items():
        setattr(config.get_text_config(), key, value)
    is_text = config.get_text_config() is config
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    auto.from_config(config).save_pretrained(directory)
    return directory


def longer(source: Path, method: str, factor: float, **keys: Any) -> Path:
    out = source.parent / f"{source.name}-{method}-{factor:g}"
    extend_checkpoint(ExtendConfig(model=str(source), method=method, factor=factor, output=str(out), **keys))
    return out


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(100)[None] % 90 + 3, use_cache=False).logits


def rope_of(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text())
    return config.get("text_config", config)["rope_parameters"]


# --- DeepSeek's mscale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash", "youtu"])
def test_mscale_at_the_same_factor_changes_nothing(model_type, tmp_path):
    source = saved(model_type, tmp_path / "base", MSCALE)
    out = longer(source, "yarn", 2)
    assert torch.equal(logits(loaded(source)), logits(loaded(out)))
    checks = {check.name: check for check in verify_checkpoint(str(out)).checks}
    assert checks["logits in old window"].status == "pass"


@pytest.mark.parametrize("mscale", [1.0, 0.707])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash"])
def test_mscale_at_a_new_factor_is_deepseeks_formula(model_type, mscale, tmp_path):
    """modeling_deepseek.py: cos and sin by m(s, mscale) / m(s, all_dim), softmax scale by m(s, all_dim)^2."""
    source = saved(model_type, tmp_path / "base", {**MSCALE, "mscale": mscale})
    before, after = loaded(source), loaded(longer(source, "yarn", 8))

    def m(factor: float, by: float) -> float:
        return 0.1 * by * math.log(factor) + 1

    scales = [
        {name: module.scaling for name, module in model.named_modules() if hasattr(module, "scaling")}
        for model in (before, after)
    ]
    assert scales[0].keys() == scales[1].keys() != set()
    for name, scale in scales[1].items():
        assert scale / scales[0][name] == pytest.approx((m(8, 0.8) / m(2, 0.8)) ** 2)
    (rotary,) = _built.rotary_modules(after).values()
    assert rotary.attention_scaling == pytest.approx(m(8, mscale) / m(8, 0.8))


def test_mscale_is_left_out_of_methods_that_are_not_yarn(tmp_path):
    source = saved("deepseek_v3", tmp_path / "base", MSCALE)
    out = longer(source, "linear", 4, replace=True)
    assert "mscale_all_dim" not in rope_of(out)
    assert loaded(out).model.layers[0].self_attn.scaling == pytest.approx(32**-0.5)


# --- carried ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ntk", "linear", "yarn", "dynamic"])
def test_llama_4_scaling_keeps_its_length(method, tmp_path):
    out = longer(saved("ministral3", tmp_path / "base"), method, 4)
    assert rope_of(out)["llama_4_scaling_beta"] == 0.1
    assert rope_of(out)["original_max_position_embeddings"] == LENGTH
    assert logits(loaded(out)).isfinite().all()


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "glm4v", "paddleocr_vl"])
def test_sections_of_the_position_axes_are_written_in_both_spellings(model_type, tmp_path):
    source = saved(model_type, tmp_path / "base")
    out = longer(source, "yarn", 4)
    text = json.loads((out / "config.json").read_text())["text_config"]
    sections = rope_of(source)["mrope_section"]
    assert text["rope_parameters"]["mrope_section"] == sections
    assert text.get("rope_scaling", {"mrope_section": sections})["mrope_section"] == sections


def test_published_mrope_configs_are_read(tmp_path):
    """Qwen2-VL as its authors wrote it: text keys at the top, type "mrope"."""
    config = tiny_config("qwen2_vl").to_dict()
    text = config.pop("text_config")
    rope = {key: text.pop(key) for key in ("rope_parameters", "layer_types", "model_type", "dtype")}["rope_parameters"]
    config |= {**text, "model_type": "qwen2_vl", "rope_theta": 2e4}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_without_weights(tmp_path, "yarn")
    assert plan.spec.rope_theta == 2e4 and plan.parameters["mrope_section"] == rope["mrope_section"]


def plan_without_weights(directory: Path, method: str, **keys: Any) -> extend.ExtensionPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "read_shards", lambda _: [])
        return plan_extension(ExtendConfig(model=str(directory), method=method, factor=4.0, **keys))


def written(model_type: str, directory: Path, **rope: Any) -> Path:
    """Save the config of a tiny model alone, keys of its RoPE changed."""
    config = tiny_config(model_type)
    config.rope_parameters = {**config.rope_parameters, **rope}
    config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("model_type", ["llama", "jais2"])
def test_an_unknown_key_is_refused_by_name(model_type, spelling, tmp_path):
    written(model_type, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], spelling: {**rope, "spiral": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LongextError, match="`spiral`"):
        plan_without_weights(tmp_path, "yarn")


# --- bases ------------------------------------------------------------------------------------------------------------


def test_alpha_of_hunyuan_is_a_raised_base(tmp_path):
    written("hunyuan_v1_dense", tmp_path)
    spec = plan_without_weights(tmp_path, "yarn").rope.spec
    assert (spec.method, spec.rope_theta) == ("none", pytest.approx(1e4 * 1e3 ** (16 / 14)))


def test_every_layer_of_a_model_with_bases_by_layer_gets_its_own(tmp_path):
    source = saved("granite_swa", tmp_path / "base", layer_rope_theta=[1e4, 2e4])
    config = json.loads((longer(source, "ntk", 4) / "config.json").read_text())
    assert config["layer_rope_theta"] == pytest.approx([1e4 * 4 ** (16 / 14), 2e4 * 4 ** (16 / 14)])


def test_phi_moe_keeps_the_temperature_that_its_class_reads(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 2e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    source = saved("phimoe", tmp_path / "base", {**rope, "short_mscale": 1.243, "long_mscale": 1.243})
    factors = tmp_path / "factors.json"
    factors.write_text(json.dumps({"short_factor": [1.0] * 8, "long_factor": rope["long_factor"], "factor": 4.0}))
    out = tmp_path / "out"
    extend_checkpoint(ExtendConfig(model=str(source), method="longrope", factors=str(factors), output=str(out)))
    assert rope_of(out)["short_mscale"] == rope_of(out)["long_mscale"] == 1.243
    assert torch.equal(logits(loaded(source)), logits(loaded(out)))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("llama", "2 of 2 rotate with full attention"),
        ("mistral", "2 of 2 rotate in a window of 16 tokens"),
        ("cohere2", "1 of 2 rotate in a window of 16 tokens; 1 of 2 attend without RoPE"),
        ("gemma3_text", "1 of 2 keep a RoPE of their own in a window of 16 tokens; 1 of 2 rotate with full attention"),
        ("smollm3", "1 of 2 rotate with full attention; 1 of 2 attend without RoPE"),
        (
            "qwen3_next",
            "1 of 2 do not attend (linear, state-space or convolution); 1 of 2 rotate with full attention",
        ),
        ("lfm2", "1 of 2 do not attend (linear, state-space or convolution); 1 of 2 rotate with full attention"),
        ("bamba", "1 of 2 do not attend (linear, state-space or convolution); 1 of 2 rotate with full attention"),
    ],
)
def test_layers_are_counted_by_what_they_do(model_type, layers, tmp_path):
    tiny_config(model_type).save_pretrained(tmp_path)
    assert plan_without_weights(tmp_path, "yarn").layers == layers


@pytest.mark.parametrize(
    ("model_type", "gains"),
    [("cohere2", False), ("exaone4", False), ("llama4_text", False), ("mistral", False), ("llama", True)],
)
def test_an_extension_that_gains_nothing_says_so(model_type, gains, tmp_path):
    tiny_config(model_type).save_pretrained(tmp_path)
    plan = plan_without_weights(tmp_path, "yarn")
    assert any("gains nothing" in line for line in plan.warnings) is not gains


def test_a_hybrid_that_does_not_rotate_is_refused(tmp_path):
    config = tiny_config("granitemoehybrid")
    config.position_embedding_type = "nope"
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no rotary module"):
        plan_without_weights(tmp_path, "yarn")
    assert plan_without_weights(tmp_path, "yarn", check=False).parameters["rope_type"] == "yarn"


@pytest.mark.parametrize("model_type", ["llama", "cohere2", "deepseek_v3", "qwen3_moe", "gemma3_text", "qwen3_next"])
def test_large_models_are_measured_without_memory_and_alike(model_type, tmp_path, monkeypatch):
    tiny_config(model_type).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    small = compute(config, [LENGTH])
    monkeypatch.setattr(_built, "_SMALL", 0)
    large = _built.measure(_built.load_config(config), [LENGTH])
    assert large["stopped"] is None
    assert [layer["rotary"] for layer in large["layers"]] == [list(layer.rotary) for layer in small.layers]
    assert [layer["window"] for layer in large["layers"]] == [layer.window for layer in small.layers]


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("yarn", {}, None),
        ("ntk", {}, None),
        ("dynamic", {}, "ignores dynamic"),
        ("yarn", {"ramp": "paper"}, "longrope"),
        ("ntk-by-parts", {"ramp": "code"}, "once more"),
    ],
)
def test_what_llama_cpp_reads_otherwise_is_said(method, keys, words, tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    warnings = plan_without_weights(tmp_path, method, **keys).warnings
    assert not warnings if words is None else words in warnings[0]


@pytest.mark.parametrize("model_type", ["glm4v", "gemma3_text", "granite_swa", "llama"])
def test_a_held_rope_is_that_of_the_whole_length(model_type, tmp_path):
    """Generation holds dynamic NTK at its final length: every rotary module, of every layer type and position axis."""
    out = longer(saved(model_type, tmp_path / "base"), "dynamic", 4)
    config = _built.load_config(read_config(out))
    model, fresh = (_built.auto_class(config).from_pretrained(out, dtype=torch.float32).eval() for _ in range(2))
    language_model = HFLanguageModel(model_type, model, None, read_config(out), out)
    ids = torch.arange(3 * LENGTH)[None] % 90 + 3
    with torch.inference_mode():
        expected = fresh(input_ids=ids, use_cache=False).logits
        with language_model.frozen_rope(3 * LENGTH):
            first = model(input_ids=ids[:, :LENGTH], use_cache=False).logits
        short = model(input_ids=ids[:, :LENGTH], use_cache=False).logits
    torch.testing.assert_close(first, expected[:, :LENGTH], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, short, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "layers"), [("cohere2", "1 of 2 attend without RoPE"), ("gemma4_text", "rotate")]
)
def test_inspect_shows_what_the_layers_do(run, model_type, layers, tmp_path):
    tiny_config(model_type).save_pretrained(tmp_path / "model")
    result = run("inspect", tmp_path / "model", "-o", tmp_path / "out")
    assert result.exit_code == 0 and layers in " ".join(result.output.split())


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_fails_on_a_model_that_does_not_rotate(tmp_path):
    source = saved("granitemoehybrid", tmp_path / "base")
    out = longer(source, "yarn", 4)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "position_embedding_type": "nope"}))
    checks = {check.name: check for check in verify_checkpoint(str(out), logits=False, hashes=False).checks}
    assert checks["frequencies"].status == "fail" and "0 frequencies" in checks["frequencies"].detail


def test_verify_fails_if_the_softmax_scale_is_lost(tmp_path):
    source = saved("deepseek_v3", tmp_path / "base", MSCALE)
    out = longer(source, "yarn", 8)
    config = json.loads((out / "config.json").read_text())
    for rope in (config["rope_parameters"], config.get("rope_scaling") or {}):
        rope.pop("mscale_all_dim", None)
    (out / "config.json").write_text(json.dumps(config))
    assert not verify_checkpoint(str(out), hashes=False).ok


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava"])
def test_verify_passes_an_image_text_model(model_type, tmp_path):
    out = longer(saved(model_type, tmp_path / "base"), "yarn", 4)
    result = verify_checkpoint(str(out))
    assert result.ok, result.checks


def test_verify_passes_an_untouched_checkpoint_of_transformers_5(tmp_path):
    result = verify_checkpoint(str(saved("llama", tmp_path / "base")))
    assert result.ok
    (layouts,) = [check for check in result.checks if check.name == "layouts"]
    assert layouts.status == "info" and "--method none" in layouts.detail


def test_a_base_that_is_a_list_is_refused_in_a_line(tmp_path):
    source = saved("llama", tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = [10_000.0] * 4
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        plan_extension(ExtendConfig(model=str(source), method="yarn", factor=4.0))


def test_pairs_may_share_a_frequency_but_none_may_be_missing():
    formula = np.array([1.0, 0.5, 0.5, 0.1])
    assert _places(formula, formula, 1e-6) is not None
    assert _places(np.array([1.0, 0.5, 0.5, 0.5]), formula, 1e-6) is None
