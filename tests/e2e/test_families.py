"""`longext extend` on a tiny random checkpoint of every family, judged by what plain transformers computes from it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, LENGTH, save_tiny_model
from rope_examples import METHODS, options_for
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longext.checkpoint.families import family_of
from longext.checkpoint.rope_config import read_model_rope
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import ExtensionPlan, extend_checkpoint
from longext.conversion.verify import verify_checkpoint
from longext.errors import ConfigError
from longext.rope.reading import read_parameters
from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq

TOLERANCE = 1e-6  # relative; float32 frequencies
BEYOND = 200  # tokens, past every trained window here
CASES = [
    (family, method)
    for family in CONFIGS
    for method in METHODS
    if not (family == "phi3" and ROPE_METHODS[method].keeps_length)
]
PER_LAYER_TYPE = ("gemma3_text", "gemma3", "olmo3")

# head_dim x partial_rotary_factor of families.py, worked out by hand.
ROTARY_DIM = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2.5", "phi3", "olmo", "olmo2", "olmo3", "falcon"), 16
    ),
    **dict.fromkeys(("qwen3", "gemma2", "gemma3_text", "gemma3"), 24),
    **dict.fromkeys(("gpt_neox", "phi", "stablelm"), 8),
}
OLD_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "rope_local_base_freq",
)
LAYOUTS = pytest.mark.parametrize("dropped", [("rope_parameters",), OLD_KEYS], ids=["old", "new"])

Extended = Callable[[str, str], tuple[Path, Path, ExtensionPlan]]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Callable[[str], Path]:
    """base(family) -> directory of its tiny model, saved once."""
    root = tmp_path_factory.mktemp("families")

    def saved(family: str) -> Path:
        directory = root / family
        return directory if directory.is_dir() else save_tiny_model(CONFIGS[family](), directory)

    return saved


@pytest.fixture(scope="session")
def extended(base, tmp_path_factory) -> Extended:
    """extended(family, method) -> (base directory, output directory, plan), at factor 4, made once."""
    root, plans = tmp_path_factory.mktemp("extended"), {}

    def made(family: str, method: str) -> tuple[Path, Path, ExtensionPlan]:
        out = root / f"{family}-{method}"
        if out not in plans:
            plans[out] = extend(base(family), method, out, **options_for(method, ROTARY_DIM[family], root))
        return base(family), out, plans[out]

    return made


def extend(model: Path, method: str, out: Path, **options: Any) -> ExtensionPlan:
    return extend_checkpoint(ExtendConfig(model=str(model), method=method, factor=4.0, output=str(out), **options))


def load(directory: Path) -> PreTrainedModel:
    """Load weights with plain transformers, every key accounted for."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(value for key, value in info.items() if key.endswith("_keys"))
    return model.eval()


def build(directory: Path) -> PreTrainedModel:
    """Build a random model from config.json alone."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).eval()


def only(directory: Path, dropped: tuple[str, ...], target: Path) -> Path:
    """Write config.json without the `dropped` keys, and nothing else, to `target`."""
    config = json.loads((directory / "config.json").read_text())
    text = config.get("text_config", config)
    target.mkdir()
    for key in dropped:
        text.pop(key, None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def rotary_buffers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, float]]:
    """(layer type or "", inv_freq, attention scaling) of every rotary module, as they are now."""
    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    assert modules
    for module in modules:
        for kind in module.rope_type if isinstance(module.rope_type, dict) else [""]:
            prefix = f"{kind}_" if kind else ""
            yield kind, getattr(module, f"{prefix}inv_freq").clone(), getattr(module, f"{prefix}attention_scaling")


def read_tokens(model: PreTrainedModel, length: int) -> None:
    """Run the model on `length` tokens; its logits must be finite."""
    with torch.inference_mode():
        assert model(torch.arange(length)[None] % 60, use_cache=False).logits.isfinite().all()


def assert_buffers(model: PreTrainedModel, spec: RopeSpec, length: int | None, local: RopeSpec | None = None) -> None:
    """Hold every rotary module's frequencies and attention factor to the formula for a sequence of `length`."""
    for kind, inv_freq, scaling in rotary_buffers(model):
        expected, temperature = compute_inv_freq(local if local and kind == "sliding_attention" else spec, length)
        np.testing.assert_allclose(inv_freq.double().numpy(), expected, rtol=TOLERANCE, atol=0)
        assert scaling == pytest.approx(temperature, rel=TOLERANCE)


def assert_computes(model: PreTrainedModel, spec: RopeSpec, local: RopeSpec | None = None) -> None:
    """Compare with the formula as built, and again after a sequence past the trained window."""
    assert_buffers(model, spec, None, local)
    read_tokens(model, BEYOND)
    assert_buffers(model, spec, BEYOND, local)


def local_spec(directory: Path) -> RopeSpec | None:
    """The RoPE of the sliding layers as longext reads it, or None where all layers share one."""
    rope = read_model_rope(directory)
    kinds = rope.local_parameters.values()
    return next((read_parameters(kind, rope.spec.rotary_dim, rope.max_position_embeddings) for kind in kinds), None)


@pytest.mark.parametrize("family", CONFIGS)
def test_rotary_dimensions_are_those_worked_out_by_hand(extended: Extended, family):
    _, _, plan = extended(family, "yarn")
    assert plan.spec.rotary_dim == ROTARY_DIM[family]
    assert plan.spec.original_max_position_embeddings == LENGTH


@pytest.mark.parametrize("family", CONFIGS)
def test_projections_are_called_as_the_row_says(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    layers = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    row = family_of(model.config.get_text_config().model_type)
    assert set(row.projections.values()) <= layers
    assert row.layout is None or ("qkv" in row.projections) == (not {"q_proj", "k_proj"} & layers)


# One type that moves the base, one that follows the length, one with keys of its own.
SPELLED = [case for case in CASES if case[1] in ("ntk", "dynamic", "yarn")]


@LAYOUTS
@pytest.mark.parametrize(("family", "method"), SPELLED)
def test_either_layout_alone_computes_the_formula(extended: Extended, family, method, dropped, tmp_path):
    source, out, plan = extended(family, method)
    assert_computes(build(only(out, dropped, tmp_path / "layout")), plan.spec, local_spec(source))


@pytest.mark.parametrize(("family", "method"), CASES)
def test_extended_checkpoint_reads_back_as_written(extended: Extended, family, method):
    _, out, plan = extended(family, method)
    rope = read_model_rope(out)
    assert rope.parameters == plan.parameters
    for length in (None, BEYOND):
        np.testing.assert_allclose(
            compute_inv_freq(rope.spec, length)[0], compute_inv_freq(plan.spec, length)[0], rtol=1e-12
        )


@pytest.mark.parametrize("method", ["ntk", "yarn"])
@pytest.mark.parametrize("family", PER_LAYER_TYPE)
def test_local_layers_keep_their_frequencies_bit_for_bit(extended: Extended, family, method):
    source, out, _ = extended(family, method)
    before, after = (
        {kind: (inv_freq.tolist(), scaling) for kind, inv_freq, scaling in rotary_buffers(load(directory))}
        for directory in (source, out)
    )
    assert set(after) == {"full_attention", "sliding_attention"}
    assert after["sliding_attention"] == before["sliding_attention"]


@pytest.mark.parametrize("family", CONFIGS)
def test_extend_leaves_the_weights_alone(extended: Extended, family, tmp_path):
    fresh = save_tiny_model(CONFIGS[family](), tmp_path / "fresh")
    outputs = [extended(family, method)[:2] for of_family, method in CASES if of_family == family]
    for directory in {directory for pair in outputs for directory in pair}:
        assert weights_hash(directory) == weights_hash(fresh)


def weights_hash(directory: Path) -> str:
    (file,) = directory.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", [method for family, method in CASES if family == "phi3"])
def test_phi3_gets_static_methods_as_longrope(extended: Extended, method):
    _, _, plan = extended("phi3", method)
    assert plan.parameters["rope_type"] in ("default", "longrope")


def test_phi3_refuses_dynamic(base, tmp_path):
    with pytest.raises(ConfigError, match="depends on the sequence length.*default, longrope"):
        extend(base("phi3"), "dynamic", tmp_path / "out")


@LAYOUTS
@pytest.mark.parametrize("family", ["gpt_neox", "phi", "stablelm"])
def test_full_rotation_is_written_where_the_default_is_partial(family, dropped, tmp_path):
    """A fraction of 1 must be spelled out: left away, transformers takes the family's 0.25 or 0.5."""
    config = CONFIGS[family]()
    config.rope_parameters["partial_rotary_factor"] = 1.0
    plan = extend(save_tiny_model(config, tmp_path / "base"), "yarn", tmp_path / "out")
    assert plan.spec.rotary_dim == config.hidden_size // config.num_attention_heads
    assert_computes(load(tmp_path / "out"), plan.spec)
    assert_computes(build(only(tmp_path / "out", dropped, tmp_path / "layout")), plan.spec)


@pytest.mark.parametrize("family", ["olmo", "olmo2"])
def test_olmo_linear_is_spelled_as_transformers_4_demands(extended: Extended, family):
    """Its OlmoConfig refuses any `rope_scaling` but {"type", "factor"} (configuration_olmo.py of 4.57)."""
    _, out, _ = extended(family, "linear")
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == {"type": "linear", "factor": 4.0}


@LAYOUTS
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_missing_layer_type_is_filled_from_the_defaults(base, family, dropped, tmp_path):
    """transformers fills the local layers' RoPE in where `rope_parameters` has the full layers' only."""
    source, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base(family), source)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]["sliding_attention"]
    (source / "config.json").write_text(json.dumps(config))
    assert local_spec(source) is not None
    plan = extend(source, "yarn", out)
    assert_computes(load(out), plan.spec, local_spec(source))
    assert_computes(build(only(out, dropped, tmp_path / "layout")), plan.spec, local_spec(source))


@LAYOUTS
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_per_layer_family_without_local_layers_is_extended(family, dropped, tmp_path):
    config = CONFIGS[family]()
    config.layer_types = ["full_attention"] * 2
    del config.rope_parameters["sliding_attention"]
    plan = extend(save_tiny_model(config, tmp_path / "base"), "yarn", tmp_path / "out")
    assert_computes(load(tmp_path / "out"), plan.spec)
    assert_computes(build(only(tmp_path / "out", dropped, tmp_path / "layout")), plan.spec)


# --- config.json as transformers 4 wrote it -----------------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
LONG = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
LLAMA3 = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3 = {"head_dim": 24, "rope_theta": 5e5, "rope_local_base_freq": 2e4, **LAYERS}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}

UNSCALED: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 2e4, "rope_scaling": None},
    "llama-without-theta": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": 32},
    "mixtral": {"model_type": "mixtral", "rope_theta": 1e6, "num_local_experts": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 32},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "rope_theta": 1e6, "rope_scaling": None},
    "qwen3-without-head_dim": {"model_type": "qwen3", "rope_theta": 1e6},
    "phi3": {"model_type": "phi3", "rope_theta": 2e4, "original_max_position_embeddings": LENGTH},
    "phi3-partial": {"model_type": "phi3", "rope_theta": 2e4, "partial_rotary_factor": 0.75},
    "gemma2": {"model_type": "gemma2", "head_dim": 24, "rope_theta": 2e4, "sliding_window": 16},
    "gemma2-without-head_dim": {"model_type": "gemma2", "rope_theta": 2e4, "sliding_window": 16},
    "gemma3_text": {"model_type": "gemma3_text", **GEMMA3},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 25_000},
    "gpt_neox-full": {"model_type": "gpt_neox", "rotary_pct": 1.0, "rotary_emb_base": 10_000},
    "gpt_neox-without-rotary": {"model_type": "gpt_neox", "hidden_size": 64},
    "phi": {"model_type": "phi", "hidden_size": 40, "rope_theta": 2e4, "partial_rotary_factor": 0.4},
    "phi-without-partial": {"model_type": "phi", "rope_theta": 2e4},
    "stablelm": {"model_type": "stablelm", "hidden_size": 64, "rope_theta": 2e4, "partial_rotary_factor": 0.5},
    "stablelm-without-partial": {"model_type": "stablelm", "hidden_size": 64, "rope_theta": 2e4},
    "olmo": {"model_type": "olmo", "rope_theta": 2e4},
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5, "rope_scaling": None},
    "olmo3": {"model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": None, **LAYERS},
    "falcon": {"model_type": "falcon", "alibi": False, "multi_query": True, "parallel_attn": True},
}
SCALED: dict[str, dict[str, Any]] = {
    "llama-linear": {**UNSCALED["llama"], "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-dynamic": {**UNSCALED["llama"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama-llama3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "qwen2-yarn": {
        **UNSCALED["qwen2"],
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "mixtral-linear": {**UNSCALED["mixtral"], "rope_scaling": {"type": "linear", "factor": 2.0}},
    "phi3-longrope": {
        **UNSCALED["phi3"],
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", **LONG},
    },
    "phi3-su": {
        **UNSCALED["phi3"],
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "su", "original_max_position_embeddings": 32, **LONG},
    },
    "phi3-yarn": {
        **UNSCALED["phi3"],
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32, **LONG},
    },
    "gemma3_text-linear": {**UNSCALED["gemma3_text"], "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {
            **SIZES,
            **LAYERS,
            "model_type": "gemma3_text",
            "head_dim": 24,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 61,
        "eoi_token_index": 62,
        "image_token_index": 63,
    },
    "gpt_neox-linear": {**UNSCALED["gpt_neox"], "rope_scaling": {"type": "linear", "factor": 2.0}},
    "phi-dynamic": {**UNSCALED["phi"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "stablelm-linear": {**UNSCALED["stablelm"], "rope_scaling": {"type": "linear", "factor": 2.0}},
    "olmo3-yarn": {
        **UNSCALED["olmo3"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.2,
        },
    },
    "falcon-dynamic": {**UNSCALED["falcon"], "rope_theta": 2e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


def write_config(keys: dict[str, Any], directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**({} if "text_config" in keys else SIZES), **keys}))
    return directory


@pytest.mark.parametrize("name", [*UNSCALED, *SCALED])
def test_transformers_4_config_is_read_as_transformers_reads_it(name, tmp_path):
    directory = write_config({**UNSCALED, **SCALED}[name], tmp_path)
    assert_computes(build(directory), read_model_rope(directory).spec, local_spec(directory))


@LAYOUTS
@pytest.mark.parametrize("name", UNSCALED)
def test_transformers_4_checkpoint_is_extended_in_both_layouts(name, dropped, tmp_path):
    directory = write_config(UNSCALED[name], tmp_path / "base")
    save_tiny_model(AutoConfig.from_pretrained(directory), directory)
    write_config(UNSCALED[name], directory)  # over the transformers 5 one of save_pretrained
    plan = extend(directory, "yarn", tmp_path / "out")
    local = local_spec(directory)
    assert_computes(load(tmp_path / "out"), plan.spec, local)
    assert_computes(build(only(tmp_path / "out", dropped, tmp_path / "layout")), plan.spec, local)


# --- longext verify -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), [("gemma3_text", "yarn"), ("gpt_neox", "ntk")])
def test_verify_passes_every_check(base, family, method, tmp_path):
    extend(base(family), method, tmp_path / "out", copy=True)  # a hard link would need no hashing
    checks = verify_checkpoint(str(tmp_path / "out"), logits=True, hashes=True).checks
    statuses = {check.name: check.status for check in checks}
    assert statuses.pop("logits in old window") == "info"  # both methods change them by design
    assert set(statuses.values()) == {"pass"}
    assert {"config", "layouts", "frequencies", "new spelling", "old spelling", "loads", "weights"} <= set(statuses)
    assert "by SHA-256" in next(check.detail for check in checks if check.name == "weights")
