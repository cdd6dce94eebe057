"""Which norms lora+embed+norm trains: LongLoRA's rule, "norm" in the name; and what `plan` counts of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import CONFIGS, save_tiny_model, tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from longext.checkpoint.weights import main_dtype
from longext.conversion.config import MergeConfig
from longext.conversion.merge import merge_adapter
from longext.conversion.verify import _check_trained
from longext.errors import ConfigError
from longext.planning.config import PlanConfig
from longext.planning.setup import setup_of
from longext.planning.shape import read_shape
from longext.report.commands.training import _passes
from longext.training.config import FinetuneConfig
from longext.training.tuning import make_trainable, norm_modules

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3", "gpt_neox", "phi", "mixtral"]
INSIDE = {"qwen3": 2, "gemma3_text": 2, "gemma3": 2, "olmo2": 2, "olmo3": 2}  # q_norm and k_norm of each layer
CONFIG = FinetuneConfig(model="tiny", data="sample", device="cpu", dtype="float32", lora_r=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_with_norm_in_their_name(family):
    """As LongLoRA's fine-tune.py takes them from named_parameters; a vision tower is no part of the language model."""
    model = tiny_model(family)
    named = {name.rpartition(".")[0] for name, _ in model.named_parameters() if "norm" in name and "vision" not in name}
    named = {name for name in named if "multi_modal" not in name}
    assert set(norm_modules(model)) == named
    inside = set(norm_modules(model)) - set(norm_modules(model, "residual"))
    assert len(inside) == INSIDE.get(family, 0) * model.config.get_text_config().num_hidden_layers
    assert all("attn" in name for name in inside)


@pytest.mark.parametrize("norms", ["all", "residual"])
def test_what_is_trained_is_saved_and_merged(tmp_path, norms):
    base = save_tiny_model(CONFIGS["qwen3"](), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ("q_proj", "v_proj")
    config = dataclasses.replace(CONFIG, model=str(base), norms=norms, lora_targets=targets)
    adapted, trainable = make_trainable(model, config, str(base))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = merge_adapter(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].self_attn.q_norm.weight - 1
    assert torch.allclose(moved, torch.full_like(moved, 0.1 if norms == "all" else 0.0), atol=1e-6)
    assert result.counts["norm replaced"][0] == (9 if norms == "all" else 5)
    setup = setup_of(PlanConfig(model=str(base), length=64, lora_r=2), 1, read_shape(base))
    planned = setup.trainable(read_shape(base))
    lora = trainable.by_kind["lora"]
    if norms == "all":
        assert planned - read_shape(base).lora_weights(2) == trainable.num_trainable - lora


@pytest.mark.parametrize("tuning", ["lora", "lora+embed+norm", "full"])
def test_a_vision_tower_stays_as_it_is(tuning):
    model = tiny_model("gemma3")
    adapted, trainable = make_trainable(model, dataclasses.replace(CONFIG, tuning=tuning), "base")
    adapted(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None], use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    assert trainable.num_trainable
    assert not any("vision" in name for name in trainable.modules)


def test_a_tied_embedding_is_trained_whole_or_adapted():
    model = tiny_model("gemma2")
    config = dataclasses.replace(CONFIG, lora_targets=("q_proj", "lm_head"))
    with pytest.raises(ConfigError, match="'lm_head' is the embedding of this model too"):
        make_trainable(model, config, "base")


def test_weights_are_of_the_type_that_most_are_stored_in(tmp_path):
    tensors = {"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(2), "c": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert main_dtype(tmp_path) == "bfloat16"


def test_what_was_trained_and_how_often_the_data_were_read_is_said():
    assert "all were trained" in _check_trained({}, {}, {"num_trainable": 9, "num_total": 9}).detail
    assert "7 of 9 parameters were trained" in _check_trained({}, {}, {"num_trainable": 7, "num_total": 9}).detail
    assert _passes({"rows_per_epoch": 22}, 8000) == "22 rows, read 364 times"
