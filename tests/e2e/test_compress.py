"""`longext compress-train` as a user runs it, on the bundled model and story."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from command_line import another_process, fails, no_leftovers

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.compressor.checkpoint import load_compressor
from longext.errors import CheckpointError
from longext.training.callbacks import read_metrics

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ("--data", "sample", "--segment", 64, "--lora-r", 4, "--lora-alpha", 8, "--learning-rate", 2e-3)
QUICK = (*SMALL, "--ratio", 8, "--document-length", 192, "--num-steps", 3, "--set", "warmup_steps=1")


def lines_of(directory):
    return read_metrics(directory / "metrics.jsonl")


def weights_of(directory):
    from safetensors.torch import load_file

    return load_file(directory / "compressor.safetensors")


@pytest.mark.pictures
def test_trains_and_writes_everything(run, tmp_path):
    args = (*SMALL, "--ratio", "4,8,16", "--objectives", "lm:1,ae:0.5,distill:0.5", "--gradient", "window:1")
    rest = ("--document-length", 256, "--num-steps", 4, "--batch-size", 2, "--grad-check", 2, "-o", "out")
    result = run("compress-train", "books-5m", *args, *rest)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    record = json.loads((out / "result.json").read_text())
    assert record["compress"]["spec"]["ratios"] == [4, 8, 16]
    assert record["compress"]["num_tokens"] == 4 * 2 * 256
    checks = record["gradient_checks"]
    assert [line["step"] for line in checks] == [1, 3]
    assert all(0 < line["relative_error"] < 2 and line["cosine"] > 0.2 for line in checks)
    assert all({"documents", "ae"} <= set(line) for line in lines_of(out))
    for name in ("run.json", "recipe.yaml", "README.md", "table.md", "loss.png", "compressor.json"):
        assert (out / name).is_file(), name
    loaded = load_compressor(out, device="cpu")
    assert loaded.compressor.spec.ratios == (4, 8, 16)
    assert loaded.base.directory == BUNDLED_MODELS["books-5m"]
    no_leftovers(tmp_path, "out")


def test_training_lowers_the_loss_of_a_text_it_sees(run, tmp_path):
    """One document again and again: memory and probes learn it."""
    text = " ".join(f"The {n}th word of the story is {n * 7919 % 1000}." for n in range(22))
    (tmp_path / "one.txt").write_text(text)
    args = (
        "--data",
        "one.txt",
        "--ratio",
        4,
        "--document-length",
        192,
        "--num-steps",
        25,
        "--set",
        "schedule=constant",
    )
    result = run("compress-train", "books-5m", *SMALL[2:], *args, "--lora-r", 16, "--lora-alpha", 32, "-o", "out")
    assert result.exit_code == 0, result.output
    losses = [line["loss"] for line in lines_of(tmp_path / "out")]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3


@pytest.mark.parametrize("arch", ["icae", "gist", "autocompressor", "rmt", "beacon", "prefix"])
def test_every_architecture_trains_and_loads(run, tmp_path, arch):
    result = run("compress-train", "books-5m", "--arch", arch, *QUICK, "-o", "out")
    assert result.exit_code == 0, result.output
    assert load_compressor(tmp_path / "out", device="cpu").compressor.spec.arch == arch


def test_answers_alone_are_learned_from_instructions(run, tmp_path):
    rows = [{"instruction": f"Repeat {n}. " + "word " * 150, "output": f"It is {n}."} for n in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("compress-train", "books-5m", *QUICK, "--data", "sft.jsonl", "--objectives", "qa", "-o", "out")
    assert result.exit_code == 0, result.output
    assert len(lines_of(tmp_path / "out")) == 3


def test_init_continues_from_an_earlier_compressor(run, tmp_path):
    assert run("compress-train", "books-5m", *QUICK, "--objectives", "ae", "-o", "first").exit_code == 0
    args = ("compress-train", "books-5m", *QUICK, "--num-steps", 1, "--learning-rate", 1e-12, "--init", "first")
    result = run(*args, "--ratio", "8,16", "-o", "second")
    assert result.exit_code == 0, result.output
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    fails(run(*args, "--lora-r", 8, "-o", "third"), 2, "--init first", "another shape")


def test_the_gradient_is_checked_once_a_step(run, tmp_path, monkeypatch):
    """However many batches a step has, and for that step alone."""
    from longext.compressor import train

    calls = []
    compare = train.compare_gradients
    monkeypatch.setattr(train, "compare_gradients", lambda *args: calls.append(1) or compare(*args))
    args = ("--grad-check", 2, "--accumulation", 3, "-o", "out")
    assert run("compress-train", "books-5m", *QUICK, *args).exit_code == 0
    assert len(calls) == 2
    assert [line["step"] for line in lines_of(tmp_path / "out") if "cosine" in line] == [1, 3]


def test_a_recurrent_memory_trains_beyond_an_overlap_of_whole_segments(run, tmp_path):
    """The first memory is read by segment 2 then; documents are long enough by default."""
    args = [x for x in QUICK if x not in ("--document-length", 192)]
    result = run("compress-train", "books-5m", "--arch", "beacon", *args, "--overlap", 64, "-o", "out")
    assert result.exit_code == 0, result.output
    assert "832 tokens, 13 segments" in (tmp_path / "out" / "table.md").read_text().replace("  ", " ")
    assert all(line["grad_norm"] > 0 for line in lines_of(tmp_path / "out"))


def test_evaluation_while_training_changes_nothing(run, tmp_path):
    args = ("compress-train", "books-5m", *QUICK, "--objectives", "lm,ae")
    assert run(*args, "-o", "plain").exit_code == 0
    (tmp_path / "short.txt").write_text("The keeper climbed the stairs every night. " * 60)
    result = run(*args, "--eval-data", "short.txt", "--eval-every", 1, "--eval-lengths", "64,128", "-o", "measured")
    assert result.exit_code == 0, result.output
    plain, measured = lines_of(tmp_path / "plain"), lines_of(tmp_path / "measured")
    assert [line["loss"] for line in measured if "loss" in line] == [line["loss"] for line in plain]
    assert [line["step"] for line in measured if "controls" in line] == [0, 1, 2, 3]
    for name, tensor in weights_of(tmp_path / "plain").items():
        assert torch.equal(tensor, weights_of(tmp_path / "measured")[name])


def test_dry_run_trains_nothing(run, tmp_path):
    result = run("compress-train", "books-5m", *QUICK, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "192 tokens, 3 segments" in result.output
    no_leftovers(tmp_path)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_after_sigterm_equals_the_uninterrupted_run(run, tmp_path, monkeypatch):
    from longext.training.engine import Engine

    step = Engine.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    args = (*QUICK, "--ratio", "4,8", "--objectives", "lm,ae", "--gradient", "reservoir:1", "--save-every", 2)
    args = ("compress-train", "books-5m", *args, "--num-steps", 6)
    assert run(*args, "-o", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "training_step", signalled)
        kept = str(Path("cut.running/checkpoints/checkpoint-3"))
        fails(run(*args, "-o", "cut"), 143, "stopped by SIGTERM after step 3 of 6", f"--memory {kept}", "--resume")
    assert load_compressor(tmp_path / kept, device="cpu").compressor.spec.ratios == (4, 8)
    fails(run(*args, "-o", "cut"), 2, "unfinished run", "--resume")
    fails(run(*args, "--segment", 32, "-o", "cut", "--resume"), 2, "another -o")
    result = run(*args, "-o", "cut", "--resume")
    assert result.exit_code == 0, result.output
    whole, cut = ({line["step"]: line["loss"] for line in lines_of(tmp_path / name)} for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, abs=1e-6)
    for name, tensor in weights_of(tmp_path / "whole").items():
        torch.testing.assert_close(weights_of(tmp_path / "cut")[name], tensor, rtol=0, atol=1e-6)


def test_a_run_that_has_just_started_is_not_removed_by_a_second_one(run, tmp_path):
    """The second is refused, and must not clear away what it takes for an empty directory."""
    unfinished = tmp_path / "out.running" / "checkpoints" / "checkpoint-1"
    unfinished.mkdir(parents=True)
    (tmp_path / "out.running" / "run.json").write_text("{}")
    with another_process(tmp_path / "out"):
        fails(run("compress-train", "books-5m", *QUICK, "-o", "out", "--resume"), 2, "out is in use", "process")
    assert unfinished.is_dir() and (tmp_path / "out.running" / "run.json").is_file()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--ratio", 7), ("--ratio 7 does not divide --segment 64", "2, 4, 8")),
        (("--document-length", 4096), ("512", "at most 3584 tokens fit", "extend the model")),
        (("--segment", 512), ("leaves no room",)),
        (("--arch", "uoi"), ("Unknown architecture 'uoi'", "Did you mean 'uio'")),
        (("--gradient", "reservoir"), ("needs a size",)),
        (("--gradient", "exact:2"), ("takes no size",)),
        (("--arch", "rmt", "--gradient", "window:2"), ("do not depend on one another", "exact")),
        (("--objectives", "lm,qa"), ("choose one",)),
        (("--objectives", "lm:-1"), ("above 0",)),
        (("--memory-kind", "soft"), ("must be kv",)),
        (("--init", "nowhere"), ("nowhere is no trained compressor",)),
        (("--data", "nowhere.txt"), ("nowhere.txt",)),
        (("--sequence-parallel", 2, "--gradient", "window:2"), ("--gradient exact, subset:N or stop:S",)),
        (("--document-length", 64), ("too short for a memory to be read", "at least 66")),
        (("--document-length", 63, "--objectives", "ae"), ("too short for a memory to be read", "at least 64")),
        (("--document-length", 128, "--overlap", 64), ("too short for a memory to be read", "at least 130")),
        (("--sink", 64), ("--sink 64 must be below --segment 64",)),
        (("--sequence-parallel", 2), ("this run has 1", "--num-processes 2")),
        (("--learning-rate", "inf"), ("`learning_rate` must be a finite number",)),
        (("--set", "max_grad_norm=0"), ("`max_grad_norm` must be above 0",)),
        (("--set", "trust_remote_code=true"), ("not for compressors",)),
        (("--set", "attention=nonsense"), ("nonsense",)),
        (("--eval-lengths", 64), ("add --eval-data",)),
        (("--eval-data", "sample", "--eval-lengths", 100), ("multiples of the segment 64",)),
        (("--eval-data", "sample", "--eval-lengths", 64_000), ("--eval-data sample has 64064", "--eval-lengths")),
        (("--eval-data", "sample", "--eval-lengths", 22_656), ("needs another", "shorter --eval-lengths")),
    ],
)
def test_bad_input_ends_in_one_line(run, tmp_path, args, texts):
    fails(run("compress-train", "books-5m", *QUICK, *args, "-o", "out"), 2, *texts)
    no_leftovers(tmp_path)


def test_a_compressor_of_another_base_is_refused(run, tmp_path):
    import shutil

    shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "base")
    assert run("compress-train", "base", *QUICK, "-o", "out").exit_code == 0
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match="trained on other weights, or another RoPE"):
        load_compressor(tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError):
        load_compressor(tmp_path / "out")
    assert load_compressor(tmp_path / "out", base="books-5m", device="cpu").compressor.spec.segment == 64


def test_a_description_that_lacks_something_is_refused(run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "compressor.json").write_text('{"schema": "longext.compressor/1", "spec": {"ratios": [8]}}')
    for args in (
        ("compress-train", "books-5m", *QUICK, "--init", "broken", "-o", "out"),
        ("generate", "broken", "--prompt", "a"),
        ("eval", "efficiency", "broken"),
        ("eval", "ppl", "--memory", "broken"),
    ):
        fails(run(*args), 2, "broken/compressor.json has no `base_model`")


def test_float16_weights_are_trained_in_bfloat16(tmp_path):
    """Gradients in float16 would need loss scaling."""
    from longext.compressor.checkpoint import BaseModel
    from longext.compressor.config import CompressConfig
    from longext.compressor.train import _training_dtype

    base = BaseModel("base", None, tmp_path, "")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for stored, asked, device, expected in (
        ("float16", "auto", cuda, "bfloat16"),
        ("float16", "auto", cpu, "auto"),
        ("float16", "float32", cuda, "float32"),
        ("float32", "auto", cuda, "auto"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": stored}))
        assert _training_dtype(CompressConfig(model="base", dtype=asked), base, device) == expected


def test_running_out_of_memory_names_what_helps(run, tmp_path, monkeypatch):
    from longext.compressor import train

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(train, "build_compressor", fail)
    fails(run("compress-train", "books-5m", *QUICK, "-o", "out"), 1, "out of memory", "--batch-size", "loss_chunk")
    no_leftovers(tmp_path)


def test_a_model_without_rotary_positions_is_refused(run, tmp_path):
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8192, n_positions=512, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for file in BUNDLED_MODELS["books-5m"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gpt2")
    fails(run("compress-train", "gpt2", *QUICK, "-o", "out"), 2, "learned absolute positions")


def test_a_compressor_is_refused_on_an_extended_copy_of_its_model(run, tmp_path):
    """The same weights under another RoPE: keys would be turned otherwise than it learned, so it is trained on."""
    assert run("compress-train", "books-5m", *QUICK, "--num-steps", 1, "-o", "out").exit_code == 0
    assert run("extend", "books-5m", "--method", "yarn", "--factor", 2, "-o", "longer").exit_code == 0
    with pytest.raises(CheckpointError, match="another RoPE"):
        load_compressor(tmp_path / "out", base=str(tmp_path / "longer"))
    args = ("compress-train", "longer", *QUICK, "--num-steps", 1, "--learning-rate", 1e-12, "--init", "out")
    result = run(*args, "-o", "moved")
    assert result.exit_code == 0, result.output
    assert "the same weights and another RoPE: 512 positions there, 1,024 here" in " ".join(result.output.split())
    for name, tensor in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(weights_of(tmp_path / "moved")[name], tensor, rtol=0, atol=1e-6)
    assert load_compressor(tmp_path / "moved", device="cpu").base.directory == tmp_path / "longer"


def test_a_compressor_of_an_extended_model_has_its_window(run, tmp_path):
    assert run("extend", "books-5m", "--method", "yarn", "--factor", 4, "-o", "longer").exit_code == 0
    args = (*QUICK, "--segment", 256, "--ratio", 2, "--document-length", 1024, "--num-steps", 1)
    fails(run("compress-train", "books-5m", *args, "-o", "out"), 2, "at most 512 tokens fit")
    result = run("compress-train", "longer", *args, "-o", "out")
    assert result.exit_code == 0, result.output
    assert load_compressor(tmp_path / "out", device="cpu").compressor.backbone.window == 2048
