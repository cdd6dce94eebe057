"""What `longext verify --endpoint` tells of llama-cpp-python's server, with eight settings of RoPE injected, 3 factors.

    python benchmarks/endpoint.py out/endpoint     # a minute on one core; rows that are there already are kept

books-5m as a checkpoint extended by yarn at factors 2, 4 and 8; the server is given each of the settings of
`tests/servers.py` instead, one of which is right. Needs `pip install 'longext[gguf]' 'llama-cpp-python[server]'`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import longext
from longext.models.engines.served_rope import verify_endpoint
from longext.options import EndpointConfig, RuntimeConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    """Do what the arguments say."""
    from servers import injected, served

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    kept = out / "record.json"
    rows = json.loads(kept.read_text())["results"] if kept.is_file() else []
    for factor in (2.0, 4.0, 8.0):
        model = longext.extend("books-5m", "yarn", factor=factor, output=out / f"yarn-{factor:g}", force=True)
        done = {row["applied"] for row in rows if row["factor"] == factor}
        settings = {name: given for name, given in injected(factor).items() if name not in done}
        if not settings:
            continue
        with served(out, settings) as url:
            for name in settings:
                server = EndpointConfig(endpoint=url, endpoint_model=name)
                answer = verify_endpoint(RuntimeConfig(model=str(model), threads=1), server)
                found = answer.found and answer.found.name
                near, second = (each.distance for each in answer.candidates[:2])
                row = {"factor": factor, "applied": name, "found": found, "ok": answer.ok}
                rows.append({**row, "nearest": near, "second": second, "candidates": len(answer.candidates)})
                print(rows[-1], flush=True)
                write(kept, rows)
    print(f"{sum(row['found'] == row['applied'] for row in rows)} of {len(rows)} right")


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the record."""
    right = sum(row["found"] == row["applied"] for row in rows)
    versions = {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "transformers", "torch")}
    record = {"right": right, "of": len(rows), "versions": versions, "model": "books-5m", "results": rows}
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
