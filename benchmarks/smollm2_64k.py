"""A real model from 8,192 to 65,536 tokens on one GPU: YaRN, a few minutes of S2-Attn, measured before and after.

    python benchmarks/smollm2_64k.py --model DIR --data BOOKS --eval-data OTHER_BOOKS --out results/smollm2 --minutes 2

Perplexity and passkey at each length of the model as it is, extended by YaRN without training, and trained for
--minutes; how many steps that is follows from the first steps' seconds. Writes result.json and table.md. A stage that
is finished is not run again. On a CPU it runs with a small model, and --lengths that it reaches in minutes:

    python benchmarks/smollm2_64k.py --model books-5m --data BOOKS --eval-data OTHER_BOOKS --out results/try \\
        --lengths 512,1024 --group-size 256 --minutes 0.2
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import longext
from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import resolve_model
from longext.manifest import versions

PROBE_STEPS = 4
BEFORE, EXTENDED, TRAINED = "as it is", "extended, untrained", "extended and trained"


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="texts to train on")
    parser.add_argument("--eval-data", required=True, help="texts to measure on, as long as the longest length")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the trained adapters go (default: --out)")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training steps")
    parser.add_argument("--lengths", default="8192,16384,32768,65536", help="the longest is trained")
    parser.add_argument("--method", default="yarn")
    parser.add_argument("--group-size", type=int, default=8192, help="of S2-Attn")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--num-documents", type=int, default=3, help="of --eval-data")
    parser.add_argument("--num-trials", type=int, default=2, help="passkeys at each length and depth")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more settings of finetune")
    return parser.parse_args()


def stage(out: Path, name: str, work: Callable[[], Any]) -> Any:
    """Return the result of a stage, from its file where it is finished; `seconds` says how long it took."""
    file = out / "stages" / f"{name}.json"
    if not file.is_file():
        started = time.perf_counter()
        result = work()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"result": result, "seconds": time.perf_counter() - started}), encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def measure(given: argparse.Namespace, lengths: list[int], model: str, **rope: Any) -> dict[str, Any]:
    """Return perplexity and passkey of a model by length, the same texts and keys for every model."""
    loaded = longext.load(model, **rope)
    perplexity = longext.evaluate(
        loaded,
        "ppl",
        data=given.eval_data,
        max_documents=given.num_documents,
        max_tokens=max(lengths),
        lengths=lengths,
        stride=min(lengths) // 2,
    ).record
    passkey = longext.evaluate(loaded, "passkey", lengths=lengths, num_trials=given.num_trials).record
    return {
        "perplexity": {row["length"]: row["ppl"] for row in perplexity["results"]},
        "tokens_scored": perplexity["results"][0]["num_tokens"],
        "data_sha256": perplexity["data"]["sha256"],
        "passkey": {row["length"]: [row["num_correct"], row["num_trials"]] for row in passkey["by_length"]},
        "model": perplexity["model"],
    }


def train(given: argparse.Namespace, target: int, num_steps: int, output: Path) -> dict[str, Any]:
    """Fine-tune at the target length and return the record and the metrics of each step."""
    more = dict(pair.split("=", 1) for pair in given.set)
    shutil.rmtree(output.with_name(f"{output.name}.running"), ignore_errors=True)
    run = longext.finetune(
        given.model,
        data=given.data,
        output=output,
        force=True,
        method=given.method,
        target_length=target,
        attention="s2",
        group_size=given.group_size,
        accumulation=1,
        learning_rate=given.learning_rate,
        num_steps=num_steps,
        warmup_steps=min(10, num_steps // 5),
        save_every=None,
        **more,
    )
    return {"record": run.record, "metrics": run.metrics}


def seconds_of_a_step(metrics: list[dict[str, Any]], num_tokens: int) -> float:
    """Return the median seconds of the steps after the first, which compiles and warms up."""
    speeds = sorted(line["tokens_per_second"] for line in metrics if line.get("step", 0) > 1 and "loss" in line)
    return num_tokens / speeds[len(speeds) // 2]


def table(models: dict[str, dict[str, Any]], lengths: list[int]) -> str:
    """Return perplexity and passkey by length as Markdown."""
    head = f"| | {' | '.join(f'{length:,}' for length in lengths)} |\n|:--|{'--:|' * len(lengths)}\n"

    def rows(cell: Callable[[dict[str, Any], str], str]) -> str:
        return "".join(
            f"| {name} | {' | '.join(cell(found, str(length)) for length in lengths)} |\n"
            for name, found in models.items()
        )

    perplexity = rows(lambda found, length: f"{found['perplexity'][length]:.2f}")
    passkey = rows(lambda found, length: "{} of {}".format(*found["passkey"][length]))
    return f"**Perplexity**\n\n{head}{perplexity}\n**Passkey**\n\n{head}{passkey}"


def main() -> None:
    """Measure, train, measure, and write result.json and table.md."""
    given = arguments()
    lengths = sorted(int(text) for text in given.lengths.split(","))
    target, started = lengths[-1], time.perf_counter()
    trained_length = read_model_rope(resolve_model(given.model)).spec.original_max_position_embeddings
    rope = {"method": given.method, "factor": target / trained_length}
    work = given.work or given.out
    probe = stage(given.out, "probe", lambda: train(given, target, PROBE_STEPS, work / "probe"))
    seconds = seconds_of_a_step(probe["result"]["metrics"], target)
    num_steps = max(1, int(60 * given.minutes / seconds))
    print(f"{seconds:.2f} s a step of {target:,} tokens: {num_steps} steps in {given.minutes:g} minutes", flush=True)
    adapter = work / "adapter"
    stages = {  # the most telling first, if the time of a machine runs out
        EXTENDED: stage(given.out, "extended", lambda: measure(given, lengths, given.model, **rope)),
        "training": stage(given.out, "training", lambda: train(given, target, num_steps, adapter)),
        TRAINED: stage(given.out, "trained", lambda: measure(given, lengths, str(adapter))),
        BEFORE: stage(given.out, "before", lambda: measure(given, lengths, given.model)),
    }
    models = {name: stages[name]["result"] for name in (BEFORE, EXTENDED, TRAINED)}
    training = stages["training"]["result"]
    losses = [line["loss"] for line in training["metrics"] if "loss" in line]
    record = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "versions": versions(),
        "device": training["record"]["device"],
        "trained_length": trained_length,
        "factor": rope["factor"],
        "seconds_a_step": seconds,
        "seconds": {name: found["seconds"] for name, found in {"probe": probe, **stages}.items()},
        "training": training["record"],
        "losses": losses,
        "models": models,
    }
    (given.out / "result.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tokens = training["record"]["num_tokens"]
    lines = f"Trained on {tokens:,} tokens, loss {losses[0]:.3f} to {losses[-1]:.3f}.\n\n{table(models, lengths)}"
    (given.out / "table.md").write_text(lines, encoding="utf-8")
    print(f"{lines}\nWrote {given.out} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
