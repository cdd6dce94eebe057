"""Hostile input of every kind that a command reads: one line, the right exit code, nothing left, nothing changed.

A kind is one entry of `KINDS`: how many cases, and how a case is made. A case is seeded by its kind and number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import ROWS, VALUES, YAML, broken_text, hostile_file, json_bytes, safetensors_bytes
from typer.testing import CliRunner

from longext.checkpoint.bundled import BUNDLED_MODELS

SECONDS = 5
YARN = ("--method", "yarn", "--factor", "8")
Arguments = tuple[str, ...]


class Hang(BaseException):
    """A case took longer than `SECONDS`."""


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A few kB of each thing that longext reads: model, adapter, compressor, memory, results, rows, recipe."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("world")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "base").mkdir(exist_ok=True)
        shutil.copy(BUNDLED_MODELS["books-5m"] / name, root / "base" / name)
    sizes = {"vocab_size": 8192, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    _make_adapter(model, root)
    _make_compressor(root)
    for name in ("one", "two"):
        (root / name).mkdir()
        (root / name / "result.json").write_text(json.dumps(_result(name)))
    assert _invoke("extend", str(root / "base"), *YARN, "-o", str(root / "extended")).exit_code == 0
    return root


def _make_adapter(model: Any, root: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.save_pretrained(root / "adapter")
    config = json.loads((root / "adapter/adapter_config.json").read_text())
    (root / "adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))


def _make_compressor(root: Path) -> None:
    from longext.compressor.base import build_compressor
    from longext.compressor.checkpoint import find_base, load_backbone, save_compressor
    from longext.compressor.spec import CompressorSpec

    (root / "uio").mkdir()
    base = find_base(str(root / "base"))
    backbone, _ = load_backbone(base, device="cpu")
    save_compressor(root / "uio", build_compressor(backbone, CompressorSpec(segment=8, ratios=(4,), rank=2)), base)
    (root / "text.txt").write_text("The keeper climbed the stairs every night. " * 4)
    memory = ("--context", str(root / "text.txt"), "--save-memory", str(root / "memory.safetensors"))
    result = _invoke("generate", str(root / "uio"), *memory, "--max-new-tokens", "0")
    assert result.exit_code == 0, result.output


def _result(name: str) -> dict[str, Any]:
    row = {"length": 512, "ppl": 8.5, "ppl_low": 8.0, "ppl_high": 9.0, "num_tokens": 256}
    held = {"model": {"id": name}, "protocol": {"name": "sliding", "stride": 256}, "data": {"source": "sample"}}
    return {"schema": "longext.result/1", "kind": "ppl", "command": "longext", "versions": {}, **held, "results": [row]}


def _invoke(*args: str) -> Any:
    from longext.cli import app

    return CliRunner().invoke(app, list(args))


# --- kinds ------------------------------------------------------------------------------------------------------------

Make = Callable[[random.Random, Path], Arguments]
_PPL = ("eval", "ppl", "base", "--lengths", "32", "--stride", "16", "--max-tokens", "64", "--data")


def _json_file(name: str, *commands: Arguments) -> Make:
    """A JSON file with a hostile value, text or kind of file, read by one of `commands`."""

    def make(rng: random.Random, here: Path) -> Arguments:
        path = here / name
        content = path.read_bytes()
        if rng.random() < 0.06:
            hostile_file(path, rng)
        else:
            path.unlink()
            path.write_bytes(json_bytes(json.loads(content), rng))
        return rng.choice(commands)

    return make


def _weights(name: str, *commands: Arguments) -> Make:
    def make(rng: random.Random, here: Path) -> Arguments:
        content = (here / name).read_bytes()
        (here / name).unlink()
        (here / name).write_bytes(safetensors_bytes(content, rng))
        return rng.choice(commands)

    return make


def _memory(rng: random.Random, here: Path) -> Arguments:
    content = (here / "memory.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = header["__metadata__"]["longext"]
    header["__metadata__"]["longext"] = json_bytes(json.loads(described), rng).decode("utf-8", "replace")
    text = json.dumps(header).encode()
    (here / "memory.safetensors").unlink()
    (here / "memory.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return _GO_ON


_GO_ON = ("generate", "uio", "--memory", "memory.safetensors", "--prompt", "In", "--max-new-tokens", "1")


def _recipe(rng: random.Random, here: Path) -> Arguments:
    text = f"model: base\nmethod: yarn\nfactor: 8\noutput: out\n{rng.choice(YAML)}"
    content = text.encode() if rng.random() < 0.8 else broken_text(text.encode(), rng)
    (here / "r.yaml").write_bytes(rng.choice((content, rng.choice(YAML).encode())))
    return ("extend", "-c", "r.yaml", "-o", "out")


_ROW_COMMANDS: dict[str, Arguments] = {
    "text": (*_PPL, "rows.jsonl", "--lengths", "4096", "-o", "out"),
    "alpaca": ("finetune", "base", "--data", "rows.jsonl", "--task", "sft", "--dry-run"),
    "messages": ("finetune", "base", "--data", "rows.jsonl", "--task", "sft", "--dry-run"),
    "longbench": (
        "eval",
        "longbench",
        "base",
        "--data",
        "data",
        "--tasks",
        "hotpotqa",
        "--batch-tokens",
        "0",
        "-o",
        "out",
    ),
}


def _rows(rng: random.Random, here: Path) -> Arguments:
    kind = rng.choice(sorted(ROWS))
    row = json.dumps(ROWS[kind]).encode()
    lines = [row, json_bytes(ROWS[kind], rng).replace(b"\n", b" "), row]
    path = here / ("data/hotpotqa.jsonl" if kind == "longbench" else "rows.jsonl")
    path.parent.mkdir(exist_ok=True)
    if rng.random() < 0.05:
        hostile_file(path, rng)
    else:
        path.write_bytes(b"\n".join(lines))
    return _ROW_COMMANDS[kind]


def _documents(rng: random.Random, here: Path) -> Arguments:
    names = ("a.txt", "a.md", "a.json", "a.jsonl", "a.parquet", os.fsdecode(b"\xff.txt"))
    path = here / rng.choice(names)
    if rng.random() < 0.3:
        hostile_file(path, rng)
    else:
        path.write_bytes(broken_text(json.dumps(ROWS["text"]).encode(), rng))
    command = (*_PPL, path.name, "--lengths", "4096", "-o", "out")
    return rng.choice((command, ("generate", "base", "--context", path.name, "--max-new-tokens", "1")))


_FLAGS: list[tuple[Arguments, tuple[str, ...]]] = [
    (
        ("extend", "base", *YARN, "-o", "out"),
        ("--factor", "--target-length", "--original-length", "--beta-fast", "--set"),
    ),
    (("extend", "base", "--method", "abf", "--factor", "8", "-o", "out"), ("--rope-theta", "--factor", "--method")),
    (
        ("plan", "base"),
        ("--length", "--gpus", "--lora-r", "--batch-size", "--num-tokens", "--group-ratio", "--utilisation"),
    ),
    (("passkey", "base", "-o", "out", "--num-trials", "0"), ("--depths", "--lengths", "--seed", "--num-digits")),
    ((*_PPL, "text.txt", "--lengths", "4096", "-o", "out"), ("--stride", "--seed", "--max-tokens", "--num-bootstrap")),
    (("finetune", "base", "--data", "text.txt", "--dry-run"), ("--num-steps", "--seed", "--lora-r", "--learning-rate")),
    (("compress-train", "base", "--data", "text.txt", "--dry-run"), ("--segment", "--ratio", "--seed", "--overlap")),
    (("generate", "base", "--prompt", "x", "--max-new-tokens", "1"), ("--temperature", "--top-p", "--seed", "--ratio")),
]
_FLAG_VALUES = [
    *(
        "0",
        "-1",
        "1e300",
        "nan",
        "inf",
        "-inf",
        "1" * 5000,
        "1e999",
        "text",
        "",
        " ",
        "0x10",
        "1,2,,3",
        "1.5",
        str(2**70),
    ),
    *(
        "1000000000000xH100-80GB",
        "0xH100",
        "a=b",
        "factor=1e300",
        "factor=[[",
        "seed=",
        "=",
        "\ud800",
        "[/red]",
        "${x}",
        "٣",
    ),
]


def _flags(rng: random.Random, here: Path) -> Arguments:
    command, names = rng.choice(_FLAGS)
    extra = ("--length", "64") if command[0] == "plan" and rng.random() < 0.8 else ()
    return (*command, *extra, f"{rng.choice(names)}={rng.choice(_FLAG_VALUES)}")


_PATTERNS = (
    r"(a|a)*(\w+)+(\w+)+$",
    "(",
    r"((\w|\.)+)+X",
    "(?:.*)*(?:.*)*y",
    "[",
    "*",
    "a" * 5000,
    "(?P<x>",
    r"(.+)+q_projX",
)


def _patterns(rng: random.Random, here: Path) -> Arguments:
    path = here / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    key = rng.choice(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"))
    pattern = rng.choice(_PATTERNS)
    path.unlink()
    path.write_text(
        json.dumps({**config, key: {pattern: 2} if key.endswith("k_pattern") or "alpha" in key else pattern})
    )
    return _MERGE


_MERGE = ("merge", "adapter", "--base", "base", "--no-check", "-o", "out")
_EXTEND = ("extend", "base", *YARN, "-o", "out")
KINDS: dict[str, tuple[int, Make]] = {
    "config": (140, _json_file("base/config.json", _EXTEND, _EXTEND, ("plan", "base", "--length", "64"))),
    "config of a model that runs": (40, _json_file("base/config.json", (*_PPL, "text.txt", "--lengths", "4096"))),
    "side files": (30, _json_file("base/tokenizer_config.json", _EXTEND)),
    "run.json": (
        60,
        _json_file("extended/run.json", ("extend", "extended", "--method", "yarn", "--factor", "16", "-o", "out")),
    ),
    "weights": (60, _weights("base/model.safetensors", _EXTEND)),
    "weights that run": (20, _weights("base/model.safetensors", (*_PPL, "text.txt", "--lengths", "4096"))),
    "adapter config": (40, _json_file("adapter/adapter_config.json", _MERGE)),
    "adapter weights": (20, _weights("adapter/adapter_model.safetensors", _MERGE)),
    "adapter patterns": (8, _patterns),
    "compressor": (
        30,
        _json_file("uio/compressor.json", ("generate", "uio", "--prompt", "In", "--max-new-tokens", "1")),
    ),
    "memory": (25, _weights("memory.safetensors", _GO_ON)),
    "memory description": (25, _memory),
    "results": (
        60,
        _json_file("one/result.json", ("eval", "diff", "one", "two"), ("report", "one", "two", "-o", "out")),
    ),
    "recipes": (80, _recipe),
    "rows": (60, _rows),
    "documents": (40, _documents),
    "flags": (100, _flags),
}


# --- the rule ---------------------------------------------------------------------------------------------------------


def _copy(world: Path, here: Path) -> None:
    """Lay out `world` in an empty directory; files are links, which a case breaks before it writes."""
    for path in world.rglob("*"):
        target = here / path.relative_to(world)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.link(path, target)


def _state(here: Path) -> dict[str, str]:
    """What lies in a directory, the output left out: kinds, sizes and contents."""
    found = {}
    for path in sorted(here.rglob("*")):
        name = str(path.relative_to(here))
        if path.relative_to(here).parts[0] not in ("out", "results"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path.is_dir())
    return found


def _strict(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _nonsense(here: Path) -> str | None:
    """What is wrong with an output that a command called good."""
    path = here / "out/config.json"
    if not path.is_file():
        return None
    config = _strict(path.read_text())
    text = config.get("text_config", config)
    theta = text.get("rope_theta")
    if not (isinstance(theta, (int, float)) and 0 < theta < math.inf):
        return f"rope_theta {theta}"
    length = text["max_position_embeddings"]
    if not isinstance(length, int) or not 0 < length < 2**40:
        return f"max_position_embeddings {length}"
    factor = (text["rope_parameters"] or {}).get("factor", 1)
    return None if 1 <= factor <= 1e6 else f"factor {factor}"


def _trouble(args: Arguments, here: Path) -> str | None:
    """Run one case; return the rule that it broke."""
    before = _state(here)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        result = _invoke(*args)
    except Hang:
        return "hangs"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if isinstance(result.exception, Hang):
        return "hangs"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"traceback: {type(result.exception).__name__}: {str(result.exception)[:200]}"
    unforeseen = "Traceback" in result.output or "internal error" in result.output
    if result.exit_code not in (0, 1, 2, 130) or unforeseen:
        return f"exit code {result.exit_code}: {result.output[-300:]}"
    if _state(here) != before:
        return "changed what lies beside its output"
    left = [path.name for path in here.iterdir() if path.name.endswith(".running") or ".partial" in path.name]
    if result.exit_code == 0:
        return _nonsense(here) or (f"left {left}" if left else None)
    if len(lines) > 3 or not lines:
        return f"{len(lines)} lines on standard error: {result.stderr[:300]}"
    return f"left {left or 'out'}" if left or (here / "out").exists() else None


@pytest.fixture
def alarm():
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_ends_in_a_line_and_leaves_nothing(kind, world, tmp_path, monkeypatch, alarm):
    count, make = KINDS[kind]
    broken = []
    for number in range(count):
        rng, here = random.Random(f"{kind} {number}"), tmp_path / str(number)
        here.mkdir()
        _copy(world, here)
        monkeypatch.chdir(here)
        args = make(rng, here)
        trouble = _trouble(args, here)
        if trouble:
            broken.append(f"case {number}, {' '.join(args)[:200]}: {trouble}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(here)
    assert not broken, f"{len(broken)} of {count}:\n" + "\n".join(broken)


def test_there_are_enough_cases():
    assert sum(count for count, _ in KINDS.values()) >= 500
    assert len(VALUES) > 20
