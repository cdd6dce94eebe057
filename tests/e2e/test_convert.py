"""`longext convert`: LongLoRA's pair of pickle files becomes an adapter that computes what it was trained to."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from command_line import fails, ok
from families import CONFIGS, save_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longext.conversion.config import MergeConfig
from longext.conversion.merge import merge_adapter

IDS = torch.randint(3, 60, (1, 100), generator=torch.Generator().manual_seed(0))
ROPE = ("--method", "linear", "--factor", 8)
SCALE, FACTOR = 8 / 4, 8.0  # alpha / r; linear RoPE


def publish(folder, *, tied=False, extra_rows=0, family="llama"):
    """A base and an adapter as LongLoRA's code publishes one; return the kept parameters."""
    config = CONFIGS[family]()
    config.tie_word_embeddings = tied
    save_tiny_model(config, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    kept = {
        f"base_model.model.{name}": p.detach() + 0.05 * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if "embed" in name or "norm" in name
    }
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05, generator=generator)
    adapted.save_pretrained(folder / "lora", safe_serialization=True)
    held = load_file(folder / "lora/adapter_model.safetensors")
    (folder / "lora/adapter_model.safetensors").unlink()
    torch.save(held, folder / "lora/adapter_model.bin")
    key = "base_model.model.model.embed_tokens.weight"
    stored = {**kept, key: torch.cat([kept[key], torch.ones(extra_rows, kept[key].shape[1])])}
    torch.save({name: tensor.half() for name, tensor in stored.items()}, folder / "lora/trainable_params.bin")
    return {name: tensor.half().float() for name, tensor in kept.items()}, held


def by_hand(base, kept, held):
    """Logits of the base with the kept parameters put in, B A added, and positions divided by the factor."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.rotary_emb.inv_freq /= FACTOR
    own = dict(model.named_parameters())
    for name, tensor in kept.items():
        own[name.removeprefix("base_model.model.")].data.copy_(tensor)
    for key, a in held.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            own[name].data += SCALE * held[key.replace("lora_A", "lora_B")] @ a
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_computes(model, expected):
    with torch.no_grad():
        difference = (model.eval()(IDS).logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "keys"),
    {"untied": {}, "tied": {"tied": True}, "padded": {"extra_rows": 1}, "qwen3": {"family": "qwen3"}}.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_converted_adapter_computes_what_was_trained(run, tmp_path, kind, keys):
    kept, held = publish(tmp_path, **keys)
    expected = by_hand(tmp_path / "base", kept, held)
    result = run("convert", "lora", *ROPE, "-o", "adapter")
    assert ("1 rows more than the base" in ok(result)) == (kind == "padded")
    merged = merge_adapter(MergeConfig(adapter="adapter", output="merged"))
    assert merged.merge.stays_tied == (kind == "tied")
    assert_computes(AutoModelForCausalLM.from_pretrained("merged"), expected)
    assert_computes(AutoModelForCausalLM.from_pretrained("adapter", dtype=torch.float32), expected)
    base = AutoModelForCausalLM.from_pretrained("adapter/base", dtype=torch.float32)
    assert_computes(PeftModel.from_pretrained(base, "adapter"), expected)
    assert json.loads((tmp_path / "adapter/run.json").read_text())["extension"]["spec"]["factor"] == FACTOR


def test_an_old_peft_file_alone_converts_to_the_same_tensors(run, tmp_path):
    _, held = publish(tmp_path)
    (tmp_path / "lora/trainable_params.bin").unlink()
    said = json.loads(ok(run("convert", "lora", "--method", "none", "-o", "adapter", "--json")))
    assert (said["kind"], said["num_lora"], said["num_whole"]) == ("convert", len(held), 0)
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert written.keys() == held.keys()
    assert all(torch.equal(written[name], held[name]) for name in held)


@pytest.mark.parametrize("name", ["trainable_params.bin", "non_lora_trainables.bin", "new_embeddings.safetensors"])
def test_weights_beside_an_adapter_are_never_passed_over(run, tmp_path, name):
    """peft reads adapter_model.safetensors alone: the rest of what was trained would be lost without a word."""
    _, held = publish(tmp_path)
    save_file(held, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/trainable_params.bin").rename(tmp_path / "lora" / name)
    (tmp_path / "lora/adapter_model.bin").unlink()
    advice = "longext convert lora" if name.endswith(".bin") else "put them into adapter_model.safetensors"
    for command in (("merge", "lora", "-o", "out"), ("eval", "ppl", "lora", "--data", "sample"), ("generate", "lora")):
        prompt = ("--prompt", "a") if command[0] == "generate" else ()
        fails(run(*command, *prompt), 2, name, advice)


class Evil:
    """Unpickled as pickle does it, this makes a file."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "trainable_params.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_unrun(run, tmp_path, name, zipped):
    publish(tmp_path)
    if zipped:
        torch.save({"base_model.model.model.norm.weight": Evil()}, tmp_path / "lora" / name)
    else:
        (tmp_path / "lora" / name).write_bytes(pickle.dumps(Evil()))
    fails(run("convert", "lora", *ROPE, "-o", "adapter"), 2, name, "nothing of it was run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def spoil(change):
    def write(folder):
        file = folder / "lora/trainable_params.bin"
        held = torch.load(file)
        made = change(held)
        torch.save(made if isinstance(made, list) else held, file)

    return write


NORM = "base_model.model.model.norm.weight"
SPOILT = {
    "no dict": (spoil(lambda held: [1]), "holds list"),
    "empty": (lambda folder: torch.save({}, folder / "lora/trainable_params.bin"), "not tensors by name"),
    "no tensor": (spoil(lambda held: held.update({NORM: 1.0})), "not a dense tensor"),
    "integers": (spoil(lambda held: held.update({NORM: torch.ones(32, dtype=torch.int8)})), "floating-point"),
    "NaN": (spoil(lambda held: held[NORM].fill_(float("nan"))), "NaN"),
    "shape": (spoil(lambda held: held.update({NORM: torch.ones(31)})), "has shape [31]"),
    "unknown": (spoil(lambda held: held.update({"base_model.model.model.extra.weight": torch.ones(3)})), "extra"),
    "twice": (spoil(lambda held: held.update({"model.norm.weight": torch.ones(32)})), "twice"),
    "torn": (lambda folder: (folder / "lora/trainable_params.bin").write_bytes(b"PK\3\4"), "not a plain file"),
}


@pytest.mark.parametrize(("write", "text"), SPOILT.values(), ids=SPOILT.keys())
def test_what_does_not_fit_is_refused_by_name(run, tmp_path, write, text):
    publish(tmp_path)
    write(tmp_path)
    fails(run("convert", "lora", *ROPE, "-o", "adapter"), 2, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_the_rope_must_be_known(run, tmp_path):
    publish(tmp_path)
    fails(run("convert", "lora", "-o", "adapter"), 2, "does not say which RoPE", "--method", "--factor")
    config = json.loads((tmp_path / "base/config.json").read_text())
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": config["rope_parameters"]["rope_theta"]}
    (tmp_path / "lora/config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    ok(run("convert", "lora", "-o", "adapter"))
    assert json.loads((tmp_path / "adapter/config.json").read_text())["rope_parameters"]["factor"] == 4.0


def test_nothing_to_convert(run, tmp_path):
    publish(tmp_path)
    ok(run("convert", "lora", *ROPE, "-o", "adapter"))
    fails(run("convert", "adapter", *ROPE, "-o", "again"), 2, "nothing to convert")
    fails(run("convert", "lora", *ROPE), 2, "-o")
    fails(run("convert", "base", *ROPE, "-o", "again"), 2, "No adapter_config.json")
