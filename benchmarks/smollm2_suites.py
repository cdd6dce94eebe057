"""A real chat model on the suites people quote: SmolLM2-135M-Instruct, within its 8,192 tokens and at 16,384.

    python benchmarks/smollm2_suites.py SMOLLM2 --longbench LONGBENCH_FOLDER -o docs/results/suites/smollm2-135m

RULER, MRCR, GraphWalks, needles without shared words and LongBench as the model is; and three of RULER's needles at
twice its window, by YaRN and by a remapping that needs no training. Each suite's own command, with as many samples as a
CPU gives in an hour and a half; a stage that is finished is not run again. Writes suites.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from records import run_longext

from longext.manifest import versions

FAR = "ruler --tasks niah_single_1,niah_single_2,niah_multikey_1 --lengths 16384 --num-trials 1"
STAGES = {
    "ruler": "ruler --lengths 2048,4096 --num-trials 2",
    "nolit": "nolit --lengths 2048,4096 --depths 0.1,0.5,0.9 --num-trials 2 --answers both",
    "ruler at 8k": "ruler --lengths 8192 --num-trials 1",
    "mrcr": "mrcr --lengths 2048,4096 --needles 2 --num-trials 4 --answers both",
    "graphwalks": "graphwalks --lengths 2048,4096 --num-trials 3",
    "far, yarn": f"{FAR} --method yarn --factor 2",
    "far, leaky-rerope": f"{FAR} --method leaky-rerope:logn=true --factor 2",
    "longbench": "longbench --data {longbench} --limit 1 --max-length 3500",
}


def run(model: str, words: str, output: Path) -> dict[str, Any]:
    """Return the record of one suite, with its CPU seconds; it is run unless it is there."""
    seconds = output / "seconds.json"
    if not seconds.is_file():
        suite, *rest = words.split()
        taken = run_longext("eval", suite, model, *rest, "-o", output, "--force")
        seconds.write_text(json.dumps(taken))
        print(f"{output.name}: {taken:.0f} CPU s", flush=True)
    record: dict[str, Any] = json.loads((output / "result.json").read_text(encoding="utf-8"))
    return {**record, "cpu_seconds": json.loads(seconds.read_text())}


def main() -> None:
    """Run what is not there yet; write the records after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--longbench", default="", help="folder of <task>.jsonl files (without it: not run)")
    parser.add_argument("--work", type=Path, default=Path("out/suites"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.output.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {}
    for name, words in STAGES.items():
        if "{longbench}" in words and not given.longbench:
            continue
        words = words.format(longbench=given.longbench)
        records[name] = run(given.model, words, given.work / name.replace(", ", "-").replace(" ", "-"))
        text = json.dumps({"versions": versions(), "stages": records}, indent=1)
        (given.output / "suites.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
