"""`longext finetune` as a user runs it, on the bundled model and text."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import another_process, fails, no_leftovers
from families import CONFIGS, save_tiny_model
from transformers import AutoModelForCausalLM

from longext.checkpoint.bundled import BUNDLED_MODELS, SAMPLE_DOCUMENT
from longext.errors import ConfigError
from longext.training.callbacks import read_metrics
from longext.training.checkpoints import complete_checkpoints

pytestmark = pytest.mark.usefixtures("no_pictures")
QUICK = ("--data", "sample", "--target-length", 128, "--num-steps", 4, "--accumulation", 2, "--learning-rate", 1e-3)
WARM = ("--set", "warmup_steps=1")


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory):
    """Arguments of finished runs -> where a copy of their output is."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def run_once(run, tmp_path, kept_runs):
    """run_once(name, *args): the output of a run that several tests start from, trained once and copied."""
    root, kept = kept_runs

    def train(name, *args):
        if args not in kept:
            assert run(*args, "-o", name).exit_code == 0
            kept[args] = shutil.copytree(tmp_path / name, root / str(len(kept)))
        else:
            shutil.copytree(kept[args], tmp_path / name)

    return train


def losses(directory):
    return {line["step"]: line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line}


def trained(directory, name="adapter_model.safetensors"):
    from safetensors.torch import load_file

    return load_file(directory / name)


@pytest.mark.pictures
def test_extends_trains_and_writes_everything(run, tmp_path):
    args = ("--data", "sample", "--method", "linear", "--target-length", 1024, *QUICK[4:], *WARM)
    result = run("finetune", "books-5m", *args, "--eval-data", "sample", "-o", "out", "--set", "eval_documents=1")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    record = json.loads((out / "result.json").read_text())
    assert record["finetune"]["attention"]["evaluation"] == "full (sdpa)"
    assert record["finetune"]["attention"]["group_size"] == 256
    assert set(record["finetune"]["tuning"]["by_kind"]) == {"lora", "embeddings", "norms"}
    assert list(losses(out)) == [1, 2, 3, 4]
    before, after = (record["perplexity"][i]["perplexity"] for i in (0, -1))
    assert list(before) == ["512", "1024"]
    assert after["1024"] < before["1024"]
    assert [line for line in record["perplexity"] if line["attention"] == "full (sdpa)"] == record["perplexity"]
    for name in ("run.json", "recipe.yaml", "README.md", "table.md", "metrics.jsonl", "loss.png", "tokenizer.json"):
        assert (out / name).is_file(), name
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 2.0
    assert config["rope_scaling"]["factor"] == 2.0
    keys = set(trained(out))
    assert any("lora_A" in key for key in keys)
    assert any("embed_tokens" in key for key in keys)
    assert any("norm" in key for key in keys)
    no_leftovers(tmp_path, "out")


def test_loss_falls_and_lora_alone_trains_no_embedding(run, tmp_path):
    result = run("finetune", "books-5m", *QUICK, *WARM, "--tuning", "lora", "--attention", "full", "-o", "out")
    assert result.exit_code == 0, result.output
    assert not any("embed" in key or "norm" in key for key in trained(tmp_path / "out"))
    found = losses(tmp_path / "out")
    assert list(found) == [1, 2, 3, 4]


def test_full_tuning_writes_a_checkpoint_plain_transformers_loads(run, tmp_path):
    result = run("finetune", "books-5m", *QUICK, *WARM, "--tuning", "full", "-o", "out")
    assert result.exit_code == 0, result.output
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    base = AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS["books-5m"], dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert any(moved)
    assert model.config._attn_implementation != "s2_attn"
    assert "lm_head.weight" not in trained(tmp_path / "out", "model.safetensors")  # tied, as the base is
    assert {x.dtype for x in trained(tmp_path / "out", "model.safetensors").values()} == {torch.bfloat16}
    result = run("verify", "out")
    assert result.exit_code == 0, result.output
    assert "all were trained" in result.output


def test_pose_trains_short_windows_at_long_positions(run, tmp_path):
    args = ("--data", "sample", "--method", "linear", "--target-length", 4096, "--positions", "pose", "--window", 256)
    result = run("finetune", "books-5m", *args, *QUICK[4:], *WARM, "-o", "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "result.json").read_text())["finetune"]
    assert (record["row_length"], record["target_length"]) == (256, 4096)
    assert record["num_tokens"] == 4 * 2 * 256


def test_mixed_windows_end_in_a_checkpoint_that_keeps_short_texts(run, tmp_path):
    """Short and long rows in one batch; resumed; merged as longrope, whose output is trained further as it is."""
    mixed = ("--data", "sample", "--mixed-window", "--short-share", 0.5, "--batch-size", 2, "--accumulation", 1)
    mixed = (*mixed, "--set", "save_every=1", "--set", "warmup_steps=0")
    args = ("finetune", "books-5m", *mixed, "--method", "yarn", "--original-length", 64, "--target-length", 128)
    assert run(*args, "--num-steps", 2, "-o", "out").exit_code == 0
    assert run(*args, "--num-steps", 1, "-o", "cut").exit_code == 0
    assert run(*args, "--num-steps", 2, "-o", "cut", "--resume").exit_code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "result.json").read_text())["finetune"]
    assert record["windows"] == {"length": 64, "share": 0.5}
    assert run("merge", "out", "-o", "merged").exit_code == 0
    rope = json.loads((tmp_path / "merged" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["attention_factor"], rope["factor"]) == ("longrope", 1.0, 2.0)
    assert rope["short_factor"] == [1.0] * 32 != rope["long_factor"]
    assert run("finetune", "merged", *mixed, "--num-steps", 1, "-o", "more").exit_code == 0
    again = json.loads((tmp_path / "more" / "config.json").read_text())["rope_parameters"]
    assert again == rope


def test_supervised_examples_of_mixed_windows_choose_by_their_length(run, tmp_path):
    rows = [{"instruction": "Say it.", "output": "word " * count} for count in (20, 150, 30, 120)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--data", "sft.jsonl", "--task", "sft", "--method", "yarn", "--original-length", 64, "--target-length", 256)
    result = run(
        "finetune", "books-5m", *args, "--mixed-window", *WARM, "--num-steps", 1, "--accumulation", 1, "-o", "out"
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "result.json").read_text())["finetune"]
    assert record["windows"] == {"length": 64, "share": 0.0}


def test_supervised_fine_tuning_on_instructions(run, tmp_path):
    rows = [
        {"instruction": f"Repeat the number {n}.", "input": "word " * 60, "output": f"The number is {n}."}
        for n in range(12)
    ]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("finetune", "books-5m", *QUICK, *WARM, "--data", "sft.jsonl", "--task", "sft", "-o", "out")
    assert result.exit_code == 0, result.output
    assert len(losses(tmp_path / "out")) == 4


def test_trained_with_full_attention_equals_a_plain_trainer_loop(run, tmp_path):
    """Losses of full fine-tuning, dense attention: a loop of ten lines over plain transformers and torch gives them."""
    args = (*QUICK, *WARM, "--tuning", "full", "--attention", "full", "--set", "max_grad_norm=0.5")
    assert run("finetune", "books-5m", *args, "-o", "out").exit_code == 0
    from longext.data.rows import open_rows
    from longext.models.hf import load_language_model
    from longext.options import RuntimeConfig
    from longext.training.config import FinetuneConfig

    config = FinetuneConfig(model="books-5m", data="sample", target_length=128)
    loaded = load_language_model(RuntimeConfig(model="books-5m", device="cpu"))
    rows = open_rows(config, loaded.tokenizer, length=128, num_rows=8)
    model = loaded.model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for step in range(4):
        ids = torch.stack([rows[2 * step + i]["input_ids"] for i in range(2)])
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 1)
        optimiser.step()
        optimiser.zero_grad()
        expected.append(loss.item())
    found = losses(tmp_path / "out")
    assert [found[i] for i in (1, 2, 3, 4)] == pytest.approx(expected, abs=2e-5)


def test_from_python(tmp_path):
    import longext

    config = longext.FinetuneConfig(
        model="books-5m", data="sample", target_length=128, num_steps=2, accumulation=1, device="cpu"
    )
    result = longext.finetune_checkpoint(config, tmp_path / "run")
    assert [line["step"] for line in result.metrics] == [1, 2]
    assert result.extension["trained"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_measurements_from_python_are_handed_in(tmp_path):
    """Training knows no evaluation: data to measure on without something that measures is refused, not passed over."""
    import longext

    config = longext.FinetuneConfig(model="books-5m", data="sample", eval_data="sample", target_length=64, device="cpu")
    with pytest.raises(ConfigError, match="hand in `measure`"):
        longext.finetune_checkpoint(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [
        (("finetune", *QUICK), "longext.training.longlora", "plan_training_rope"),
        (("compress-train", "--data", "sample", "--segment", 64), "longext.compressor.train", "find_base"),
    ],
)
def test_a_run_is_planned_once(run, monkeypatch, command, module, function):
    calls = []
    planner = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(f"{module}.{function}", lambda *args: calls.append(args) or planner(*args))
    result = run(command[0], "books-5m", *command[1:], "--dry-run")
    assert result.exit_code == 0, result.output
    assert len(calls) == 1


def test_clipping_clips(run, tmp_path):
    """The norm is logged as it was before clipping; a clip far below it changes what is learned."""
    for name, clip in (("loose", 1e6), ("tight", 1e-3)):
        args = (*QUICK, *WARM, "--tuning", "lora", "--set", f"max_grad_norm={clip}")
        assert run("finetune", "books-5m", *args, "-o", name).exit_code == 0
    loose, tight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("loose", "tight"))
    assert loose[0]["grad_norm"] == pytest.approx(tight[0]["grad_norm"])
    assert loose[0]["grad_norm"] > 1e-3  # so the tight run did clip
    a, b = (trained(tmp_path / name) for name in ("loose", "tight"))
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_rows_with_uneven_answers_count_by_token(run, tmp_path):
    """Two rows at once, or one after the other: the loss is the mean over tokens either way."""
    rows = [{"instruction": "tell " * (150 - 20 * n), "output": "so " * (8 + 20 * n)} for n in range(8)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("finetune", "books-5m", *QUICK, *WARM, "--data", "uneven.jsonl", "--task", "sft", "--target-length", 256)
    assert run(*args, "-o", "apart").exit_code == 0
    assert run(*args, "--accumulation", 1, "--batch-size", 2, "-o", "together").exit_code == 0
    a, b = losses(tmp_path / "apart"), losses(tmp_path / "together")
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-5)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_length_dependent_rope_trains_after_an_evaluation(run, tmp_path, method):
    (tmp_path / "factors.json").write_text(json.dumps({"long_factor": [4.0] * 32, "factor": 4.0}))
    extra = ("--set", "factors=factors.json") if method == "longrope" else ("--target-length", 2048)
    args = ("--data", "sample", "--method", method, *extra, *QUICK[4:], "--num-steps", 2, "--accumulation", 1)
    evaluation = ("--eval-data", "sample", "--eval-lengths", "256,1024", "--set", "eval_documents=1")
    result = run("finetune", "books-5m", *args, *evaluation, "-o", "out")
    assert result.exit_code == 0, result.output
    assert len(losses(tmp_path / "out")) == 2


def test_a_short_run_is_logged_and_learns(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # left over from something else: no launch
    args = ("finetune", "books-5m", *QUICK, "--num-steps", 1, "--set", "log_every=5", "-o", "out")
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert list(losses(tmp_path / "out")) == [1]


def test_a_model_with_a_head_of_its_own_uses_its_own_loss(run, run_once, tmp_path, monkeypatch):
    run_once("chunked", "finetune", "books-5m", *QUICK, *WARM)
    monkeypatch.setattr("longext.training.longlora.head_is_plain", lambda _: False)
    result = run("finetune", "books-5m", *QUICK, *WARM, "-o", "own")
    assert result.exit_code == 0, result.output
    a, b = losses(tmp_path / "chunked"), losses(tmp_path / "own")
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-4)


def test_evaluation_runs_full_attention_in_eval_mode(run, tmp_path, monkeypatch):
    """Every forward of a measurement is watched: eval mode, transformers' own attention, no plan."""
    from longext.models.hf import HFLanguageModel

    seen = []
    score = HFLanguageModel.score

    def watched(self, *args):
        seen.append((self.model.config._attn_implementation, self.model.training))
        return score(self, *args)

    monkeypatch.setattr(HFLanguageModel, "score", watched)
    args = (*QUICK, *WARM, "--eval-data", "sample", "--eval-lengths", "128", "--set", "eval_documents=1")
    assert run("finetune", "books-5m", *args, "--set", "max_tokens=512", "-o", "out").exit_code == 0
    assert seen
    assert set(seen) == {("sdpa", False)}
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "perplexity" in line]
    assert {line["attention"] for line in lines} == {"full (sdpa)"}


@pytest.mark.parametrize(
    "args", [("--loss", "longce", "--attention", "full"), ("--tuning", "full"), ("--method", "dynamic")]
)
def test_a_swept_run_is_the_run(run, tmp_path, args):
    """Chunks of a quarter row, with accumulation: the losses of one graph, and the record says what was trained."""
    target = ("--target-length", 640 if "--method" in args else 256)
    args = (*QUICK, "--num-steps", 2, *WARM, *target, "--set", "group_size=64", *args, "--set", "max_tokens=9000")
    assert run("finetune", "books-5m", *args, "-o", "whole").exit_code == 0
    result = run("finetune", "books-5m", *args, "--sweep", 128, "-o", "swept")
    assert result.exit_code == 0, result.output
    whole, swept = (losses(tmp_path / name) for name in ("whole", "swept"))
    assert list(swept.values()) == pytest.approx(list(whole.values()), abs=2e-5)
    norms = [
        [line["grad_norm"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "swept")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    record = json.loads((tmp_path / "swept" / "result.json").read_text())["finetune"]
    assert record["sweep"] == 128
    assert record.get("loss", {}).get("short_context") == (64 if "longce" in args else None)
    objective = "full attention" if "full" in args[-3:] and "--attention" in args else "s2 attention in groups of 64"
    assert record["attention"]["objective"] == objective
    assert objective in (tmp_path / "swept" / "README.md").read_text()
    told = "by longce, short is 64 tokens" in (tmp_path / "swept" / "table.md").read_text()
    assert told == ("longce" in args)


def test_a_router_loss_is_not_dropped_in_silence(run, tmp_path):
    config = CONFIGS["mixtral"]()
    config.output_router_logits = True
    save_tiny_model(config, tmp_path / "mixtral")
    args = ("--data", "sample", "--target-length", 64, "-o", "out")
    fails(run("finetune", "mixtral", *args), 2, "output_router_logits", "set it to false")


def test_a_sweep_needs_logits_that_are_known(run, monkeypatch):
    monkeypatch.setattr("longext.training.longlora.head_is_plain", lambda _: False)
    fails(run("finetune", "books-5m", *QUICK, "--sweep", 64, "-o", "out"), 2, "logits", "leave --sweep out")
    longce = ("--loss", "longce", "-o", "out")
    fails(run("finetune", "books-5m", *QUICK, *longce), 2, "logits", "leave --loss longce out")
    fails(run("finetune", "books-5m", *QUICK, *longce, "--short-context", 127), 2, "no far text", "at most 64")


# --- resume ---------------------------------------------------------------------------------------------------------

LONG = (
    "--data",
    "sample",
    "--target-length",
    128,
    "--num-steps",
    6,
    "--accumulation",
    2,
    "--learning-rate",
    1e-3,
    "--save-every",
    2,
)


def command(*args):
    return [sys.executable, "-m", "longext", *map(str, args)]


def wait_for_checkpoint(directory, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not complete_checkpoints(directory / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_resume_after_kill_equals_the_uninterrupted_run(run, tmp_path):
    """kill -9 after the first checkpoint; the rest of the losses and every trained weight are bit for bit the same."""
    args = ("finetune", "books-5m", *LONG, "--set", "lora_dropout=0.1", *WARM, "--sweep", 72)
    assert run(*args, "-o", "whole").exit_code == 0
    process = subprocess.Popen(
        command(*args, "-o", "cut"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_checkpoint(tmp_path / "cut.running", process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "cut").exists()
    steps = len(complete_checkpoints(tmp_path / "cut.running" / "checkpoints"))
    assert steps >= 1
    (tmp_path / "cut.running" / "checkpoints" / "checkpoint-99").mkdir()  # as a write that was cut off
    result = run(*args, "-o", "cut", "--resume")
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.fixture
def signalled(monkeypatch):
    """signalled(number, step): this process gets the signal in that step (counted from 1)."""
    from longext.training.engine import Engine

    original = Engine.training_step

    def arrange(number, step):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step - 1 and self.accelerator.sync_gradients:
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Engine, "training_step", training_step)

    return arrange


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_exits(run, tmp_path, signalled, number, code):
    signalled(number, 2)
    result = run("finetune", "books-5m", *LONG[:-2], *WARM, "-o", "out")
    fails(result, code, f"stopped by {number.name} after step 2 of 6", "--resume")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    last = complete_checkpoints(tmp_path / "out.running" / "checkpoints")[-1]
    state = json.loads((last / "trainer_state.json").read_text())
    assert f"checkpoint-{state['global_step']}" == last.name == "checkpoint-2"


def test_a_hang_up_that_is_ignored_is_no_reason_to_stop(run, tmp_path, signalled):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled(signal.SIGHUP, 2)
    try:
        assert run("finetune", "books-5m", *LONG[:4], "--num-steps", 3, *LONG[6:-2], *WARM, "-o", "out").exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_last_step_ends_a_run_that_is_complete(run, tmp_path, signalled):
    signalled(signal.SIGTERM, 4)
    result = run("finetune", "books-5m", *QUICK, *WARM, "-o", "out")
    assert result.exit_code == 0, result.output
    assert "Wrote out" in result.stdout
    assert len(losses(tmp_path / "out")) == 4


def test_a_prolonged_run_keeps_the_warm_up_it_began_with(run, tmp_path):
    """4 steps of 20 asked for warm up for 2; the 6 that it becomes are those of a run with a warm-up of 2."""
    args = ("finetune", "books-5m", *LONG[:4], *LONG[6:], "--accumulation", 1)
    assert run(*args, "--num-steps", 6, "--set", "warmup_steps=2", "-o", "whole").exit_code == 0
    assert run(*args, "--num-steps", 4, "-o", "out").exit_code == 0
    (tmp_path / "out").rename(tmp_path / "out.running")
    result = run(*args, "--num-steps", 6, "-o", "out", "--resume")
    assert result.exit_code == 0, result.output
    assert "warm-up stays 2 steps" in " ".join(result.stderr.split())
    found, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "whole"))
    for key in ("step", "loss", "learning_rate"):
        assert [line[key] for line in found] == [line[key] for line in expected]


@pytest.fixture
def unfinished(run_once, tmp_path):
    """An unfinished run with complete checkpoints."""
    run_once("out", "finetune", "books-5m", *LONG, *WARM)
    (tmp_path / "out").rename(tmp_path / "out.running")


def tree(directory):
    return {path.relative_to(directory): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_refused_resume_changes_nothing(run, unfinished, tmp_path):
    """Refused for other settings, and while another process is at work; then the run goes on."""
    checkpoints = tmp_path / "out.running/checkpoints"
    (checkpoints / "checkpoint-99").mkdir()  # as one that is being written
    before = tree(tmp_path / "out.running")
    args = ("finetune", "books-5m", *LONG, *WARM, "-o", "out", "--resume")
    with another_process(tmp_path / "out"):
        fails(run(*args), 2, "out is in use", "process")
    for change, text in (
        (("--learning-rate", 0.1), "learning_rate 0.001, this run has 0.1"),
        (("--seed", 3), "seed 0, this run has 3"),
        (("--tuning", "lora"), "tuning lora+embed+norm, this run has lora"),
    ):
        fails(run(*args, *change), 2, text, "another -o")
    assert tree(tmp_path / "out.running") == before
    assert run(*args).exit_code == 0
    no_leftovers(tmp_path, "out")


def test_unfinished_runs_are_not_overwritten(run, unfinished):
    fails(run("finetune", "books-5m", *LONG, "-o", "out"), 2, "unfinished run", "--resume", "another -o")
    fails(run("finetune", "books-5m", *LONG, "-o", "other", "--resume"), 2, "Nothing to resume")
    assert run("finetune", "books-5m", *LONG, *WARM, "-o", "out", "--force").exit_code == 0
    fails(run("finetune", "books-5m", *LONG, "-o", "out"), 2, "already exists", "--force")


def test_a_finished_run_is_prolonged_as_if_it_had_never_ended(run, tmp_path):
    args = ("finetune", "books-5m", *LONG, *WARM, "--num-steps", 2)
    longer = (*args, "--num-steps", 4)
    assert run(*longer, "-o", "whole").exit_code == 0
    assert run(*args, "-o", "out").exit_code == 0
    before = tree(tmp_path / "out")
    for extra in ((), ("--force",)):
        message = fails(run(*args, "-o", "out", "--resume", *extra), 2, "finished run of 2 steps", "more --num-steps")
        assert "force" not in message and "Leave" not in message
    fails(run(*longer, "--seed", 3, "-o", "out", "--resume"), 2, "seed 0, this run has 3")
    fails(run(*longer, "--set", "schedule=cosine", "-o", "out", "--resume"), 2, "this run has")
    assert tree(tmp_path / "out") == before
    no_leftovers(tmp_path, "out", "whole")
    assert run(*longer, "-o", "out", "--resume").exit_code == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    a, b = trained(tmp_path / "out"), trained(tmp_path / "whole")
    assert all(torch.equal(a[key], b[key]) for key in b)
    no_leftovers(tmp_path, "out", "whole")


def test_checkpoints_are_kept_as_asked(run, tmp_path):
    args = ("finetune", "books-5m", *LONG[:-1], 1, *WARM, "--set", "keep_checkpoints=2", "-o", "out")
    assert run(*args).exit_code == 0
    kept = [path.name for path in complete_checkpoints(tmp_path / "out" / "checkpoints")]
    assert kept == ["checkpoint-5", "checkpoint-6"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--attention", "s3"), ("Unknown attention 's3'", "s2")),
        (("--tuning", "lorra"), ("Unknown tuning 'lorra'", "Did you mean")),
        (("--method", "yarnn"), ("Unknown method 'yarnn'",)),
        (("--set", "backend=sdpaa"), ("Unknown backend", "sdpa")),
        (("--task", "rlhf"), ("Unknown task 'rlhf'",)),
        (("--positions", "pose"), ("--window",)),
        (("--data", ""), ("Give --data",)),
        (("--device", "cuda:1"), ("CUDA_VISIBLE_DEVICES",)),
        (
            ("--method", "dynamic", "--target-length", 2048, "--positions", "pose", "--window", 256),
            ("--positions pose cannot train dynamic",),
        ),
        (("--window", 64), ("--positions pose",)),
        (("--short-share", 0.5), ("--short-share", "--mixed-window")),
        (("--mixed-window",), ("--mixed-window trains two RoPEs", "has one (default)", "--method")),
        (("--mixed-window", "--sweep", 64), ("--mixed-window", "leave --sweep out")),
        (("--mixed-window", "--attention", "s2-wrapped"), ("--mixed-window", "s2-wrapped")),
        (("--mixed-window", "--positions", "pose", "--window", 64), ("--mixed-window", "leave --positions pose out")),
        (("--learning-rate", 0), ("--learning-rate must be above 0",)),
        (("--group-ratio", 2), ("--group-ratio", "at most 1")),
        (("--num-steps", 0), ("`num_steps` must be >= 1",)),
        (("--factor", 4), ("--factor 4 needs a --method",)),
        (("--target-length", 8192), ("beyond the 512 tokens", "--method")),
        (("--method", "linear", "--target-length", 256), ("at least the trained length 512",)),
        (("--dtype", "float16"), ("--dtype for training",)),
        (("--offload",), ("--offload", "CUDA")),
        (("--sweep", 64, "--kv-memory", 1), ("--kv-memory is for full attention", "host memory")),
        (("--attention", "full", "--sweep", 64, "--kv-memory", 1), ("--kv-memory divides", "CUDA device")),
        (("--sweep", "half"), ("--sweep takes a number of tokens, auto or off", "half")),
        (("--sweep", 64, "--attention", "s2-wrapped"), ("--sweep needs attention without later tokens", "s2-wrapped")),
        (("--kv-memory", 4), ("--kv-memory", "add --sweep")),
        (("--quantize", "nf4", "--tuning", "full"), ("quantised",)),
        (("--quantize", "nf4"), ("--quantize nf4 needs a CUDA device",)),
        (("--set", "lora_targets=[q_projj]"), ("no linear layers", "q_proj")),
        (("--report-to", "no_such_tracker"), ("no_such_tracker", "pip install")),
        (("--context-parallel", 2), ("--context-parallel", "--sequence-parallel")),
        (("--sequence-parallel", 2), ("--num-processes 2",)),
        (("--sequence-parallel", 3), ("divide",)),
        (("--data", "nowhere.txt"), ("No data at 'nowhere.txt'",)),
        (("--method", "linear", "--target-length", 65536), ("22,7",)),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, args, texts):
    fails(run("finetune", "books-5m", *QUICK, *args, "-o", "out"), 2, *texts)
    no_leftovers(tmp_path)


def test_broken_data_names_file_and_line(run, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", \n')
    args = ("--task", "sft", *QUICK, "-o", "out")
    fails(run("finetune", "books-5m", *args, "--data", "broken.jsonl"), 2, "broken.jsonl", "line 2")
    (tmp_path / "empty.jsonl").write_text('{"instruction": "a", "output": ""}\n')
    fails(run("finetune", "books-5m", *args, "--data", "empty.jsonl"), 2, "answer")
    (tmp_path / "blank.txt").write_text("   \n")
    fails(run("finetune", "books-5m", *QUICK, "--data", "blank.txt", "-o", "out"), 2, "blank.txt")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_names_the_batch(run, tmp_path):
    shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, as loading asks; what follows it is not
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    result = run("finetune", "broken", *QUICK, "-o", "out")
    fails(result, 1, "The loss is nan at step 1", SAMPLE_DOCUMENT.name, "--resume")


def test_a_gradient_that_is_not_finite_changes_no_weight(run, tmp_path, monkeypatch):
    from longext.training.engine import Engine

    step = Engine.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Engine, "training_step", poisoned)
    args = ("finetune", "books-5m", *LONG[:-1], 1, *WARM, "--set", "log_every=5", "-o", "out")
    fails(run(*args), 1, "The gradient norm is", "at step 3", "no weight was changed", "--resume")
    last = complete_checkpoints(tmp_path / "out.running" / "checkpoints")[-1]
    assert last.name == "checkpoint-2"
    assert all(torch.isfinite(x).all() for x in trained(last).values())


def test_other_base_weights_are_noticed(run, tmp_path):
    """Same shapes, other numbers: neither a resume nor a merge takes them for the base."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "base")
    assert run("finetune", "base", *LONG, *WARM, "-o", "out").exit_code == 0
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    fails(run("merge", "out", "-o", "merged"), 2, "trained on other weights", "--base")
    (tmp_path / "out").rename(tmp_path / "out.running")
    fails(run("finetune", "base", *LONG, *WARM, "-o", "out", "--resume"), 2, "base_weights")


def test_out_of_memory_says_what_to_change(run, tmp_path, monkeypatch):
    def explode(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("longext.training.engine.Engine.compute_loss", explode)
    fails(
        run("finetune", "books-5m", *QUICK, "-o", "out"), 1, "out of memory", "longext plan", "--sweep auto", "--tile"
    )


def test_fsdp_on_a_cpu_is_refused(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    fails(run("finetune", "books-5m", *QUICK, "--device", "cpu", "-o", "out"), 2, "FSDP", "ignores")


def test_accelerate_that_starts_one_process_of_many_is_refused(run, monkeypatch):
    """`accelerate launch --config_file recipes/accelerate/fsdp2.yaml --cpu`: no rank, no FSDP, not a word."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    fails(run("finetune", "books-5m", *QUICK, "-o", "out"), 2, "asked for several processes and started one")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    fails(run("finetune", "books-5m", *QUICK, "-o", "out"), 2, "LOCAL_RANK, MASTER_PORT not", "torchrun")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--num-processes", 3, "--sequence-parallel", 3, "--target-length", 255), ("attention heads", "got 3")),
        (("--num-processes", 3, "--sequence-parallel", 3), ("row length 128",)),
        (("--num-processes", 3, "--sequence-parallel", 2), ("a number of processes that it divides",)),
        (("--num-processes", 2, "--method", "linear", "--target-length", 65536), ("22,7",)),
        (("--num-processes", 2, "--data", "nowhere.txt"), ("No data at 'nowhere.txt'",)),
        (("--num-processes", 2, "--sequence-parallel", 2, "--sweep", 64), ("--sweep has one chunk", "Leave one")),
    ],
)
def test_what_can_be_refused_is_refused_before_processes_start(run, tmp_path, monkeypatch, args, texts):
    monkeypatch.setattr("longext.processes.group.launch", lambda *_, **__: pytest.fail("launched"))
    fails(run("finetune", "books-5m", *QUICK, *args, "-o", "out"), 2, *texts)
    no_leftovers(tmp_path)


def test_another_split_is_refused_before_processes_start(run, unfinished, monkeypatch):
    monkeypatch.setattr("longext.processes.group.launch", lambda *_, **__: pytest.fail("launched"))
    args = ("finetune", "books-5m", *LONG, *WARM, "-o", "out", "--resume", "--num-processes", 2)
    fails(run(*args), 2, "processes 1, this run has 2")
    fails(run(*args, "--set", "max_tokens=4000"), 2, "was made with data")


def test_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path):
    result = run("finetune", "books-5m", *QUICK, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Dry run" in result.output
    no_leftovers(tmp_path)


def test_lean_layers_give_the_same_adapter(run, run_once, tmp_path):
    """Tiles and nested checkpoints, float32 on a CPU: the losses and tensors of a run without, but for rounding."""
    run_once("plain", "finetune", "books-5m", *QUICK, *WARM)
    lean = ("--tile", 100, "--nested", 3, "--set", "loss_chunk=64")
    result = run("finetune", "books-5m", *QUICK, *WARM, *lean, "-o", "lean")
    assert result.exit_code == 0, result.output
    assert "one input kept for 3 layers; MLPs and norms 100 tokens at a time; loss 64 tokens" in result.output
    assert list(losses(tmp_path / "lean").values()) == pytest.approx(
        list(losses(tmp_path / "plain").values()), abs=1e-5
    )
    found = trained(tmp_path / "lean")
    for name, expected in trained(tmp_path / "plain").items():
        # Adam turns rounding into steps of the size of the learning rate
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-3)
    record = json.loads((tmp_path / "lean" / "run.json").read_text())["finetune"]
    assert record["kernels"] == "none"
    assert record["memory"] == {
        "checkpointing": True, "checkpoint_every": 1, "nested": 3, "offload": False, "tile": 100, "loss_chunk": 64,
    }  # fmt: skip
    again = run("finetune", "books-5m", *QUICK, *WARM, "--tile", 50, "-o", "lean", "--resume", "--num-steps", 5)
    fails(again, 2, "was made with", "tile 100")
