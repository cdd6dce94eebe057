"""Tables, picture and card of a compressor's training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from longext.checkpoint.source import HUB_ID
from longext.compressor.config import CompressConfig
from longext.manifest import command_line, result_record, versions
from longext.report.plots import new_figure, style
from longext.report.results import Written, write_result_files
from longext.report.tables import Table, markdown_text
from longext.report.training_views import smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.compressor.train import CompressResult

_CARD = Template("""---
${base_line}library_name: longext
tags: [long-context, context-compression, longext]
---

# A context compressor for $base

$summary ($reference).

$tables
![Loss](loss.png)

## Use it

```
longext generate DIR --context book.txt --prompt "..."
longext eval ppl --memory DIR --data TEXT
```

From Python: `longext.compressor.checkpoint.load_compressor` and `longext.compressor.reading.session.Session`.

## Made by

```
$command
```

longext $version; the resolved settings are in `run.json` and `recipe.yaml`, the losses in `metrics.jsonl`.
""")


def plan_table(record: Mapping[str, Any], steps: int) -> Table:
    """What a run is going to do (or did): one line per choice."""
    spec, length = record["spec"], record["document_length"]
    ratios = ", ".join(f"{ratio}x ({spec['segment'] // ratio} slots)" for ratio in spec["ratios"])
    weights = ", ".join(f"{name} {weight:g}" for name, weight in record["objectives"].items())
    share = record["num_trainable"] / record["num_total"]
    tokens = record["documents_per_step"] * length
    beside = f"sink {spec['sink']}, overlap {spec['overlap']}"
    rows = [
        ("architecture", f"{spec['arch']} ({spec['memory']} memory): {record['summary']}"),
        ("segment", f"{spec['segment']:,} tokens at {ratios}; {beside}"),
        ("document", f"{length:,} tokens, {-(-length // spec['segment'])} segments; window {record['window']:,}"),
        ("trained", f"{record['num_trainable']:,} beside {record['num_total']:,} frozen ({share:.1%})"),
        ("learns", f"{weights}; gradient {record['gradient']}"),
        ("step", f"{record['documents_per_step']} documents = {tokens:,} tokens; {steps:,} steps"),
        ("data", f"{record['data']['num_tokens']:,} tokens, {record['data']['num_documents']:,} documents"),
    ]
    return Table(f"Compressing for {Path(record['base_model']).name}", ("", "value"), rows, left=frozenset({1}))


def gradient_table(metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """The gradient checks of a run, or None where there were none."""
    checks = [line for line in metrics if "cosine" in line]
    if not checks:
        return None
    names = ("cosine", "relative_error", "norm_ratio")
    rows = [(f"{line['step']:,}", *(f"{line[name]:.4f}" for name in names)) for line in checks]
    return Table("Gradient against the exact one", ("step", "cosine", "relative error", "norm ratio"), rows)


def memory_table(metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Perplexity with memory by context length at each measured step, with the controls, or None."""
    measured = [line for line in metrics if "controls" in line]
    if not measured:
        return None
    lengths = list(measured[0]["perplexity"])
    rows = []
    for line in measured:
        for name, values in {"memory": line["perplexity"], **line["controls"]}.items():
            rows.append((f"{line['step']:,}", name, *(f"{values[n]:.2f}" for n in lengths)))
    headers = ("step", "reads", *(f"{int(n):,}" for n in lengths))
    return Table("Perplexity of the next segment by tokens of context", headers, rows, left=frozenset({1}))


def loss_figure(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Training loss by step; a panel for each part where there are several, weighted as they are summed."""
    lines = [line for line in metrics if "loss" in line]
    names = {"documents": "documents (nats)", "ae": "auto-encoding (nats, weighted)"}
    parts = [name for name in names if any(name in line for line in lines)]
    shown = parts if len(parts) > 1 else ["loss"]
    figure = new_figure(7.4, 2.9 * len(shown) if len(shown) > 1 else 3.4)
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    steps = [line["step"] for line in lines]
    for name, panel in zip(shown, panels, strict=True):
        values = [line[name] for line in lines]
        panel.plot(steps, values, color="#9ecae1", linewidth=1)
        panel.plot(steps, smooth(values), color="#0072b2", linewidth=2)
        is_last = name == shown[-1]
        style(panel, title if name == shown[0] else "", "step" if is_last else "", names.get(name, "loss (nats)"))
    return figure


def write_compressor_output(config: CompressConfig, result: CompressResult) -> tuple[Written, dict[str, Any]]:
    """Write everything but the weights into the run's directory; returns (what was written, the result record)."""
    record = result.record
    losses = [line for line in result.metrics if "loss" in line]
    full = result_record(
        "compress-train",
        data={"sha256": record["data"].get("data_sha256")},
        compress=record,
        final_loss=losses[-1]["loss"],
        gradient_checks=[line for line in result.metrics if "cosine" in line],
        perplexity=[line for line in result.metrics if "perplexity" in line],
    )
    spec = record["spec"]
    ratios = "/".join(str(ratio) for ratio in spec["ratios"])
    title = f"{Path(config.model).name}: {spec['arch']}, {ratios}x, {config.objectives}, gradient {config.gradient}"

    def tables() -> list[Table]:
        found = (gradient_table(result.metrics), memory_table(result.metrics))
        return [plan_table(record, config.num_steps), *(table for table in found if table)]

    written = write_result_files(
        result.directory,
        "compress-train",
        config,
        full,
        tables,
        lambda: {"loss": loss_figure(result.metrics, title)},
        {"README.md": lambda: _card(config, record, tables())},
        state="finished",
        compress=record,
    )
    return written, full


def _card(config: CompressConfig, record: dict[str, Any], tables: list[Table]) -> str:
    is_hub_id = HUB_ID.match(config.model) and not Path(config.model).exists()
    return _CARD.substitute(
        base_line=f"base_model: {config.model}\n" if is_hub_id else "",
        base=markdown_text(Path(config.model).name),
        summary=record["summary"],
        reference=record["reference"],
        tables="\n".join(table.to_markdown() for table in tables),
        command=command_line(),
        version=versions()["longext"],
    )
