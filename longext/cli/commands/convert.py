"""Turn an adapter's pickle files into safetensors.

These are adapter_model.bin and LongLoRA's trainable_params.bin. They are read as tensors alone: a pickle that asks
for anything else is refused, and nothing of it runs. The result is an adapter directory as `finetune` writes one:
`merge`, every evaluation and plain transformers take it.

Example: longext convert llama-2-7b-longlora-32k --base meta-llama/Llama-2-7b-hf --method linear --factor 8 -o adapter
"""

from __future__ import annotations

import dataclasses

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.conversion.config import ConvertConfig


def run(config: ConvertConfig, as_json: bool) -> None:
    """Read, check against the base, write, say what is next."""
    from longext.cli.output import show
    from longext.conversion.convert import convert_adapter
    from longext.manifest import result_record

    result = convert_adapter(config)
    wrote = (
        f"Wrote {config.output}: {result.num_lora} LoRA tensors, {result.num_whole} whole ones, "
        f"{result.record['spec']['method']} RoPE. Next: longext merge {config.output} -o {config.output}-merged"
    )
    record = result_record("convert", output=config.output, **dataclasses.asdict(result))
    show(record, [], as_json=as_json, notes=[*result.notes, wrote])


FLAGS = ("adapter", "method", "factor", "target_length", "output", "base", "revision", "force")
COMMANDS.register("convert", Command(config=ConvertConfig, run=run, only=FLAGS, needs=("output",), extras=("train",)))
