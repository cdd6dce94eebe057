"""Does `longext verify --endpoint` name the RoPE that a server applies? Every setting it knows, at 2x, 4x and 8x.

A local completions server (tests/completions_server.py) runs books-5m under each setting, its weights rounded to
8 bits a row; the checkpoint here is books-5m under YaRN of that factor.

    python benchmarks/served_rope.py docs/results/served-rope.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from completions_server import CompletionsServer

from longext import extend
from longext.cli.commands.verify import VerifyConfig
from longext.conversion.extend import extended_config, plan_extension
from longext.manifest import command_line, versions
from longext.models.endpoint.scaling import OWN, candidates, verify_endpoint
from longext.models.hf import load_language_model
from longext.models.methods import method_request
from longext.options import RuntimeConfig

FACTORS = (2.0, 4.0, 8.0)


def round_weights(model: torch.nn.Module) -> None:
    """Round each row of every matrix to 255 levels, as 8-bit files do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                step = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / step).round() * step)


def main(output: str) -> None:
    """Try all settings and write which were named rightly."""
    rows = []
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = extend("books-5m", "yarn", factor=factor, output=Path(folder) / "yarn", check=False)
            for weights in ("float32", "int8"):
                served = load_language_model(RuntimeConfig(model=str(checkpoint)))
                own, spec = served.config, plan_extension(method_request("yarn", "books-5m", factor=factor)).spec
                if weights == "int8":
                    round_weights(served.model)
                for name, method in {OWN: "", **candidates(spec, factor)}.items():
                    request = method_request(method, str(checkpoint)) if method else None
                    served.set_rope(extended_config(plan_extension(request)) if request else own)
                    with CompletionsServer(served).running() as url:
                        found = verify_endpoint(VerifyConfig(model=str(checkpoint), endpoint=url, length=640))
                    wanted = OWN if name == f"yarn {factor:g}x" else name
                    is_right = found.checks[1].name == wanted and "for certain" not in found.checks[0].detail
                    rows.append(
                        {
                            "factor": factor,
                            "weights": weights,
                            "applied": name,
                            "is_right": is_right,
                            "verdict": found.checks[0].detail,
                            "distances": {check.name: check.detail for check in found.checks[1:]},
                        }
                    )
                    print(
                        f"{factor:g}x {weights} {name}: {'right' if is_right else found.checks[0].detail}", flush=True
                    )
    right = sum(row["is_right"] for row in rows)
    record = {"command": command_line(), "versions": versions(), "right": right, "of": len(rows), "rows": rows}
    Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{right} of {len(rows)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
