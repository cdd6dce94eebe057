"""What `finetune` leaves behind, as plain transformers and PEFT load it, and its checkpoints, wherever they lie."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from command_line import fails
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.conversion.config import MergeConfig
from longext.conversion.merge import merge_adapter
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

pytestmark = pytest.mark.usefixtures("no_pictures")
BOOKS = BUNDLED_MODELS["books-5m"]
TRAIN = ("--data", "sample", "--method", "linear", "--target-length", "1024", "--positions", "pose", "--window", "64")
STEPS = ("--num-steps", "2", "--accumulation", "1", "--save-every", "1", "--learning-rate", "1e-2")
IDS = torch.randint(3, 8000, (1, 80), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 base, so that merging rounds nothing, and an adapter that was trained on it for two steps."""
    from longext.cli import app

    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(BOOKS, folder / "base")
    AutoModelForCausalLM.from_pretrained(BOOKS, dtype=torch.float32).save_pretrained(folder / "base")
    args = ("finetune", str(folder / "base"), *TRAIN, *STEPS, "--set", "warmup_steps=0", "-o", str(folder / "out"))
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """Logits by hand: the base's weights, the trained ones put in, B A added; the RoPE divides positions by two."""
    return by_hand(folder / "base", folder / "out", factor=2.0)


def by_hand(base, adapter, factor):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.rotary_emb.inv_freq /= factor
    settings, held = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    own = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in held.items():
        name = key.removeprefix("base_model.model.")
        if name.endswith("lora_A.weight"):
            delta = held[key.replace("lora_A", "lora_B")] @ tensor * settings["lora_alpha"] / settings["r"]
            own[name.replace("lora_A.", "")].data += delta
        elif "lora_" not in name:
            own[name].data.copy_(tensor)
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_computes(model, expected):
    with torch.no_grad():
        difference = (model.eval()(IDS).logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


def ours(directory):
    return load_language_model(RuntimeConfig(model=str(directory), device="cpu")).model


F32 = {"dtype": torch.float32}
LOADERS = {
    "transformers": lambda out: AutoModelForCausalLM.from_pretrained(out, **F32),
    "PEFT's own": lambda out: AutoPeftModelForCausalLM.from_pretrained(out, **F32),
    "PEFT on base": lambda out: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(out / "base", **F32), out
    ),
    "longext": ours,
    "the last checkpoint": lambda out: ours(out / "checkpoints/checkpoint-2"),
    "PEFT on a checkpoint": lambda out: AutoPeftModelForCausalLM.from_pretrained(
        out / "checkpoints/checkpoint-2", **F32
    ),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_every_loader_finds_the_trained_rope(folder, expected, load):
    assert_computes(load(folder / "out"), expected)


def test_the_code_on_the_card_runs_as_it_stands(folder, expected):
    card = (folder / "out/README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        made: dict = {}
        exec(block.replace('"DIR', f'"{folder / "out"}'), made)
        assert_computes(made["model"].float(), expected)


def test_a_copy_elsewhere_loads_and_needs_no_base(folder, expected, tmp_path):
    """Links are followed by the copy; the base that run.json names is gone."""
    shutil.copytree(folder / "out", tmp_path / "copy", symlinks=True)
    manifest = json.loads((tmp_path / "copy/run.json").read_text())
    manifest["extension"]["base_path"] = manifest["extension"]["base_model"] = str(tmp_path / "gone")
    (tmp_path / "copy/run.json").write_text(json.dumps(manifest))
    assert_computes(AutoModelForCausalLM.from_pretrained(tmp_path / "copy", **F32), expected)
    assert_computes(ours(tmp_path / "copy"), expected)


def test_the_weights_of_the_base_are_linked(folder):
    assert (folder / "out/base/model.safetensors").samefile(folder / "base/model.safetensors")
    assert (folder / "out/model.safetensors").samefile(folder / "base/model.safetensors")
    assert AutoConfig.from_pretrained(folder / "out/base").rope_parameters["factor"] == 2.0
    assert len(AutoTokenizer.from_pretrained(folder / "out")) == 8192


def test_a_checkpoint_merges_wherever_it_lies(folder, expected, tmp_path):
    shutil.copytree(folder / "out/checkpoints/checkpoint-2", tmp_path / "moved")
    result = merge_adapter(MergeConfig(adapter=str(tmp_path / "moved"), output=str(tmp_path / "merged")))
    assert result.merge.extension.parameters["factor"] == 2.0
    assert_computes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **F32), expected)


def test_a_checkpoint_of_an_older_run_takes_the_rope_of_the_run_or_none(run, folder, expected, tmp_path):
    """Up to 0.1.0 checkpoints held neither config.json nor run.json."""
    shutil.copytree(folder / "out", tmp_path / "run", symlinks=True)
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    for name in ("config.json", "run.json"):
        (checkpoint / name).unlink()
    assert_computes(ours(checkpoint), expected)
    checkpoint.rename(tmp_path / "alone")
    settings = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder / "base")
    (tmp_path / "alone/adapter_config.json").write_text(json.dumps(settings))
    for command in (("merge", "alone", "-o", "merged"), ("eval", "ppl", "alone", "--data", "sample")):
        fails(run(*command), 2, "alone is of a longext run", "config.json with the RoPE", "--base")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_no_model_even_with_its_base_beside_it(run, folder):
    for command in ("extend", "verify"):
        method = ("--method", "yarn", "--factor", 2, "-o", "o") if command == "extend" else ()
        fails(run(command, folder / "out", *method), 2, "holds an adapter, not a model", "longext merge")
