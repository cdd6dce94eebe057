"""What a finished fine-tuning run writes beside its weights: manifest, card, table, record and picture."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from longext.checkpoint.source import HUB_ID
from longext.conversion.card import adapter_use
from longext.manifest import command_line, versions
from longext.report.results import Written, write_result_files
from longext.report.tables import Table, markdown_text
from longext.report.training_views import perplexity_table, run_table, training_curve
from longext.training.config import FinetuneConfig

if TYPE_CHECKING:
    from longext.training.longlora import FinetuneResult

_CARD = Template("""---
${base_line}library_name: $library
tags: [long-context, rope, longlora, longext]
---

# $base trained at $target tokens

$what

$tables
![Loss](loss.png)

## Use it

$use

Training attention: $attention. The model is used with full attention, as every evaluation here was made.

## Made by

```
$command
```

longext $version; the resolved settings are in `run.json` and `recipe.yaml`, the losses in `metrics.jsonl`.
""")


def write_training_output(config: FinetuneConfig, result: FinetuneResult) -> tuple[Written, dict[str, Any]]:
    """Write everything but the weights into the run's directory; returns (what was written, the result record)."""
    directory, record = result.directory, result.record
    losses = [line for line in result.metrics if "loss" in line]
    full = {
        "schema": "longext.result/1",
        "kind": "finetune",
        "finetune": record,
        "final_loss": losses[-1]["loss"],
        "perplexity": [line for line in result.metrics if "perplexity" in line],
        "versions": versions(),
    }
    tuning, attention = record["tuning"]["tuning"], record["attention"]["training"]
    title = f"{Path(config.model).name}: {tuning} tuning, {attention} attention in training"

    def tables() -> list[Table]:
        measured = perplexity_table(result.metrics)
        return [run_table(record, config.num_steps, config.model), *([measured] if measured else [])]

    written = write_result_files(
        directory,
        "finetune",
        config,
        full,
        tables,
        lambda: {"loss": training_curve(result.metrics, title=title)},
        {"README.md": lambda: _card(config, directory, record, tables(), adapter_use(result.extension))},
        state="finished",
        extension=result.extension,
        finetune=record,
    )
    return written, full


def _card(config: FinetuneConfig, directory: Path, record: dict[str, Any], tables: list[Table], use: str) -> str:
    is_adapter = (directory / "adapter_config.json").is_file()
    is_hub_id = HUB_ID.match(config.model) and not Path(config.model).exists()
    adapter = (
        "An adapter (LoRA and what was trained with it, in one safetensors file) for the base model above, with the "
        "RoPE it was trained for in `config.json`."
    )
    return _CARD.substitute(
        base_line=f"base_model: {config.model}\n" if is_hub_id else "",
        library="peft" if is_adapter else "transformers",
        base=markdown_text(Path(config.model).name),
        target=f"{record['target_length']:,}",
        what=adapter
        if is_adapter
        else "All weights were trained. A standard checkpoint; no code of longext is needed.",
        tables="\n".join(table.to_markdown() for table in tables),
        use=use if is_adapter else "```\nlongext verify DIR\n```",
        attention=f"{record['attention']['training']} ({record['attention']['definition']})",
        command=command_line(),
        version=versions()["longext"],
    )
