"""`longext extend`: time and disk on a 13 GB checkpoint, and against load + save_pretrained on one that fits anywhere.

python benchmarks/extend_speed.py [--gigabytes 13] [--folder DIR] [-o FILE]

Seconds are CPU time of the command and what it starts.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from records import add_output, write_record

from longext.checkpoint.bundled import BUNDLED_MODELS

SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16}


def sparse_checkpoint(directory: Path, size: int) -> Path:
    """Make a checkpoint whose one tensor is a hole of `size` bytes: the real size, none of the disk."""
    shutil.copytree(BUNDLED_MODELS["books-5m"], directory)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return directory


def random_checkpoint(directory: Path) -> Path:
    """Save a random Llama of about 270 M parameters in bfloat16 (0.5 GB)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=16, vocab_size=32_000)).to(torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def added_bytes(directory: Path, base: Path) -> int:
    """Return the bytes in `directory` that are not hard links to files of `base`."""
    linked = {(file.stat().st_dev, file.stat().st_ino) for file in base.iterdir()}
    files = [file.stat() for file in directory.iterdir()]
    return sum(s.st_size for s in files if (s.st_dev, s.st_ino) not in linked)


def timed(*command: str) -> float:
    """Run a command and return its CPU time in seconds, process start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load_and_save(base: Path, output: Path) -> list[str]:
    """The alternative: change the config, load the model, save it."""
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM as M\n"
        "c = AutoConfig.from_pretrained(sys.argv[1])\n"
        "c.rope_parameters = {**c.rope_parameters, 'rope_type': 'yarn', 'factor': 8.0,"
        " 'original_max_position_embeddings': c.max_position_embeddings}\n"
        "c.max_position_embeddings *= 8\n"
        "M.from_pretrained(sys.argv[1], config=c, dtype='auto').save_pretrained(sys.argv[2])\n"
    )
    return [sys.executable, "-c", code, str(base), str(output)]


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=int, default=13)
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    add_output(parser)
    args = parser.parse_args()
    longext = [sys.executable, "-m", "longext"]
    rows = []
    for words in (["--help"], ["extend", "--help"]):
        seconds = min(timed(*longext, *words) for _ in range(3))
        rows.append({"command": " ".join(["longext", *words]), "seconds": seconds})
        print(f"{rows[-1]['command']}: {seconds:.2f} s")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        big = sparse_checkpoint(root / "big", args.gigabytes * 10**9)
        extend = [*longext, "extend", "--method", "yarn", "--factor", "8"]
        for flags in ([], ["--no-check"]):
            output = root / f"big-out{len(flags)}"
            seconds = timed(*extend, str(big), *flags, "-o", str(output))
            added = added_bytes(output, big)
            name = " ".join(["extend", *flags])
            rows.append({"command": name, "gigabytes": args.gigabytes, "seconds": seconds, "bytes_added": added})
            print(f"{name} {args.gigabytes} GB (sparse): {seconds:.2f} s, {added / 1e6:.2f} MB added")
        small = random_checkpoint(root / "small")
        size = (small / "model.safetensors").stat().st_size
        theirs = timed(*load_and_save(small, root / "theirs"))
        theirs_added = added_bytes(root / "theirs", small)
        print(f"\n{size / 1e9:.2f} GB checkpoint{'':<8}{'seconds':>9}{'MB added':>10}{'time':>8}{'disk':>10}")
        rows.append({"command": "load + save", "gigabytes": size / 1e9, "seconds": theirs, "bytes_added": theirs_added})
        print(f"{'load + save_pretrained':<26}{theirs:>9.2f}{theirs_added / 1e6:>10.2f}{1:>7.2f}x{1:>9.4f}x")
        for flags in ([], ["--no-check"]):
            output = root / f"ours{len(flags)}"
            ours = timed(*extend, str(small), *flags, "-o", str(output))
            added = added_bytes(output, small)
            name = " ".join(["extend", *flags])
            rows.append({"command": name, "gigabytes": size / 1e9, "seconds": ours, "bytes_added": added})
            ratios = f"{ours / theirs:>7.2f}x{added / theirs_added:>9.4f}x"
            print(f"{f'longext {name}':<26}{ours:>9.2f}{added / 1e6:>10.2f}{ratios}")
    write_record(args.output, clock="CPU time of the command and what it starts", rows=rows)


if __name__ == "__main__":
    main()
