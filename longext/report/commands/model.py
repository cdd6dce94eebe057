"""Tables of `extend`, `inspect` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longext.report.tables import Table
from longext.settings import shown_name

if TYPE_CHECKING:
    from longext.conversion.extend import ExtensionPlan
    from longext.conversion.gguf.extend import GgufPlan
    from longext.conversion.verify import Verification
    from longext.models.engines.endpoint import EndpointAnswer
    from longext.rope.analysis import DimensionRow


def megabytes(size: int) -> str:
    """Return a size in MB or GB (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def extension_table(plan: ExtensionPlan) -> Table:
    """Old -> new of an extension, one property a row."""
    old, new, spec = plan.rope.parameters, plan.parameters, plan.spec
    rows = [
        ["context length", f"{plan.old_length:,}", f"{plan.new_length:,}"],
        ["max_position_embeddings", f"{plan.old_length:,}", f"{plan.config_length:,}"],
        ["trained length L", "", f"{spec.original_max_position_embeddings:,}"],
        ["factor s (target / L)", "", f"{spec.factor:g}"],
        *([key, _cell(old.get(key)), _cell(new.get(key))] for key in dict.fromkeys([*old, *new]) if key != "factor"),
        ["layers", "", plan.layers],
        ["weights", f"{len(plan.shards)} file(s), {megabytes(plan.weight_bytes)}", "unchanged"],
    ]
    there = "the trained RoPE" if plan.relation == "extends" else plan.rope.spec.method
    return Table(
        f"{plan.config.model}: {spec.method} {plan.relation} {there}",
        ["", "old", "new"],
        [row for row in rows if row[1] or row[2]],
        left=frozenset({1, 2}),
    )


def gguf_table(plan: GgufPlan) -> Table:
    """Old -> new of the extension of a GGUF file: the keys that change, one a row."""
    architecture, spec = plan.file.architecture, plan.spec
    rows = [["architecture", architecture, ""], ["factor s (target / L)", "", f"{spec.factor:g}"]]
    for name, value in plan.change.keys.items():
        old = _cell(plan.file.values.get(name))
        rows.append([name.removeprefix(f"{architecture}."), old, "left out" if value is None else _cell(value[1])])
    rows += [[f"tensor {name}", "", _cell(values.tolist())] for name, values in plan.change.tensors.items()]
    rows.append(["weights", f"{len(plan.file.tensors)} tensors, {megabytes(plan.data_bytes)}", "unchanged"])
    title = f"{shown_name(plan.config.model)}: {spec.method}"
    return Table(title, ["", "old", "new"], rows, left=frozenset({1, 2}))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{len(value)} numbers, {min(value):.4g} to {max(value):.4g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def dimension_table(rows: Sequence[DimensionRow], trained: int, target: int | None, title: str) -> Table:
    """Wavelength and turns of each dimension pair; with a target, what the method does to it."""
    columns = ["pair", "wavelength", f"turns in {trained:,}", "full turn"]
    if target:
        columns += ["method", f"turns in {target:,}"]
    cells = []
    for row in rows:
        line = [
            str(row.index),
            f"{row.wavelength:,.1f}",
            f"{row.turns:.3g}",
            "yes" if row.completes_a_turn else "never",
        ]
        turns = "0" if row.is_stopped else f"{row.turns_at_target:.3g}"
        cells.append([*line, row.treatment, turns] if target else line)
    return Table(title, columns, cells, left=frozenset({3, 4}))


def endpoint_table(answer: EndpointAnswer) -> Table:
    """The RoPEs that were tried, nearest first."""
    rows = [
        [each.name, f"{each.distance:.4f}", "the config" if each.name == answer.expected.name else ""]
        for each in answer.candidates[:8]
    ]
    title = f"{answer.url}: what it applies to {shown_name(answer.model)}"
    caption = f"nats between log-probabilities of the server and of the model, {answer.num_places} places"
    return Table(title, ["RoPE", "distance", ""], rows, left=frozenset({0, 2}), caption=caption)


def verification_table(result: Verification) -> Table:
    """One row per check."""
    return Table(
        f"verify {result.model}" + (f" against {result.base}" if result.base else ""),
        ["check", "", "detail"],
        [[check.name, check.status, check.detail] for check in result.checks],
        left=frozenset({1, 2}),
    )
