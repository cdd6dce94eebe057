"""Evaluations of a 1B shape: sliding-window perplexity against the usual loop, passkey prompts, generation."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from gpu_parts.base import Measurement, Setting

_WINDOWS = 24


def language_model(setting: Setting) -> Any:
    """Return a random model of the 1B shape with the bundled tokenizer."""
    from longext.checkpoint.bundled import BUNDLED_MODELS
    from longext.checkpoint.load import load_tokenizer
    from longext.models.hf import HFLanguageModel

    directory = BUNDLED_MODELS["books-5m"]
    torch.manual_seed(0)
    model = setting.build("llama3.2-1b", setting.tokens(2**15), "sdpa").eval()
    return HFLanguageModel("llama3.2-1b", model, load_tokenizer(directory), model.config.to_dict(), directory)


def sliding(setting: Setting, way: str, window: int, stride: int) -> dict[str, Any]:
    """Return scored tokens per second and peak GiB of sliding-window perplexity, by longext or by the usual loop."""
    from longext.evals.perplexity import TokenizedDocument, evaluate_perplexity
    from longext.evals.suites.ppl import Perplexity

    window, stride = setting.tokens(window), setting.tokens(stride)
    model = language_model(setting)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (window + (_WINDOWS - 1) * stride,), generator=generator).tolist()
    config = Perplexity(
        model="1b", data="random", protocol="sliding", lengths=(window,), stride=stride, num_bootstrap=0, num_buckets=1
    )

    def run(tokens: list[int]) -> tuple[float, int]:
        if way == "loop":
            return usual_loop(model.model, tokens, window, stride)
        row = evaluate_perplexity(model, [TokenizedDocument("random", tuple(tokens))], config)[0]
        return row.nll * row.num_tokens, row.num_tokens

    run(ids[: window + stride])
    setting.free()
    setting.reset_peaks()
    started = time.perf_counter()
    total, count = run(ids)
    setting.synchronise()
    seconds = time.perf_counter() - started
    return {"nll": total / count, "scored_per_second": count / seconds, **setting.peaks()}


def usual_loop(model: Any, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Return (total NLL, tokens scored) as most scripts do: one window at a time, the model's own loss, -100 labels."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, stride):
        batch = torch.tensor([ids[start : start + window]], device=model.device)
        labels = batch.clone()
        scored = stride if start else window - 1
        labels[:, :-scored] = -100
        with torch.no_grad():
            total += float(model(batch, labels=labels).loss) * scored
        count += scored
    return total, count


def passkey(setting: Setting, length: int, trials: int) -> dict[str, Any]:
    """Return prompts and prompt tokens per second of passkey retrieval."""
    from longext.evals.passkey import evaluate_passkey
    from longext.evals.suites.passkey import Passkey

    model = language_model(setting)
    length = max(128, setting.tokens(length))  # shorter prompts cannot be built

    def run(trials: int) -> None:
        evaluate_passkey(model, Passkey(model="1b", lengths=(length,), depths=(0.0, 0.5), num_trials=trials))

    run(1)
    setting.reset_peaks()
    started = time.perf_counter()
    run(trials)
    setting.synchronise()
    seconds = time.perf_counter() - started
    return {
        "prompts_per_second": 2 * trials / seconds,
        "prompt_tokens_per_second": 2 * trials * length / seconds,
        **setting.peaks(),
    }


def generation(setting: Setting, prompts: int, length: int) -> dict[str, Any]:
    """Return new tokens per second of greedy decoding behind prompts of `length` tokens, reading them included."""
    from longext.models.throughput.rows import write_rows

    model = language_model(setting)
    length, new = setting.tokens(length), setting.tokens(1024) // 8
    batch = torch.randint(3, 4096, (prompts, length), generator=torch.Generator().manual_seed(0)).tolist()
    write_rows(model, batch, 2, ())
    setting.reset_peaks()
    started = time.perf_counter()
    rows = write_rows(model, batch, new, ())
    setting.synchronise()
    seconds = time.perf_counter() - started
    return {"new_tokens_per_second": sum(map(len, rows)) / seconds, **setting.peaks()}


def evaluation(setting: Setting) -> list[Measurement]:
    """Return perplexity by way and window, passkey by length, generation by batch."""
    own = [
        Measurement(f"eval/sliding/{window} by {stride}/{way}", 5.0, partial(sliding, setting, way, window, stride))
        for window, stride in ((2048, 256), (8192, 1024))
        for way in ("loop", "longext")
    ]
    own += [
        Measurement(f"eval/passkey/{length}", seconds, partial(passkey, setting, length, 8))
        for length, seconds in ((4096, 4.0), (32_768, 10.0))
    ]
    return own + [
        Measurement(f"eval/generation/{count} of 4096", 6.0, partial(generation, setting, count, 4096))
        for count in (1, 8)
    ]
