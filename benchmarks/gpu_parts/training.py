"""Training steps: through longext as `longext finetune` runs them, and with transformers and peft alone."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gpu_parts.base import Measurement, NotAvailable, Setting

_TOKEN_OPTIONS = ("group_size", "tile", "sweep", "loss_chunk")  # a dry run makes these smaller with the rows
_WARM_UP = 8192  # tokens of the first, untimed row where a whole one would take too long
_RATE = {"llama2-7b": 7000, "llama3-8b": 5000}  # tokens per second, for estimates


class RandomRows:
    """Rows of random tokens under the interface of longext's training rows.

    Args:
        lengths: tokens of each row.
        vocabulary: token ids are below this.
        documents: documents in a row, of unequal length.
    """

    report = {"tokens_sha256": "random"}

    def __init__(self, lengths: Sequence[int], vocabulary: int, documents: int = 1) -> None:
        self.lengths, self.vocabulary, self.documents = lengths, vocabulary, documents

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = self.lengths[index]
        ids = torch.randint(3, self.vocabulary, (length,), generator=torch.Generator().manual_seed(index))
        borders = torch.tensor(
            [length * i * i // self.documents**2 for i in range(1, self.documents)], dtype=torch.long
        )
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "document_ids": torch.bucketize(torch.arange(length), borders, right=True),
        }

    def describe(self, index: int) -> str:
        """Name a row."""
        return f"random row {index}"


def finetune_config(setting: Setting, **options: Any) -> Any:
    """Return a FinetuneConfig with these options.

    Raises:
        NotAvailable: this version has no such option.
        ConfigError: longext refuses them.
    """
    from longext.training.config import FinetuneConfig
    from longext.training.settings import check_finetune_config

    missing = options.keys() - {field.name for field in dataclasses.fields(FinetuneConfig)}
    if missing:
        raise NotAvailable(f"no option {', '.join(sorted(missing))}")
    for name in _TOKEN_OPTIONS:
        value = options.get(name)
        if value is not None and str(value).isdigit():
            options[name] = type(value)(setting.tokens(int(value)))
    if setting.tiny and options.get("sweep") == "auto":  # which takes 8,192 tokens at least
        options["sweep"] = str(options.get("group_size") or setting.tokens(8192))
    config = FinetuneConfig(
        data="random", device=setting.device.type, accumulation=1, warmup_steps=0, save_every=None, **options
    )
    check_finetune_config(config)
    return config


def train(
    setting: Setting, shape: str, lengths: Sequence[int], callback: Any, *, documents: int = 1,
    base: Any = None, **options: Any,
) -> None:  # fmt: skip
    """Train one step per row on longext's engine: all that `longext finetune` does but reading and writing files.

    Args:
        lengths: tokens of each row; the last is the run's row length.
        callback: a TrainerCallback.
        documents: in a row.
        base: the model to train (default: one of this shape, in bfloat16).
        options: of FinetuneConfig.
    """
    from longext.attention.shifted import register_attention
    from longext.training.loading import Extension, implementation_of
    from longext.training.longlora import FinetunePlan
    from longext.training.run import set_up

    config = finetune_config(setting, model=shape, num_steps=len(lengths), **options)
    register_attention()
    torch.manual_seed(0)
    if base is None:
        base = setting.build(shape, lengths[-1], implementation_of(config))
    else:
        base.set_attn_implementation(implementation_of(config))
    rows = RandomRows(lengths, base.config.vocab_size, documents)
    with tempfile.TemporaryDirectory() as folder:
        extension = Extension(Path(folder), base.config.to_dict(), {"base_weights": "random"}, lengths[-1], lengths[-1])
        plan = FinetunePlan(config=config, source=Path(folder), row_length=lengths[-1], extension=extension)
        run = plan.prepare(base, None, rows, Path(folder))
        training = set_up(run)
        training.engine.add_callback(callback)
        with run.training():
            training.engine.train_from(None)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times steps, from the batch on the host to the optimiser's end, and counts peaks from the second step on."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.seconds, self._started = setting, list[float](), 0.0

    def begin(self) -> None:
        """Start the clock of a step; forget the peaks of loading and of the warm-up."""
        self.setting.synchronise()
        if len(self.seconds) <= 1:
            self.setting.reset_peaks()
        self._started = time.perf_counter()

    def end(self) -> None:
        """Note the seconds of a step."""
        self.setting.synchronise()
        self.seconds.append(time.perf_counter() - self._started)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.end()

    def figures(self, length: int) -> dict[str, Any]:
        """Return tokens per second and peaks over all steps but the first."""
        timed = self.seconds[1:]
        mean = sum(timed) / len(timed)
        return {"tokens": length, "tokens_per_second": length / mean, "step_seconds": mean, **self.setting.peaks()}


def ours(setting: Setting, shape: str, lengths: Sequence[int], **options: Any) -> dict[str, Any]:
    """Return the figures of longext's steps over rows of these lengths, the first one untimed."""
    clock = Clock(setting)
    train(setting, shape, lengths, clock, **options)
    return clock.figures(lengths[-1])


class Profile(Clock):
    """Times the device's kernels in the second step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start, and in the second step the profiler."""
        from torch.profiler import ProfilerActivity, profile

        self.begin()
        if len(self.seconds) == 1:
            kind = ProfilerActivity.CUDA if self.setting.device.type == "cuda" else ProfilerActivity.CPU
            self.profiler = profile(activities=[kind])
            self.profiler.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.end()
        if len(self.seconds) == 2:
            self.profiler.stop()

    def kernels(self, count: int = 40) -> dict[str, Any]:
        """Return the share of the step that the device worked, and what took longest: milliseconds, calls, name."""
        is_cuda = self.setting.device.type == "cuda"
        times = {
            event: (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e3
            for event in self.profiler.key_averages()
        }
        longest = sorted(times, key=lambda event: -times[event])[:count]
        lines = [f"{times[event]:9.1f} ms {event.count:6d} x {event.key[:120]}" for event in longest]
        return {"busy": sum(times.values()) / 1e3 / self.seconds[1], "kernels": lines}


def profiled(setting: Setting, shape: str, lengths: Sequence[int], **options: Any) -> dict[str, Any]:
    """Return the figures of longext's steps, and what the second one spent its time in."""
    clock = Profile(setting)
    train(setting, shape, lengths, clock, **options)
    found = clock.kernels()
    print("\n".join(found["kernels"]), flush=True)
    return {**clock.figures(lengths[-1]), **found}


def plain(setting: Setting, shape: str, lengths: Sequence[int], *, liger: bool) -> dict[str, Any]:
    """Return the figures of transformers and peft alone: LoRA, SDPA, checkpointing, their own loss; or with Liger."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    torch.manual_seed(0)
    base = setting.build(shape, lengths[-1], "sdpa")
    if liger:
        _liger("transformers")._apply_liger_kernel_to_instance(model=base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, lora).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    rows = RandomRows(lengths, base.config.vocab_size)
    clock = Clock(setting)
    for index in range(len(lengths)):
        clock.begin()
        ids = rows[index]["input_ids"][None].to(setting.device)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=not setting.tiny):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        clock.end()
    return clock.figures(lengths[-1])


def _liger(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"liger_kernel.{module}")
    except ImportError as error:
        raise NotAvailable("liger-kernel is not installed") from error


COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {
    "longext": ours,
    "HF + peft + SDPA": partial(plain, liger=False),
    "HF + peft + Liger": partial(plain, liger=True),
}


def steps(setting: Setting, length: int, *, whole: bool = False) -> list[int]:
    """Return the lengths of a measurement's rows: one warm-up, then two timed, one at 98k and beyond.

    Args:
        whole: the warm-up row has the full length (what is compiled for a length, or pins host memory, needs that).
    """
    timed = [length] if length > 2**16 else [length] * 2
    return [setting.tokens(n) for n in ([length] if whole or len(timed) > 1 else [_WARM_UP]) + timed]


def measurement(
    setting: Setting, name: str, run: Callable[..., Any], shape: str, length: int, *, whole: bool = False,
    rate: float | None = None, **options: Any,
) -> Measurement:  # fmt: skip
    """Return the measurement of a training step, with the time that it takes at `rate` tokens per second."""
    lengths = steps(setting, length, whole=whole)
    seconds = 4 + sum(lengths) / (rate or _RATE[shape])
    return Measurement(name, seconds, partial(run, setting, shape, lengths, **options))


def table(setting: Setting) -> list[Measurement]:
    """Return the table of all three columns."""
    rates = {8192: (9000, 8500, 9000), 32_768: (8300, 6000, 7000), 98_304: (6500, 3200, 3600)}
    return [
        measurement(setting, f"table/{length}/{name}", run, "llama2-7b", length, rate=rate)
        for length, all_rates in rates.items()
        for (name, run), rate in zip(COLUMNS.items(), all_rates, strict=True)
    ]


# name -> options of `longext finetune`; the numbers are tokens. First those that aim at the goals
VARIANTS: dict[int, dict[str, dict[str, Any]]] = {
    32_768: {
        "group 8192 + offload": {"group_size": 8192, "offload": True},
        "group 2048 + offload": {"group_size": 2048, "offload": True},
        "group 8192": {"group_size": 8192},
    },
    98_304: {
        "group 8192 + offload": {"group_size": 8192, "offload": True},
        "group 8192 + sweep 8192": {"group_size": 8192, "sweep": "8192"},
    },
}
MORE: dict[int, dict[str, dict[str, Any]]] = {
    32_768: {
        "group 2048": {"group_size": 2048},
        "group 8192 + kernels none": {"group_size": 8192, "kernels": "none"},
        "group 8192 + kernels liger": {"group_size": 8192, "kernels": "liger"},
        "group 8192 + kernels compile": {"group_size": 8192, "kernels": "compile"},
        "lora alone": {"tuning": "lora"},
        "offload": {"offload": True},
        "tile 4096": {"tile": 4096},
        "nested 4": {"nested": 4},
        "tile 4096 + nested 4": {"tile": 4096, "nested": 4},
        "group 8192 + sweep 8192": {"group_size": 8192, "sweep": "8192"},
        "group 2048 + sweep 2048 + no checkpointing": {"group_size": 2048, "sweep": "2048", "checkpointing": False},
        "group 4096 + sweep 4096 + every 2": {"group_size": 4096, "sweep": "4096", "checkpoint_every": 2},
    },
    98_304: {
        "group 8192": {"group_size": 8192},
        "tile 8192": {"tile": 8192},
        "group 8192 + tile 8192 + nested 6": {"group_size": 8192, "tile": 8192, "nested": 6},
        "full attention": {"attention": "full"},
    },
}


def variants(setting: Setting, part: str = "variants", ways: Any = None) -> list[Measurement]:
    """Return ways to train the rows of the table."""
    return [
        measurement(
            setting, f"{part}/{length}/{name}", ours, "llama2-7b", length, rate=8000,
            whole=options.get("kernels") == "compile" or "offload" in options or "sweep" in options, **options,
        )
        for length, named in (ways or VARIANTS).items()
        for name, options in named.items()
    ]  # fmt: skip


def more_variants(setting: Setting) -> list[Measurement]:
    """Return each option alone, and combinations beside the goals."""
    return variants(setting, "variants-more", MORE)


_S2 = {"group_size": 8192, "sweep": "auto"}


def sweep(setting: Setting) -> list[Measurement]:
    """Return a step that fits no card without a sweep."""
    return [measurement(setting, "sweep/s2/262144", ours, "llama3-8b", 262_144, **_S2)]


def sweep_full(setting: Setting) -> list[Measurement]:
    """Return the exact step of full attention, keys and values kept as longext chooses, or within a bound."""
    full = {"attention": "full", "sweep": "auto"}
    ways: dict[str, dict[str, Any]] = {"13 GiB of keys and values": {"kv_memory": 13.0}, "auto": {}}
    return [
        measurement(setting, f"sweep-full/131072/{name}", ours, "llama3-8b", 131_072, rate=1450, **full, **options)
        for name, options in ways.items()
    ]


def sweep_1m(setting: Setting) -> list[Measurement]:
    """Return the step over a million tokens."""
    return [measurement(setting, "sweep-1m/s2/1048576", ours, "llama3-8b", 2**20, rate=3000, **_S2)]


def profile(setting: Setting) -> list[Measurement]:
    """Return steps whose kernels are timed one by one."""
    swept = {"group_size": 4096, "sweep": "4096", "checkpointing": False}
    ways: dict[str, dict[str, Any]] = {"group 8192": {"group_size": 8192}, "sweep 4096 + no checkpointing": swept}
    return [
        measurement(setting, f"profile/32768/{name}", profiled, "llama2-7b", 32_768, rate=5000, **options)
        for name, options in ways.items()
    ]
