"""Evaluation of adapter directories: the numbers are those of the checkpoint that `longext merge` writes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from adapters import FUSED, add_rope, edit_adapter, make_adapter
from command_line import fails, ok, result_of
from families import CONFIGS, save_tiny_model, save_tiny_tokenizer

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.conversion.config import MergeConfig
from longext.conversion.merge import merge_adapter
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

pytestmark = pytest.mark.usefixtures("no_pictures")
BOOKS = BUNDLED_MODELS["books-5m"]
CPU = RuntimeConfig(model="", device="cpu")


@pytest.fixture
def adapter(tmp_path):
    """An adapter of books-5m with yarn, as `finetune` leaves it."""
    return add_rope(make_adapter(BOOKS, tmp_path / "adapter"), "books-5m")


def same_as_merged(directory, tmp_path, dtype="float32"):
    """Load the adapter and its merge; every parameter and the RoPE are the same."""
    merge_adapter(MergeConfig(adapter=str(directory), output=str(tmp_path / "merged"), check=False))
    ours, theirs = (
        load_language_model(dataclasses.replace(CPU, model=str(path), dtype=dtype))
        for path in (directory, tmp_path / "merged")
    )
    expected = dict(theirs.model.named_parameters())
    assert expected.keys() == dict(ours.model.named_parameters()).keys()
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for (name, one), (_, other) in zip(ours.model.named_buffers(), theirs.model.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert ours.config == theirs.config and ours.trained_length == theirs.trained_length
    return ours


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_its_merged_checkpoint(adapter, tmp_path, dtype):
    ours = same_as_merged(adapter, tmp_path, dtype)
    base = load_language_model(dataclasses.replace(CPU, model="books-5m", dtype=dtype))
    assert not torch.equal(ours.model.get_input_embeddings().weight, base.model.get_input_embeddings().weight)
    assert ours.describe()["adapter"]["base"] == "books-5m"
    assert "adapter" not in base.describe()


def test_ends_that_were_trained_apart_are_both_loaded(adapter, tmp_path):
    """Tied in the base, no longer in the adapter."""

    def untie(tensors):
        tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"] * 1.01

    edit_adapter(adapter, untie)
    ours = same_as_merged(adapter, tmp_path)
    assert ours.model.get_output_embeddings().weight is not ours.model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3", "phi3"])
def test_other_families(tmp_path, family):
    base = save_tiny_model(CONFIGS[family](), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **({"target_modules": FUSED[family]} if family in FUSED else {}))
    save_tiny_tokenizer(adapter)
    same_as_merged(adapter, tmp_path)


def test_commands_measure_it_and_say_so(run, tmp_path, adapter):
    args = ("--data", "sample", "--lengths", 64, "--stride", 32, "--max-tokens", 300, "--num-bootstrap", 0)
    own = json.loads(ok(run("eval", "ppl", "adapter", *args, "--json", "-o", "a")))
    ok(run("merge", "adapter", "-o", "merged", "--no-check"))
    merged = json.loads(ok(run("eval", "ppl", "merged", *args, "--json", "-o", "m")))
    assert [row["ppl"] for row in own["results"]] == [row["ppl"] for row in merged["results"]]
    assert own["model"]["adapter"]["base"] == "books-5m"
    assert own["model"]["rope_parameters"] == merged["model"]["rope_parameters"]
    ok(
        run(
            "eval",
            "ppl",
            "adapter",
            *args,
            "--memory",
            "window:32",
            "--segment",
            32,
            "--protocol",
            "sliding",
            "-o",
            "w",
        )
    )
    assert result_of(tmp_path / "w")["model"]["adapter"] == own["model"]["adapter"]


def test_what_cannot_be_is_told_in_one_line(run, tmp_path, adapter):
    fails(run("eval", "ppl", "adapter", "--method", "yarn", "--factor", 2), 2, "--method yarn", "longext merge")
    fails(run("verify", "adapter"), 2, "holds an adapter", "longext merge")
    (adapter / "run.json").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "nowhere"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    fails(run("eval", "ppl", "adapter"), 2, "names 'nowhere', which is not here")
