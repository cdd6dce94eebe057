"""Run in a fresh interpreter by verify.py: load a checkpoint with plain transformers and report what it computes.

Imports nothing of longext. Usage: python -I _reload.py REQUEST.json; see verify.py for the request and the answer.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging


def _by_path(name: str) -> Any:
    """A file of checkpoint/ as a module: in an isolated interpreter it cannot be imported by name."""
    path = Path(__file__).parent.parent / "checkpoint" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_built = _by_path("_built")


def _logits(directory: str, path: str, request: dict[str, Any]) -> tuple[dict[str, list[str]], bool]:
    """Save the logits of the probe tokens to `path`.

    Return (problems: weights that do not fit, broken logits; whether it is the text model of a multimodal checkpoint).
    """
    config = _built.load_config(json.loads(Path(directory, "config.json").read_text(encoding="utf-8")))
    model, info = _built.auto_class(config).from_pretrained(
        directory,
        dtype=request["dtype"],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are among the problems, by name
        trust_remote_code=False,
    )
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value and key.endswith("_keys")}
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([request["input_ids"]]), use_cache=False).logits[0].float()
    broken = int((~logits.isfinite()).sum())
    if broken:
        problems["logits that are not finite"] = [f"{broken} of {logits.numel()}"]
    torch.save(logits, path)
    is_whole = "text_config" not in json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return problems, not is_whole and model.config.get_text_config() is model.config


def main() -> None:
    """Read the request, answer it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"computed": {}}
    for name, config in request["configs"].items():
        answer["computed"][name] = _built.measure(_built.load_config(config), request["lengths"])
    if request.get("input_ids"):
        problems = [_logits(directory, path, request) for path, directory in request["logits"].items()]
        answer["loading_problems"], answer["is_part"] = problems[0]  # the checkpoint itself; its base comes second
    answer["longext_imported"] = any(name.split(".")[0] == "longext" for name in sys.modules)
    Path(request["answer_path"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
