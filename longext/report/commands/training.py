"""What a training run shows and writes next to its weights: tables, picture of the loss, card, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from longext.checkpoint.source import HUB_ID
from longext.conversion.card import adapter_use
from longext.manifest import command_line, result_record, versions
from longext.report.results import Contents, Written, write_result_files
from longext.report.tables import Table, markdown_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.training.run import TrainingResult

Metrics = Sequence[Mapping[str, Any]]
_LENGTH_COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#5b3e96")
_CARD = Template("""---
${base_line}library_name: $library
tags: [long-context, $tags, longext]
---

# $title

$what

$tables
![Loss](loss.png)

## Use it

$use

## Made by

```
$command
```

longext $version; the resolved settings are in `run.json` and `recipe.yaml`, the losses in `metrics.jsonl`.
""")
_ADAPTER = (
    "An adapter (LoRA and what was trained with it, in one safetensors file) for the base model above, with the RoPE "
    "it was trained for in `config.json`."
)
_CHECKPOINT = "{} were trained. A standard checkpoint; no code of longext is needed."
_COMPRESSOR_USE = """```
longext generate DIR --context book.txt --prompt "..."
longext eval ppl --memory DIR --data TEXT
```

From Python: `longext.compressor.checkpoint.load_compressor` and `longext.compressor.reading.session.Session`."""


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """How the results of one training command look.

    Attributes:
        command: its name, the kind of its result.
        part: the key of the run's record in result.json and run.json.
        tags: of the card.
        plan_table: (record, config) -> what a run is going to do (or did), one line per choice.
        measured: metrics -> tables of what was measured while it trained.
        title: (record, config) -> title of the picture.
        card: (config, result) -> library, title, what and use of the card.
        next_step: output -> what was written, and the command to go on with.
        losses: parts of the loss by their key in the metrics, with the label of their panel in the picture.
        extra: metrics -> further keys of the result.
    """

    command: str
    part: str
    tags: str
    plan_table: Callable[[Mapping[str, Any], Any], Table]
    measured: Callable[[Metrics], list[Table]]
    title: Callable[[Mapping[str, Any], Any], str]
    card: Callable[[Any, TrainingResult], dict[str, str]]
    next_step: Callable[[Path], str]
    losses: Mapping[str, str] = field(default_factory=dict)
    extra: Callable[[Metrics], dict[str, Any]] = lambda metrics: {}

    def write(self, config: Any, result: TrainingResult) -> tuple[Written, dict[str, Any]]:
        """Write everything but the weights into the run's directory; returns (what was written, the result record)."""
        record, metrics = result.record, result.metrics
        full = result_record(
            self.command,
            data={"sha256": record["data"].get("data_sha256")},
            **{self.part: record},
            final_loss=[line["loss"] for line in metrics if "loss" in line][-1],
            **self.extra(metrics),
            perplexity=[line for line in metrics if "perplexity" in line],
        )

        def tables() -> list[Table]:
            return [self.plan_table(record, config), *self.measured(metrics)]

        contents = Contents(
            command=self.command,
            config=config,
            record=full,
            tables=tables,
            figures=lambda: {"loss": training_figure(metrics, self.title(record, config), self.losses)},
            extra={"README.md": lambda: self._card_text(config, result, tables())},
        )
        written = write_result_files(
            result.directory,
            contents,
            state="finished",
            **({"extension": result.extension} if result.extension else {}),
            **{self.part: record},
        )
        return written, full

    def _card_text(self, config: Any, result: TrainingResult, tables: list[Table]) -> str:
        is_hub_id = HUB_ID.match(config.model) and not Path(config.model).exists()
        return _CARD.substitute(
            base_line=f"base_model: {config.model}\n" if is_hub_id else "",
            tags=self.tags,
            tables="\n".join(table.to_markdown() for table in tables),
            command=command_line(),
            version=versions()["longext"],
            **self.card(config, result),
        )


# --- finetune ---------------------------------------------------------------------------------------------------------


def _finetune_plan(record: Mapping[str, Any], config: Any) -> Table:
    tuning, attention = record["tuning"], record["attention"]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in tuning["by_kind"].items())
    swept = f"; swept in chunks of {record['sweep']:,} tokens" if record["sweep"] else ""
    weighed = f" by {loss['name']}, short is {loss['short_context']:,} tokens" if (loss := record.get("loss")) else ""
    share = tuning["num_trainable"] / tuning["num_total"]
    per_step, length = record["rows_per_step"], record["row_length"]
    rows = [
        ("length", f"{record['trained_length']:,} -> {record['target_length']:,} tokens"),
        ("objective", f"next token{weighed}, {attention['objective']}{swept}"),
        ("evaluation", f"attention: {attention['evaluation']}"),
        ("trained", f"{tuning['tuning']}: {tuning['num_trainable']:,} of {tuning['num_total']:,} ({share:.1%})"),
        ("", kinds),
        ("step", f"{per_step} rows x {length:,} = {per_step * length:,} tokens; {config.num_steps:,} steps"),
        ("layers", _layers(record)),
        ("data", f"{_counts(record['data'])}; {_passes(record['data'], per_step * config.num_steps)}"),
        *_first_loss(record.get("first_loss")),
    ]
    return Table(f"Fine-tuning {config.model}", ("", "value"), rows, left=frozenset({1}))


def _first_loss(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Spell what was found before the first step; nothing if the run has not begun."""
    if not found:
        return []
    if "skipped" in found:
        return [("first loss", f"not measured: {found['skipped']}")]
    losses = "no number"
    if found["extended"] is not None and found["unextended"] is not None:
        losses = f"{found['extended']:.2f} nats, {found['unextended']:.2f} without the extension"
    where = f"on {found['num_tokens']:,} tokens; uniform guess {found['uniform']:.2f}"
    return [
        ("first loss", f"{losses} ({where})"),
        ("RoPE", f"{found['num_frequencies']:,} frequencies as the formula's, to {found['largest_error']:.0e}"),
    ]


def _layers(record: Mapping[str, Any]) -> str:
    """Spell which kernels the layers use, what is kept of them, and in which pieces they are computed."""
    memory = record["memory"]
    every, nested = memory["checkpoint_every"], memory["nested"]
    kept = "one input kept a layer" if nested == 1 else f"one input kept for {nested} layers"
    checkpoints = kept if every == 1 else f"one layer of {every} checkpointed"
    parts = [
        f"kernels: {record['kernels']}",
        (checkpoints if memory["checkpointing"] else "no checkpointing")
        + (", in CPU memory" if memory["offload"] else ""),
        *([f"MLPs and norms {memory['tile']:,} tokens at a time"] if memory["tile"] else []),
        f"loss {memory['loss_chunk']:,} tokens at a time",
    ]
    return "; ".join(parts)


def _perplexity_table(metrics: Metrics) -> list[Table]:
    measured = [line for line in metrics if "perplexity" in line]
    if not measured:
        return []
    lengths = list(measured[0]["perplexity"])
    rows = [(f"{line['step']:,}", *(f"{line['perplexity'][n]:.2f}" for n in lengths)) for line in measured]
    return [Table("Perplexity by length, full attention", ("step", *(f"{int(n):,}" for n in lengths)), rows)]


def _finetune_title(record: Mapping[str, Any], config: Any) -> str:
    tuning, objective = record["tuning"]["tuning"], record["attention"]["objective"]
    return f"{Path(config.model).name}: {tuning} tuning, trained under {objective}"


def _finetune_card(config: Any, result: TrainingResult) -> dict[str, str]:
    is_adapter, attention = _is_adapter(result.directory), result.record["attention"]
    use = adapter_use(result.extension or {}) if is_adapter else "```\nlongext verify DIR\n```"
    trained, total = (result.record["tuning"][key] for key in ("num_trainable", "num_total"))
    what = "All weights" if trained == total else f"{trained:,} of {total:,} parameters"
    return {
        "library": "peft" if is_adapter else "transformers",
        "title": f"{markdown_text(Path(config.model).name)} trained at {result.record['target_length']:,} tokens",
        "what": _ADAPTER if is_adapter else _CHECKPOINT.format(what),
        "use": f"{use}\n\nTrained under {attention['objective']} ({attention['definition']}). The model is used with "
        "full attention, as every evaluation here was made.",
    }


def _finetune_next(output: Path) -> str:
    merge = f"longext merge {output} -o {output}-merged"
    step = merge if _is_adapter(output) else f"longext verify {output}"
    return f"Wrote {output} (loss.png, metrics.jsonl, run.json). Next: {step}"


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


FINETUNE = TrainingReport(
    command="finetune",
    part="finetune",
    tags="rope, longlora",
    plan_table=_finetune_plan,
    measured=_perplexity_table,
    title=_finetune_title,
    card=_finetune_card,
    next_step=_finetune_next,
)


# --- compress-train ---------------------------------------------------------------------------------------------------


def _compress_plan(record: Mapping[str, Any], config: Any) -> Table:
    spec, length = record["spec"], record["document_length"]
    ratios = ", ".join(f"{ratio}x ({spec['segment'] // ratio} slots)" for ratio in spec["ratios"])
    weights = ", ".join(f"{name} {weight:g}" for name, weight in record["objectives"].items())
    share = record["num_trainable"] / record["num_total"]
    tokens = record["documents_per_step"] * length
    raw = f"sink {spec['sink']}, overlap {spec['overlap']}"
    rows = [
        ("architecture", f"{spec['arch']} ({spec['memory']} memory): {record['summary']}"),
        ("segment", f"{spec['segment']:,} tokens at {ratios}; {raw}"),
        ("document", f"{length:,} tokens, {-(-length // spec['segment'])} segments; window {record['window']:,}"),
        ("trained", f"{record['num_trainable']:,} beside {record['num_total']:,} frozen ({share:.1%})"),
        ("learns", f"{weights}; gradient {record['gradient']}"),
        ("step", f"{record['documents_per_step']} documents = {tokens:,} tokens; {config.num_steps:,} steps"),
        (
            "data",
            f"{record['data']['num_tokens']:,} tokens, {record['data']['num_documents']:,} documents; "
            f"{_passes(record['data'], record['documents_per_step'] * config.num_steps)}",
        ),
    ]
    return Table(f"Compressing for {Path(record['base_model']).name}", ("", "value"), rows, left=frozenset({1}))


def _compress_tables(metrics: Metrics) -> list[Table]:
    """Return the gradient checks, and perplexity with memory and its controls by length at each measured step."""
    tables = []
    if checks := [line for line in metrics if "cosine" in line]:
        names = ("cosine", "relative_error", "norm_ratio")
        rows = [(f"{line['step']:,}", *(f"{line[name]:.4f}" for name in names)) for line in checks]
        checked = ("step", "cosine", "relative error", "norm ratio")
        tables.append(Table("Gradient against the exact one", checked, rows))
    if measured := [line for line in metrics if "controls" in line]:
        lengths = list(measured[0]["perplexity"])
        rows = [
            (f"{line['step']:,}", name, *(f"{values[n]:.2f}" for n in lengths))
            for line in measured
            for name, values in {"memory": line["perplexity"], **line["controls"]}.items()
        ]
        headers = ("step", "reads", *(f"{int(n):,}" for n in lengths))
        title = "Perplexity of the next segment by tokens of context"
        tables.append(Table(title, headers, rows, left=frozenset({1})))
    return tables


def _compress_title(record: Mapping[str, Any], config: Any) -> str:
    spec, name = record["spec"], Path(config.model).name
    ratios = "/".join(str(ratio) for ratio in spec["ratios"])
    return f"{name}: {spec['arch']}, {ratios}x, {config.objectives}, gradient {config.gradient}"


def _compress_card(config: Any, result: TrainingResult) -> dict[str, str]:
    return {
        "library": "longext",
        "title": f"A context compressor for {markdown_text(Path(config.model).name)}",
        "what": f"{result.record['summary']} ({result.record['reference']}).",
        "use": _COMPRESSOR_USE,
    }


def _compress_next(output: Path) -> str:
    return (
        f"Wrote {output} (compressor.safetensors, loss.png, metrics.jsonl, run.json). Next: longext eval ppl "
        f"--memory {output} --data TEXT, or longext generate {output} --context FILE"
    )


COMPRESS = TrainingReport(
    command="compress-train",
    part="compress",
    tags="context-compression",
    plan_table=_compress_plan,
    measured=_compress_tables,
    title=_compress_title,
    card=_compress_card,
    next_step=_compress_next,
    losses={"documents": "documents (nats)", "ae": "auto-encoding (nats, weighted)"},
    extra=lambda metrics: {"gradient_checks": [line for line in metrics if "cosine" in line]},
)


def _counts(data: Mapping[str, Any]) -> str:
    """Spell the counts of a data report: what is there, and what was left out if something was."""
    counts = {key: value for key, value in data.items() if key.startswith("num_") and isinstance(value, int) and value}
    if counts.get("num_trained") == counts.get("num_tokens"):
        counts.pop("num_trained", None)
    return ", ".join(f"{value:,} {key.removeprefix('num_').replace('_', ' ')}" for key, value in counts.items())


def _passes(data: Mapping[str, Any], num_rows: int) -> str:
    """Spell how often a run of `num_rows` rows reads what there is."""
    return f"{data['rows_per_epoch']:,} rows, read {num_rows / data['rows_per_epoch']:,.3g} times"


def training_figure(metrics: Metrics, title: str, losses: Mapping[str, str]) -> Figure:
    """Draw the loss by step (a panel for each part if there are several), and perplexity by step and length under it.

    Args:
        losses: keys of the parts in the metrics, with the labels of their panels.
    """
    from matplotlib.ticker import MaxNLocator

    from longext.report.plots import INK, log_ticks, new_figure, style

    lines = [line for line in metrics if "loss" in line]
    measured = [line for line in metrics if "perplexity" in line and "controls" not in line]
    parts = {name: label for name, label in losses.items() if any(name in line for line in lines)}
    shown = parts if len(parts) > 1 else {"loss": "training loss (nats)"}
    count = len(shown) + (len(measured) > 1)
    figure = new_figure(7.4, 2.8 * count if count > 1 else 3.4)
    panels = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    for name, panel in zip(shown, panels, strict=False):
        steps, values = [line["step"] for line in lines], [line[name] for line in lines]
        panel.plot(steps, values, color="#9ecae1", linewidth=1)
        panel.plot(steps, smooth(values), color="#0072b2", linewidth=2)
        style(panel, "", "", shown[name])
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(measured) > 1:
        for number, length in enumerate(measured[0]["perplexity"]):
            x, y = [line["step"] for line in measured], [line["perplexity"][length] for line in measured]
            colour = _LENGTH_COLOURS[number % len(_LENGTH_COLOURS)]
            panels[-1].plot(x, y, marker="o", markersize=3.5, color=colour, label=f"{int(length):,} tokens")
        style(panels[-1], "", "", "perplexity (full attention)")
        log_ticks(panels[-1])
        panels[-1].legend(frameon=False, fontsize=8.5, labelcolor=INK)
    panels[0].set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    panels[-1].set_xlabel("step", fontsize=9.5, color=INK)
    return figure


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    smoothed, average, norm = [], 0.0, 0.0
    for value in values:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(average / norm)
    return smoothed
