"""What `longext plan` shows: tables of cost, and memory by part against length as stacked bars."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longext.report.console import duration
from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.planning.fit import TrainingPlan
    from longext.planning.probe import Probe
    from longext.planning.setup import TrainingSetup

_GIB = 2**30
PART_COLOURS = {
    "weights": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer": "#009e73",
    "gathered weights": "#5b3e96",
    "saved activations": "#e69f00",
    "keys and values": "#8c564b",
    "logits and loss": "#d55e00",
    "one layer's work": "#cc79a7",
    "CUDA context": "#b5b5b5",
}


def gib(size: float) -> str:
    """Return bytes as GiB with one decimal, MiB below 0.1 GiB."""
    return f"{size / _GIB:.1f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:.1f} MiB"


def tera(flops: float) -> str:
    """Return FLOPs in TFLOPs with four digits or so."""
    value = flops / 1e12
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def plan_tables(plan: TrainingPlan) -> list[Table]:
    """Return the plan's tables: summary, each way and its flags, memory by part, FLOPs by part."""
    return [_summary(plan), _ways(plan), _flags(plan), _memory(plan), _flops(plan)]


def _summary(plan: TrainingPlan) -> Table:
    from longext.planning.memory import kv_cache_bytes

    setup, shape, storage = plan.setup, plan.shape, plan.cost.storage
    trained = setup.trainable(shape)
    pinned = f" ({gib(storage.pinned)} pinned)" if storage.pinned else ""
    rows = [
        ["verdict", plan.verdict()],
        ["parameters", f"{shape.num_parameters:,} ({_source(plan)})"],
        ["trained", f"{trained:,} ({trained / shape.num_parameters:.2%}), {setup.method}"],
        ["run", f"{setup.batch_size} x {setup.length:,} tokens, {_attention(setup)}"],
        ["GPUs", f"{setup.num_gpus} x {plan.device.name}, sharding {setup.sharding}{_shared(plan)}"],
        ["memory per GPU", f"{gib(plan.memory.needed)} of {gib(plan.device.memory)}"],
        ["host memory", f"{gib(storage.host)}{pinned} of {gib(plan.machine.host)}"],
        ["disk", f"{gib(storage.disk)} ({gib(storage.model)} the model, {gib(storage.checkpoints)} checkpoints)"],
        ["longest that fits", _longest(plan)],
        ["time per batch", f"{duration(plan.seconds)} ({_time(plan)})"],
        ["throughput", f"{plan.tokens_per_second:,.0f} tokens/s on all GPUs"],
        ["KV cache later", f"{gib(kv_cache_bytes(shape, setup.length))} per sequence at inference (16 bits)"],
    ]
    if plan.config.num_tokens:
        hours = plan.hours(plan.config.num_tokens)
        cost = f"{duration(3600 * hours)}, {hours * setup.num_gpus:,.1f} GPU-hours{_usd(plan, ', ')}"
        rows.insert(-1, [f"{plan.config.num_tokens:,} tokens", cost])
    elif plan.config.price_per_hour is not None:
        rows.insert(-1, ["a batch costs", _usd(plan)])
    return Table(f"Plan: {plan.config.model} at {setup.length:,} tokens", ["", ""], rows, left=frozenset({1}))


def _attention(setup: TrainingSetup) -> str:
    attention = "full attention" if setup.group is None else f"S2-Attn, groups of {setup.group:,}"
    return attention + (f", swept by {setup.chunk:,}" if setup.chunk else "")


def _time(plan: TrainingPlan) -> str:
    """Return what the seconds of a batch are made of."""
    if plan.config.utilisation is not None:
        return f"{plan.config.utilisation:.0%} of {plan.device.tflops:g} TFLOP/s"
    seconds = plan.cost.seconds
    parts = {name: getattr(seconds, name) for name in ("matrices", "attention", "elementwise")}
    text = ", ".join(f"{name} {part / seconds.compute:.0%}" for name, part in parts.items())
    if seconds.transfers:
        text += f"; {duration(seconds.transfers)} on the bus meanwhile"
    if seconds.waiting > 0.01 * seconds.total:
        text += f"; {duration(seconds.waiting)} waiting for host memory"
    return text


def _usd(plan: TrainingPlan, before: str = "") -> str:
    price = plan.price()
    return "" if price is None else f"{before}{price:,.2f} USD"


def _source(plan: TrainingPlan) -> str:
    if plan.source is None:
        return "built-in size"
    if plan.shape.counted is None:
        return "from config.json"
    return "as in the weight files" if plan.shape.counted == plan.shape.num_parameters else "the weight files differ"


def _longest(plan: TrainingPlan) -> str:
    if not plan.longest:
        return "none with these flags"
    widest = " and fsdp" if plan.config.sharding == "auto" and plan.setup.num_gpus > 1 else ""
    return f"{plan.longest:,} tokens with these flags{widest}"


def _shared(plan: TrainingPlan) -> str:
    ranks = plan.setup.sequence_parallel
    return f", {ranks} share each sequence" if ranks > 1 else ""


def _memory(plan: TrainingPlan) -> Table:
    parts = plan.memory.parts
    rows = [[name, gib(size), f"{size / plan.memory.needed:.0%}"] for name, size in parts.items() if size]
    rows.append(["sum", gib(plan.memory.needed), "100%"])
    names = {"forward": "the end of the forward pass", "loss": "the loss", "layer": "a layer's backward pass"}
    return Table(
        "Memory of one GPU at the peak", ["part", "size", "share"], rows, caption=f"peak in {names[plan.memory.phase]}"
    )


def _flops(plan: TrainingPlan) -> Table:
    columns = {"forward, full": plan.dense}
    if plan.setup.group is not None:
        columns["forward, S2"] = plan.sparse
    columns["step, computed"] = plan.flops.total
    values = [dataclasses.asdict(flops) for flops in columns.values()]
    rows = [[name, *(tera(own[name]) for own in values)] for name in values[0] if any(own[name] for own in values)]
    rows.append(["total", *(tera(flops.total) for flops in columns.values())])
    rows.append(["attention share", *(f"{flops.attention_share:.0%}" for flops in columns.values())])
    return Table(
        "FLOPs (1e12)",
        ["part", *columns],
        rows,
        caption="forward: one sequence, all pairs of a group; step: one batch, causal pairs, backward, recomputation",
    )


def _ways(plan: TrainingPlan) -> Table:
    rows, best = [], set()
    for number, way in enumerate(plan.ways):
        cost, price = way.cost, plan.price(way.cost)
        marks = ["!" if name in cost.exceeded else "" for name in ("GPU", "host")]
        row = [
            way.name,
            f"{cost.memory.needed / _GIB:,.1f}{marks[0]}",
            f"{cost.storage.host / _GIB:,.0f}{marks[1]}",
            duration(cost.seconds.total),
            f"{cost.tokens_per_second:,.0f}",
            _short(way.longest) if way.longest else "none",
            way.limit.partition("+")[0],
        ]
        rows.append(row if price is None else [*row, f"{price:,.2f}" if price < 100 else f"{price:,.0f}"])
        if way is plan.way_out:
            best.add((number, 0))
    columns = ["", "GPU", "host", "batch", "tok/s", "longest", "limit"]
    marked = "first that fits marked" if best else "none fits"
    caption = f"GiB, ! is too much; limit of longer rows; {marked}"  # with a price still 80 columns
    if plan.config.price_per_hour is not None:
        columns.append("USD")
        tokens = plan.config.num_tokens
        caption += f"; USD of {f'{_short(tokens)} tokens' if tokens else 'a batch'}"
    title = f"Each way to train on {plan.setup.length:,} tokens, {plan.setup.num_gpus} x {plan.device.name}"
    return Table(title, columns, rows, frozenset(best), caption=caption)


def _short(tokens: int) -> str:
    """Return a number of tokens in three digits or so: 960, 224k, 4.06M, 2B; rounded down."""
    if tokens < 1000:
        return str(tokens)
    if tokens >= 10**9:
        return f"{tokens // 10**7 / 100:.3g}B"
    return f"{tokens // 1000}k" if tokens < 10**6 else f"{tokens // 10**4 / 100:.3g}M"


def _flags(plan: TrainingPlan) -> Table:
    rows = [[way.name, way.flags or "(none)"] for way in plan.ways]
    return Table("Flags of longext finetune", ["", ""], rows, left=frozenset({1}))


def probe_table(probe: Probe) -> Table:
    """Measured, extrapolated and calibrated figures of a probe, each labelled as what it is."""
    depths = [
        [f"measured, {run.num_layers} layers, {probe.length:,} tokens", duration(run.seconds), gib(run.peak)]
        for run in probe.runs
    ]
    whole = [
        f"extrapolated, {probe.num_layers} layers, {probe.length:,} tokens",
        duration(probe.seconds),
        gib(probe.peak),
    ]
    asked = f"calibrated, {probe.asked_length:,} tokens as planned, this machine"
    rows = [
        *depths,
        *([] if probe.is_whole else [whole]),
        [asked, duration(probe.asked_seconds), gib(probe.asked_peak)],
    ]
    caption = (
        f"{probe.device}, {probe.dtype}, full attention: {probe.flops_per_second / 1e12:.3g} TFLOP/s; peak memory "
        f"{probe.memory_ratio:.2f} of the closed form; {probe.bytes_per_layer_token:,.0f} bytes per layer and token"
    )
    return Table("Probe", ["", "time per batch", "peak"], rows, caption=caption)


def memory_by_length(plan: TrainingPlan) -> Figure:
    """Stacked bars: memory of one GPU by part, one bar per length; the device's memory a line, the host's dots."""
    from longext.report import plots

    figure = plots.new_figure(7.8, 4.4)
    axes = figure.subplots()
    parts = {cost.setup: cost.memory.parts for cost in plan.by_length}
    positions = list(range(len(parts)))
    base = [0.0] * len(parts)
    for name, colour in PART_COLOURS.items():
        heights = [own[name] / _GIB for own in parts.values()]
        if any(heights):
            axes.bar(positions, heights, bottom=base, color=colour, width=0.72, label=name)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    pinned = [cost.storage.pinned / _GIB for cost in plan.by_length]
    if any(pinned):
        axes.plot(positions, pinned, color="#222222", marker="D", markersize=5, linewidth=1, label="pinned host memory")
    _mark_capacity(axes, plan.device.name, plan.device.memory / _GIB, max(base + pinned))
    _label_bars(axes, positions, base)
    title = f"{plan.config.model}, {plan.setup.method}: memory of one GPU at the peak"
    plots.style(axes, title, "length (tokens)", "GiB")
    axes.grid(False, axis="x")
    axes.set_xticks(positions, [_tick(plan, setup) for setup in parts])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _mark_capacity(axes: Any, name: str, limit: float, highest: float) -> None:
    """Draw the device's memory as a line; if all bars are far below it, say it in words and keep them readable."""
    is_far = highest < 0.25 * limit
    axes.set_ylim(0, 1.25 * highest if is_far else 1.12 * max(limit, highest))
    if not is_far:
        axes.axhline(limit, color="#222222", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{name}: {limit:.0f} GiB" + (", far above" if is_far else ""),
        (0.01, 0.95 if is_far else limit),
        xycoords="axes fraction" if is_far else ("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#222222",
    )


def _tick(plan: TrainingPlan, setup: TrainingSetup) -> str:
    lines = [f"{setup.length:,}", *([setup.sharding] if setup.num_gpus > 1 else [])]
    return "\n".join([*lines, *(["(asked)"] if setup.length == plan.setup.length else [])])


def _label_bars(axes: Any, positions: list[int], tops: list[float]) -> None:
    for position, top in zip(positions, tops, strict=True):
        axes.annotate(f"{top:.3g}", (position, top), xytext=(0, 2), textcoords="offset points",
                      ha="center", va="bottom", fontsize=8, color="#222222")  # fmt: skip


def record_with_probe(record: Mapping[str, Any], probe: Probe | None) -> dict[str, Any]:
    """Return the plan's record with the probe's figures under "probe" (None without one)."""
    return {**record, "probe": None if probe is None else dataclasses.asdict(probe)}
