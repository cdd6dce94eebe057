"""A config that says tied over a file with another output matrix: everything computes what plain transformers does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from adapters import load_tensors, make_adapter
from families import CONFIGS, save_tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.tying import is_tied
from longext.conversion.config import MergeConfig
from longext.conversion.merge import merge_adapter
from longext.errors import CheckpointError
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig
from longext.planning.shape import read_shape
from longext.training.config import FinetuneConfig
from longext.training.loading import load_for_training, plan_training_rope
from longext.training.longlora import finetune_checkpoint
from longext.training.tuning import make_trainable

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.randint(3, 60, (1, 48), generator=torch.Generator().manual_seed(0))
ENDS = {
    "other": lambda e: e + 0.05 * torch.randn(e.shape, generator=torch.Generator().manual_seed(0)),
    "rounded": lambda e: e.bfloat16().float(),
    "equal": lambda e: e.clone(),
}


def store(base, tensors):
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def base_with(folder, kind, family="llama"):
    """A tiny model whose config says tied and whose file holds an output matrix of its own."""
    config = CONFIGS[family]()
    config.tie_word_embeddings, config.vocab_size = True, 8192  # the tokenizer's
    save_tiny_model(config, folder / "base")
    tensors = load_file(folder / "base/model.safetensors")
    (name,) = [name for name in tensors if "embed" in name]
    head = HEAD if family == "llama" else "embed_out.weight"
    save_file(
        {**tensors, head: ENDS[kind](tensors[name])}, folder / "base/model.safetensors", metadata={"format": "pt"}
    )
    for file in BUNDLED_MODELS["books-5m"].glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    return folder / "base"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.double()


def plain(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def with_adapter(base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(plain(base), str(adapter)))


@pytest.mark.parametrize("kind", ENDS)
def test_evaluation_is_plain_transformers_and_says_so(tmp_path, kind):
    base = base_with(tmp_path, kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_language_model(RuntimeConfig(model=str(base), device="cpu", dtype="float32")).model
    assert torch.equal(logits(model), logits(plain(base)))
    assert any("another output matrix" in str(one.message) for one in said) == (kind != "equal")


@pytest.mark.parametrize("kind", ENDS)
def test_plan_counts_the_matrices_there_are(tmp_path, kind):
    base = base_with(tmp_path, kind)
    shape, model = read_shape(base), plain(base)
    assert shape.num_parameters == shape.counted == sum(p.numel() for p in model.parameters())
    assert shape.tied == (kind == "equal")


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("ends", ["embedding", "both"])
def test_a_merge_is_base_and_adapter(tmp_path, kind, ends):
    base = base_with(tmp_path, kind)
    keys = {} if ends == "embedding" else {"embedding": False, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    adapter = make_adapter(base, tmp_path / "adapter", **{"ensure_weight_tying": False, **keys})
    result = merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "out")))
    expected = with_adapter(base, adapter)
    assert (logits(plain(tmp_path / "out")) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert result.merge.adapter.is_tied == (kind == "equal")
    assert any("another output matrix" in note for note in result.merge.notes) == (kind != "equal")
    written = load_tensors(tmp_path / "out")
    if ends == "embedding":
        assert torch.equal(written[HEAD], load_file(base / "model.safetensors")[HEAD])
    # whatever a reader does with the flag, it computes the same now
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_the_output_matrix_has_another_name_in_some_files(tmp_path):
    base = base_with(tmp_path, "other", "gpt_neox")
    targets = ["query_key_value", "dense"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets, ensure_weight_tying=False)
    merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "out")))
    expected = with_adapter(base, adapter)
    assert (logits(plain(tmp_path / "out")) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:config.json says tie_word_embeddings")
@pytest.mark.parametrize("kind", ENDS)
def test_training_keeps_the_output_matrix_that_is_stored(tmp_path, kind):
    base = base_with(tmp_path, kind)
    config = FinetuneConfig(model=str(base), data="sample", device="cpu", dtype="float32")
    model, _ = load_for_training(config, plan_training_rope(config))
    before = model.lm_head.weight.detach().clone()
    assert is_tied(model) == model.config.tie_word_embeddings == (kind == "equal")
    adapted, _ = make_trainable(model, config, str(base))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora" not in name}
    assert any("embed_tokens" in name for name in trained)
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(1.0)
    moved = not torch.equal(adapted.get_output_embeddings().weight, before)
    assert moved == (kind == "equal")


@pytest.mark.filterwarnings("ignore:config.json says tie_word_embeddings")
@pytest.mark.parametrize("tuning", ["lora+embed+norm", "full"])
def test_a_run_trains_and_writes_both(tmp_path, tuning):
    """One step of a learning rate that moves nothing: what is written computes what the base does."""
    base = base_with(tmp_path, "other")
    asked = FinetuneConfig(
        model=str(base), data="sample", target_length=64, num_steps=1, accumulation=1, device="cpu", tuning=tuning
    )
    asked = dataclasses.replace(asked, learning_rate=1e-12, output=str(tmp_path / "out"), warmup_steps=0)
    finetune_checkpoint(asked, tmp_path / "out")
    if tuning == "full":
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
        written = load_tensors(tmp_path / "out")
        assert (written[HEAD] - load_file(base / "model.safetensors")[HEAD]).abs().max() < 1e-6
    assert (logits(plain(tmp_path / "out")) - logits(plain(base))).abs().max() < 1e-4


def test_a_missing_end_is_refused(tmp_path):
    base = base_with(tmp_path, "other")
    adapter = make_adapter(base, tmp_path / "adapter", norms=False, embedding=False)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != EMBEDDING}, base / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=f"no input embedding '{EMBEDDING}' .only '{HEAD}'"):
        merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "out")))
    store(base, {k: v for k, v in tensors.items() if k != HEAD})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=f"lacks '{HEAD}'.*tie_word_embeddings"):
        merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "out")))
