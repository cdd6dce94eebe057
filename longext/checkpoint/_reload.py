"""Run in a fresh interpreter by verify.py: load a checkpoint with plain transformers and report what it computes.

Imports nothing of longext. Usage: python -I _reload.py REQUEST.json; see verify.py for the request and the answer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging


def _rotary_modules(config: Any) -> Iterator[tuple[str, Any]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            yield name, type(module)(config=module.config)


def _frequencies(config: Any, length: int) -> dict[str, Any]:
    """{module[:layer_type]: [inv_freq after a forward over `length` positions, attention scaling]}."""
    found: dict[str, Any] = {}
    for name, module in _rotary_modules(config):
        nested = isinstance(module.rope_type, dict)
        for kind in module.rope_type if nested else [None]:
            prefix = f"{kind}_" if kind else ""
            if not hasattr(module, f"{prefix}inv_freq"):
                continue
            extra = {"layer_type": kind} if kind else {}
            module(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]), **extra)
            scaling = getattr(module, f"{prefix}attention_scaling", None)
            if scaling is None:
                scaling = module.attention_scaling
            inv_freq = getattr(module, f"{prefix}inv_freq")
            found[f"{name}:{kind}" if kind else name] = [inv_freq.double().tolist(), float(scaling)]
    return found


def _config(directory: Path, layout: str, keys: dict[str, list[str]]) -> Any:
    """AutoConfig of `directory` reduced to one layout of the RoPE keys ("both", "new", "old")."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    for key in keys.get(layout, []):
        text.pop(key, None)
    with tempfile.TemporaryDirectory() as scratch:  # transformers decodes what JSON has no number for as it reads
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return AutoConfig.from_pretrained(scratch, trust_remote_code=False)


def _logits(directory: str, path: str, request: dict[str, Any]) -> tuple[dict[str, list[str]], bool]:
    """Save the logits of the probe tokens to `path`.

    Return (problems: weights that do not fit, broken logits; whether it is the text model of a multimodal checkpoint).
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=request["dtype"],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are among the problems, by name
        trust_remote_code=False,
    )
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value and key.endswith("_keys")}
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([request["input_ids"]]), use_cache=False).logits[0].float()
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
    answer: dict[str, Any] = {"frequencies": {}}
    for layout in request["layouts"]:
        config = _config(Path(request["directory"]), layout, request["dropped_keys"])
        answer["frequencies"][layout] = {str(length): _frequencies(config, length) for length in request["lengths"]}
    if request.get("input_ids"):
        problems = [_logits(directory, path, request) for path, directory in request["logits"].items()]
        answer["loading_problems"], answer["is_part"] = problems[0]  # the checkpoint itself; its base comes second
    answer["longext_imported"] = any(name.split(".")[0] == "longext" for name in sys.modules)
    Path(request["answer_path"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
