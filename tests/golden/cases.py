"""Command lines on books-5m, and what each left before longext was restructured.

`records/NAME.json` holds what the case NAME left (`records.KEPT`), with marks in place of all that differs from run to
run or from machine to machine (`records.normalise`). The code at 5a2bc2e wrote them, and
`tests/e2e/test_golden_records.py` holds the code to them. A record is written again only where its numbers are meant
to change: write it, read the difference, and say in the commit why.

    python tests/golden/cases.py --write NAME ...    these cases
    python tests/golden/cases.py --write             all of them (about a minute)

`options.json` (every spelling of every option, and the keys of recipes) and `commands.txt` (every command line in
README.md, docs/, recipes/ and benchmarks/) are the interface at the same commit. What is dropped from it on purpose is
taken out of them by hand; writing them from newer code would defeat their purpose.

All cases run in one folder, which `inputs.write_inputs` fills, and read nothing outside it: no network, no shared/.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

# `eval diff`, `inspect` and others compute on no device; results of a GPU are others than those of a CPU
WITHOUT_DEVICE = ("eval diff", "extend", "inspect", "merge", "plan", "report", "verify")


@dataclass(frozen=True)
class Case:
    """A command line.

    Attributes:
        command: without the leading `longext`. `-o NAME` and `--device cpu` are added where they belong.
        needs: the cases whose output it reads; they run first.
        code: its exit code.
        writes: whether it takes -o; False where what it prints (`--json`) is all that it leaves.
    """

    command: str
    needs: tuple[str, ...] = ()
    code: int = 0
    writes: bool = True


PPL = "eval ppl books-5m --lengths 96,192 --max-tokens 400 --num-bootstrap 20"
YARN = "--method yarn --factor 8"
NEXT = "--lengths 0,64 --max-tokens 400 --num-places 3 --num-bootstrap 20"
PASSKEY = "--lengths 128,256 --depths 0,0.5,1 --num-trials 1"
NEEDLE = "eval needle books-5m --lengths 256,320 --num-trials 2 --num-needles 2"
LONGBENCH = "eval longbench books-5m --max-length 120"
SHORT = "--lengths 64,128 --max-tokens 600 --num-bootstrap 20"
TRAIN = "--data sample --num-steps 2 --learning-rate 1e-3 --set warmup_steps=0"
FINETUNE = f"finetune books-5m {TRAIN} --accumulation 1 --target-length 1024"
COMPRESS = f"compress-train books-5m {TRAIN} --segment 32 --document-length 128 --lora-r 4 --lora-alpha 8"
EXTEND = "extend books-5m --method"

CASES: dict[str, Case] = {
    # what other cases read: a trained compressor, a trained adapter
    "uio": Case(f"{COMPRESS} --ratio 4,8 --objectives lm:1,ae:0.5,distill:0.5 --grad-check 1"),
    "adapter": Case(f"{FINETUNE} --method yarn --lora-r 4 --eval-data sample --set eval_documents=1"),
    # perplexity
    "ppl-sliding": Case(f"{PPL} --stride 64"),
    "ppl-sliding-yarn": Case(f"{PPL} --stride 64 {YARN}"),
    "ppl-sliding-ntk-parts-bars": Case(
        f"{PPL} --method ntk-by-parts:ramp=code --factor 4 --fail-over 96=1 --fail-over 192=1e6", code=1
    ),
    "ppl-sliding-dynamic": Case(
        "eval ppl books-5m --lengths 640 --max-tokens 900 --num-bootstrap 5 --method dynamic --factor 8"
    ),
    "ppl-documents": Case("eval ppl books-5m --data texts --lengths 64 --stride 32 --num-bootstrap 20"),
    "ppl-positional": Case(f"{PPL} --protocol positional --num-buckets 4"),
    "ppl-positional-yarn": Case(f"{PPL} --protocol positional --num-buckets 4 {YARN}"),
    "ppl-yarn-truncated": Case(f"{PPL} --protocol yarn-truncated"),
    "ppl-yarn-truncated-yarn": Case(f"{PPL} --protocol yarn-truncated {YARN}"),
    "ppl-longlora": Case(f"{PPL} --protocol longlora --stride 64"),
    "ppl-longlora-linear": Case(f"{PPL} --protocol longlora --stride 64 --method linear --factor 2"),
    "ppl-adapter": Case("eval ppl adapter --lengths 128 --max-tokens 300 --num-bootstrap 5", needs=("adapter",)),
    # perplexity through a memory
    "ppl-memory-window": Case(f"eval ppl books-5m --memory window:100 --segment 32 {NEXT}"),
    "ppl-memory-streaming": Case(f"eval ppl books-5m --memory streaming:4+60 --segment 32 {NEXT}"),
    "ppl-memory-transformer-xl": Case(f"eval ppl books-5m --memory transformer-xl:64 --segment 32 {NEXT}"),
    "ppl-memory-uio": Case(f"eval ppl --memory uio@8 {NEXT}", needs=("uio",)),
    "ppl-memory-uio-overlap": Case(f"eval ppl books-5m --memory uio@4+16 {NEXT}", needs=("uio",)),
    "ppl-memory-uio-sliding": Case(
        "eval ppl --memory uio --protocol sliding --lengths 160 --stride 64 --max-tokens 300 --num-bootstrap 5",
        needs=("uio",),
    ),
    "ppl-memory-streaming-positional": Case(
        "eval ppl books-5m --memory streaming:4+60 --segment 32 --protocol positional --lengths 160 --max-tokens 300 "
        "--num-buckets 4 --num-bootstrap 5"
    ),
    # passkey
    "passkey-landmark": Case(f"passkey books-5m {PASSKEY}"),
    "passkey-landmark-needles": Case(
        f"passkey books-5m {PASSKEY} --filler book --num-needles 2 --num-digits 3 --seed 3 --fail-under 0"
    ),
    "passkey-landmark-yarn": Case(f"passkey books-5m {PASSKEY} {YARN} --fail-under 256=1", code=1),
    "passkey-longlora": Case("passkey books-5m --protocol longlora --lengths 300 --depths 0,0.5 --num-trials 2"),
    "passkey-yarn": Case(f"passkey books-5m --protocol yarn --lengths 192,256 --num-trials 1 {YARN}"),
    "passkey-memory-window": Case(f"passkey books-5m --memory window:96 --segment 64 {PASSKEY}"),
    "passkey-memory-uio": Case(
        "passkey --memory uio@8 --lengths 160 --depths 0.5 --num-trials 2", needs=("uio",)
    ),
    # needles
    "needle-exact": Case(f"{NEEDLE} --scoring exact --haystack noise"),
    "needle-exact-depths": Case(f"{NEEDLE} --scoring exact --tasks single,multikey --depths 0,1 --key-type numbers"),
    "needle-match": Case(f"{NEEDLE} --tasks single,multivalue --haystack noise --max-new-tokens 20 --seed 1"),
    "needle-match-depths": Case(f"{NEEDLE} --tasks single --depths 0,1 --max-new-tokens 12 {YARN}"),
    "needle-memory-window": Case(
        f"{NEEDLE} --tasks single,multiquery --scoring exact --memory window:128 --segment 64"
    ),
    # longeval
    "longeval-lines": Case("eval longeval books-5m --sizes 3,5 --num-cases 2 --complete"),
    "longeval-lines-yarn": Case(f"eval longeval books-5m --sizes 3,20 --num-cases 2 --complete {YARN}"),
    "longeval-data": Case("eval longeval books-5m --data lines --complete"),
    "longeval-data-memory": Case("eval longeval books-5m --data lines --memory window:128 --segment 64"),
    "longeval-predictions": Case("eval longeval --predictions 3_response.txt"),
    # babilong
    "babilong": Case("eval babilong books-5m --data facts --tasks qa1,qa2 --num-cases 2 --max-new-tokens 6"),
    "babilong-yarn": Case(
        f"eval babilong books-5m --data facts --tasks qa1 --lengths 1k --max-new-tokens 6 {YARN} --fail-under 0.9",
        code=1,
    ),
    "babilong-memory": Case(
        "eval babilong books-5m --data facts --tasks qa2 --lengths 0k --max-new-tokens 6 "
        "--memory window:128 --segment 64"
    ),
    # longbench
    "longbench": Case(f"{LONGBENCH} --data bench"),
    "longbench-yarn": Case(f"{LONGBENCH} --data bench --tasks hotpotqa,lcc --limit 1 --max-length 700 {YARN}"),
    "longbench-memory": Case(
        "eval longbench books-5m --data bench --tasks hotpotqa --limit 1 --memory window:128 --segment 64"
    ),
    "longbench-e": Case(f"{LONGBENCH} --data bench --e --tasks hotpotqa,trec,lcc"),
    "longbench-predictions": Case("eval longbench --predictions answers --data bench --fail-under trec=100", code=1),
    "longbench-predictions-alone": Case("eval longbench --predictions answers"),
    "longbench-predictions-e": Case("eval longbench --predictions answers-e --e --data bench"),
    # short texts, effective length
    "short": Case(f"eval short books-5m --against books-5m {SHORT}"),
    "short-linear": Case(f"eval short books-5m --method linear --factor 8 {SHORT}", code=1),
    "short-extended": Case(
        "eval short extend-dynamic --against books-5m --num-windows 1 --tolerance 0.1 --num-bootstrap 5",
        needs=("extend-dynamic",),
    ),
    "short-memory": Case(f"eval short books-5m --memory window:192 --segment 64 {SHORT}"),
    "effective-passkey": Case("eval effective books-5m --num-trials 1 --depths 0,1 --max-length 256"),
    "effective-needle": Case(
        "eval effective books-5m --test needle --num-trials 1 --depths 0,1 --min-length 256 --max-length 320 "
        "--method linear --factor 2 --bar 0.5"
    ),
    # compressors: reconstruction, efficiency
    "reconstruction": Case(
        "eval reconstruction uio --num-samples 3 --num-bootstrap 10 --max-tokens 300 --ratio 8 "
        "--content text,shuffled,random",
        needs=("uio",),
    ),
    "reconstruction-ratio": Case(
        "eval reconstruction uio --num-samples 2 --num-bootstrap 5 --max-tokens 200 --ratio 4,16 --batch-tokens 64",
        needs=("uio",),
    ),
    "efficiency": Case(
        "eval efficiency books-5m --lengths 64,96 --window 32 --num-new-tokens 2 --num-repeats 1"
    ),
    "efficiency-uio": Case(
        "eval efficiency uio --lengths 64,128 --num-new-tokens 2 --num-repeats 1", needs=("uio",)
    ),
    # lm-evaluation-harness
    "harness": Case("eval harness books-5m --include-path tasks --tasks choices,answers,rolling --num-bootstrap 20"),
    "harness-group": Case(
        "eval harness books-5m --include-path tasks --tasks both --max-length 256 --fail-under both:acc=1.1", code=1
    ),
    "harness-fewshot": Case(
        "eval harness books-5m --include-path tasks --tasks examples --num-fewshot 1 --limit 2 "
        "--system-instruction Read."
    ),
    "harness-memory": Case("eval harness --include-path tasks --tasks choices --memory uio@8", needs=("uio",)),
    # compare, diff, report
    "compare": Case(
        "compare books-5m --lengths 96,192 --max-tokens 300 --num-bootstrap 10 --stride 64 --depths 0,1 --num-trials 1 "
        "--methods none,dynamic:alpha=4,abf:rope_theta=80000 --factor 4 --num-buckets 4"
    ),
    "compare-no-passkey": Case(
        "compare books-5m --lengths 640 --max-tokens 700 --num-bootstrap 5 --num-buckets 2 --factor 2 "
        "--methods none,yarn:ramp=code --no-passkey"
    ),
    "diff-ppl": Case(
        "eval diff ppl-sliding ppl-sliding-yarn --json", writes=False, needs=("ppl-sliding", "ppl-sliding-yarn")
    ),
    "diff-passkey": Case(
        "eval diff passkey-landmark passkey-landmark-needles/result.json --json",
        writes=False,
        needs=("passkey-landmark", "passkey-landmark-needles"),
    ),
    "diff-longbench": Case(
        "eval diff longbench longbench-predictions --json", writes=False, needs=("longbench", "longbench-predictions")
    ),
    "report": Case(
        "report ppl-sliding ppl-sliding-yarn passkey-landmark passkey-landmark-yarn short-linear",
        needs=("ppl-sliding", "ppl-sliding-yarn", "passkey-landmark", "passkey-landmark-yarn", "short-linear"),
    ),
    "report-suites": Case(
        "report needle-match-depths longbench-memory babilong-memory harness-fewshot effective-passkey",
        needs=("needle-match-depths", "longbench-memory", "babilong-memory", "harness-fewshot", "effective-passkey"),
    ),
    "report-memory": Case(
        "report ppl-memory-uio reconstruction-ratio",
        needs=("ppl-memory-uio", "reconstruction-ratio"),
    ),
    # training
    "finetune-full": Case(f"{FINETUNE} --method linear --tuning full --attention full"),
    "finetune-pose": Case(
        f"{FINETUNE} --method linear --positions pose --window 128 --tuning lora --set eval_documents=1"
    ),
    "finetune-sft": Case(f"{FINETUNE} --data sft.jsonl --task sft --method ntk --tuning lora+norm"),
    "finetune-dry-run": Case(f"{FINETUNE} --method yarn --dry-run --json", writes=False),
    "compress-anchor": Case(f"{COMPRESS} --arch anchor --ratio 8 --gradient window:1 --overlap 8"),
    "compress-icae": Case(f"{COMPRESS} --arch icae --ratio 8 --objectives ae"),
    "compress-autocompressor": Case(
        f"{COMPRESS} --arch autocompressor --ratio 8 --eval-data sample --eval-lengths 32,64"
    ),
    "compress-rmt": Case(f"{COMPRESS} --arch rmt --ratio 8 --gradient stop:1"),
    "compress-gist": Case(f"{COMPRESS} --arch gist --ratio 8 --gradient reservoir:2"),
    "compress-beacon": Case(f"{COMPRESS} --arch beacon --ratio 8"),
    "compress-prefix": Case(f"{COMPRESS} --arch prefix --ratio 8"),
    "compress-qa": Case(f"{COMPRESS} --data sft.jsonl --ratio 8 --objectives qa"),
    "compress-dry-run": Case(f"{COMPRESS} --ratio 8 --dry-run --json", writes=False),
    # checkpoints
    **{
        f"extend-{method}": Case(f"{EXTEND} {method} {options}")
        for method, options in {
            "linear": "--factor 4",
            "ntk": "--factor 4",
            "ntk-by-parts": "--factor 4 --beta-fast 16 --beta-slow 2",
            "dynamic": "--factor 4",
            "yarn": "--target-length 4096",
            "longrope": "--factor 4 --factors factors.json",
            "llama3": "--factor 4 --low-freq-factor 1 --high-freq-factor 8",
            "abf": "--factor 4 --rope-theta 80000",
        }.items()
    },
    "extend-yarn-code": Case(
        f"{EXTEND} yarn --factor 8 --ramp code --no-truncate --attention-factor 1.2"
    ),
    "extend-dynamic-alpha": Case(f"{EXTEND} dynamic --factor 4 --alpha 4"),
    "merge": Case("merge adapter", needs=("adapter",)),
    "merge-proof": Case("merge adapter --dtype float32 --json -o merge-proof", needs=("adapter",), writes=False),
    "verify": Case("verify extend-yarn --json", writes=False, needs=("extend-yarn",)),
    "verify-merge": Case("verify merge --json", writes=False, needs=("merge",)),
    "inspect": Case("inspect books-5m --json -o inspect", writes=False),
    "inspect-yarn": Case(f"inspect books-5m {YARN} --json -o inspect-yarn", writes=False),
    "plan": Case("plan books-5m --length 4096 --json", writes=False),
    "plan-llama": Case(
        "plan llama2-7b --length 32768 --gpus 8xA100-80GB --num-tokens 2000000000 --json", writes=False
    ),
    "plan-llama-full": Case(
        "plan llama2-7b --length 8192 --method full --sharding fsdp --gpus 4xH100-80GB --sequence-parallel 2 --offload "
        "--json",
        writes=False,
    ),
    # through a chat template
    "needle-chat": Case("eval needle chat --tasks single --lengths 320 --num-trials 2 --max-new-tokens 16"),
    "longbench-chat": Case("eval longbench chat --data bench --tasks hotpotqa,samsum --limit 1"),
    "babilong-chat": Case("eval babilong chat --data facts --tasks qa1 --lengths 0k --num-cases 1 --max-new-tokens 6"),
    "harness-chat": Case(
        "eval harness chat --include-path tasks --tasks examples,answers --num-fewshot 1 --chat-template "
        "--system-instruction 'Be brief.' --fewshot-in-one-turn"
    ),
    "generate-chat": Case(
        "generate chat --prompt 'The old man' --chat-template --template-arg word=sea --max-new-tokens 8 --json",
        writes=False,
    ),
    # text
    "generate": Case("generate books-5m --prompt 'The old lighthouse' --max-new-tokens 12 --json", writes=False),
    "generate-drawn": Case(
        "generate books-5m --prompt 'The old man' --max-new-tokens 12 --temperature 0.8 --top-p 0.9 --seed 5 --json",
        writes=False,
    ),
    "generate-uio": Case(
        "generate uio --context story.txt --prompt 'The keeper' --max-new-tokens 12 --ratio 8 "
        "--save-memory kept.safetensors --json",
        writes=False,
        needs=("uio",),
    ),
    "generate-from-memory": Case(
        "generate uio --memory kept.safetensors --prompt 'The keeper' --max-new-tokens 12 --json",
        writes=False,
        needs=("uio", "generate-uio"),
    ),
}  # fmt: skip


def arguments_of(name: str) -> list[str]:
    """Return the words of a case's command, with its output directory and device."""
    case = CASES[name]
    device = [] if case.command.startswith(WITHOUT_DEVICE) else ["--device", "cpu"]
    return [*shlex.split(case.command), *device, *(["-o", name] if case.writes else [])]


def with_needs(*names: str) -> list[str]:
    """Return `names` behind all that they need, each once."""
    found: dict[str, None] = {}
    for name in names:
        found.update(dict.fromkeys([*with_needs(*CASES[name].needs), name]))
    return list(found)


def main() -> None:
    """Write records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="NAME", required=True, help="cases to write (default: all)")
    names = parser.parse_args().write or list(CASES)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="200", NO_COLOR="1")  # as tests/conftest.py
    sys.path[0] = str(Path(__file__).parents[1])
    from golden.records import write_records

    write_records(names)


if __name__ == "__main__":
    main()
