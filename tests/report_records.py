"""Small records of every kind of result, made by hand, for the tests of `longext report`."""

from __future__ import annotations

import copy
import json

MODEL = {"id": "m", "tokenizer_sha256": "t", "dtype": "float32", "device": "cpu", "rope_parameters": {}}
MODEL |= {"num_threads": 1, "attention": "full (sdpa)", "max_position_embeddings": 512}
DATA = {"source": "books/", "sha256": "d" * 64, "num_documents": 3, "num_tokens": 900}


def make(kind, protocol, data=DATA, **body):
    head = {"schema": "longext.result/1", "kind": kind, "command": f"longext {kind}", "versions": {"torch": "2"}}
    own = {**head, "model": MODEL, "protocol": protocol, "data": data, **body}
    return copy.deepcopy(own)


def ppl_rows(first=40.0):
    return [
        {"length": n, "start": 0, "ppl": v, "ppl_low": v - 2, "ppl_high": v + 3, "nll": 3.5, "num_tokens": 99}
        for n, v in ((512, first), (1024, first / 2))
    ]


def cell(length, score, task="single", trials=10, **more):
    row = {"task": task, "length": length, "depth": None, "score": score, "low": score / 2, "high": 1.0}
    return {**row, "part": score, "whole": score, "num_trials": trials, **more}


def passkey_cell(length, accuracy, trials=10):
    counts = {"num_correct": round(accuracy * trials), "num_trials": trials, "num_tokens": float(length)}
    return {"length": length, "depth": None, "accuracy": accuracy, "low": 0.0, "high": 1.0, **counts}


def perplexity(first=40.0, **changes):
    protocol = {"id": "ppl/sliding", "definition": "windows", "stride": 256, "weighting": "token", "seed": 0}
    return {**make("perplexity", protocol, results=ppl_rows(first)), **changes}


def passkey(accuracy=0.5, trials=10):
    protocol = {"id": "passkey/landmark", "definition": "a key", "num_digits": 5, "seed": 0}
    rows = [passkey_cell(512, accuracy, trials)]
    return make("passkey", protocol, None, results=[{**rows[0], "depth": 0.5}], by_length=rows)


def needle(*tasks):
    rows = [cell(n, s, task) for task in tasks for n, s in ((512, 0.5), (1024, 0.25))]
    protocol = {
        "id": "needle/ruler",
        "definition": "needles",
        "scoring": "exact",
        "tasks": {t: {"keys": 1} for t in tasks},
    }
    pooled = [cell(512, 0.5, "all", 10 * len(tasks)), cell(1024, 0.25, "all", 10 * len(tasks))]
    return make("needle", protocol, None, results=rows, by_task=rows, by_length=pooled)


def longbench(**scores):
    rows = [
        {"task": task, "score": score, "buckets": None, "num_rows": 5, "category": "single", "metric": "f1"}
        for task, score in scores.items()
    ]
    english = dict.fromkeys(("single", "multi", "average")) | {"code": 56.0, "single": 30.5}
    averages = {"english": english, "chinese": {"single": None, "code": 56.0, "average": None}}
    protocol = {"id": "longbench-official", "definition": "answers", "limit": None, "max_length": 3500}
    data = {"source": "x", "sha256": dict.fromkeys(scores, "h")}
    return make("longbench", protocol, data, results=rows, averages=averages)


def compare():
    methods = [
        {
            "name": name,
            "rope_parameters": {"rope_type": "default"},
            "formula": "f",
            "perplexity": ppl_rows(first),
            "positions": [{"start": 1, "length": 256, "nll": 3.25, "ppl": 25.0, "num_tokens": 10}],
            "passkey": [{"length": 512, "depth": 0.5, "num_correct": 5, "num_trials": 10, "low": 0.2, "high": 0.8}],
            "passkey_by_length": [passkey_cell(512, 0.5)],
            "seconds": 1.0,
        }
        for name, first in (("none", 41.0), ("yarn:ramp=paper", 42.0))
    ]
    protocol = {
        "perplexity": {"id": "ppl/sliding", "stride": 256, "definition": "windows"},
        "positions": {"id": "ppl/positional", "definition": "positions"},
        "passkey": {"id": "passkey/landmark", "definition": "a key"},
        "seed": 0,
    }
    return make("compare", protocol, trained_length=512, short_length=512, factor=8.0, methods=methods)


def estimate(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "median": mean}


def efficiency():
    rows = [
        {"way": way, "ratio": ratio, "length": 512, "prefill_seconds": s, "decode_tokens_per_second": 10.0}
        | {"kv_bytes": 4096, "peak_bytes": 8192, "slots": 9}
        for way, ratio, s in (("full", None, 0.5), ("uio", 8, 0.25))
    ]
    return make("efficiency", {"id": "efficiency/prefill-decode", "num_repeats": 3}, None, results=rows)


def memory_perplexity():
    shared = {"ppl_low": 20.0, "ppl_high": 40.0, "num_places": 6}
    rows = [
        {"method": "memory", "length": n, "ppl": 30.0 - n / 512, "difference": None, **shared} for n in (0, 512)
    ] + [
        {"method": "no memory", "length": n, "ppl": 33.0, "difference": -0.125, **shared}
        | {"difference_low": -0.25, "difference_high": 0.0}
        for n in (0, 512)
    ]
    return make("memory-perplexity", {"id": "ppl/next-segment", "segment": 128}, results=rows)


def harness():
    row = {"filter": "none", "stderr": 0.01, "num_documents": 40, "num_fewshot": 0}
    rows = [
        {**row, "task": "arc", "metric": "acc", "value": 0.25, "higher_is_better": True},
        {**row, "task": "wiki", "metric": "word_perplexity", "value": 50.0, "higher_is_better": False},
    ]
    config = {"output_type": "multiple_choice", "dataset_path": "/a/b", "doc_to_text": "<function f at 0x7f12>"}
    tasks = {name: {"version": 1, "sha256": "h", "config": config} for name in ("arc", "wiki")}
    return make("harness", {"id": "lm-eval", "limit": None}, {"source": "lm-eval", "tasks": tasks}, results=rows)


def training(kind="finetune"):
    own = {"data": {"data_sha256": "a"}, "tuning": {}}
    lines = [{"step": s, "perplexity": {"512": p, "1024": p + 1}} for s, p in ((0, 90.0), (10, 50.0))]
    return {"schema": "longext.result/1", "kind": kind, kind.split("-")[0]: own, "final_loss": 3.5, "perplexity": lines}


def short():
    row = {"length": 256, "ppl": 41.0, "base_ppl": 40.0, "change": 0.025, "change_low": 0.01, "change_high": 0.04}
    base = {**MODEL, "config_sha256": "base"}
    return make("short-context", {"id": "ppl/short-context"}, base=base, passed=False, results=[row], undecided=[])


def effective():
    row = {"order": 1, "length": 256, "num_correct": 9, "num_trials": 10, "accuracy": 0.9, "low": 0.6, "high": 1.0}
    lengths = {"effective_length": 256, "unbroken_length": 256, "clear_length": None}
    return make("effective-length", {"id": "effective/passkey", "bar": 0.8}, None, results=[row], **lengths)


def reconstruction():
    metrics = {name: estimate(0.5) for name in ("bleu", "rouge_l", "accuracy", "bits_saved")}
    rows = [{"content": c, "ratio": 8, "num_segments": 4, "metrics": metrics} for c in ("text", "random")]
    model = {**MODEL, "compressor": {"directory": "out/memory", "arch": "uio"}}
    return {**make("reconstruction", {"id": "reconstruction/greedy"}, results=rows), "model": model}


def longbench_e():
    buckets = {"0-4k": 30.0, "4-8k": 20.0, "8k+": None}
    rows = [{"task": "qasper", "score": None, "buckets": buckets, "num_rows": 9, "metric": "f1"}]
    averages = {bucket: {"english": {"single": value}} for bucket, value in buckets.items()}
    protocol = {"id": "longbench-e-official", "limit": None}
    return make("longbench", protocol, {"source": "x", "sha256": {"qasper": "h"}}, results=rows, averages=averages)


def longbench_lm_eval(**scores):
    record = longbench(**scores)
    record["protocol"] |= {"id": "longbench-lm-eval", "not_comparable_with": "longbench-official"}
    return {**record, "averages": {"all": {"single": 21.5, "multi": None, "average": None}}}


def longeval():
    rows = [cell(200, 0.5, "lines"), cell(10, 1.0, "topics")]
    return make("longeval", {"id": "longeval"}, {"data": "generated", "num_cases": 9, "sha256": "h"}, results=rows)


def babilong():
    rows = [cell(n, 0.5, task) for task in ("qa1", "qa2") for n in (0, 4000)]
    pooled = [cell(n, 0.5, "all", 20) for n in (0, 4000)]
    data = {"data": "x", "num_rows": 9, "sha256": "h"}
    return make(
        "babilong", {"id": "babilong", "tasks": {"qa1": "one", "qa2": "two"}}, data, results=rows, by_length=pooled
    )


def positions():
    rows = [{"start": s, "length": e, "nll": v, "ppl": 9.0} for s, e, v in ((1, 256, 3.5), (256, 512, 3.25))]
    return make("perplexity", {"id": "ppl/positional", "stride": 256}, results=rows)


def write(folder, record, config=None):
    """Write a result directory; `config` goes into a run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    if config is not None:
        (folder / "run.json").write_text(json.dumps({"schema": "longext.run/1", "config": config}), encoding="utf-8")
    return str(folder)
