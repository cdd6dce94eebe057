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
    from longext.models.engines.served_rope import EndpointAnswer
    from longext.rope.analysis import DimensionRow
    from longext.rope.spec import RopeSpec


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
    """Wavelength and turns of each dimension pair; with a target, what the method does to it (in 80 columns)."""
    columns = ["pair", "wavelength", f"turns in {trained:,}"]
    columns += [f"turns in {target:,}", "method"] if target else ["full turn"]
    cells = []
    for row in rows:
        line = [str(row.index), f"{row.wavelength:,.{1 if row.wavelength < 1e6 else 0}f}", f"{row.turns:.3g}"]
        turns = "0" if row.is_stopped else f"{row.turns_at_target:.3g}"
        cells.append(line + ([turns, row.treatment] if target else ["yes" if row.completes_a_turn else "never"]))
    return Table(title, columns, cells, left=frozenset({len(columns) - 1}))


def endpoint_table(answer: EndpointAnswer) -> Table:
    """The RoPEs that were tried, nearest first."""
    rows = [
        [each.name, f"{each.distance:.4f}", "the config" if each.name == answer.expected.name else ""]
        for each in answer.candidates[:8]
    ]
    title = f"{answer.url}: what it applies to {shown_name(answer.model)}"
    caption = f"nats between log-probabilities of the server and of the model, {answer.num_places} places"
    return Table(title, ["RoPE", "distance", ""], rows, left=frozenset({0, 2}), caption=caption)


def in_sentences(rows: Sequence[DimensionRow], model: str, trained: int, spec: RopeSpec | None) -> list[str]:
    """Return what the table says, for a reader who does not know RoPE.

    Args:
        rows: of `dimension_rows`, at the target length.
        model: its name.
        trained: tokens that it was trained on.
        spec: the RoPE of a method, None if there is none.
    """
    slow = sum(not row.completes_a_turn for row in rows)
    said = [
        f"{model} was trained on {trained:,} tokens at a time. It finds out where a token stands by turning "
        f"{len(rows)} pairs of numbers, each at its own speed."
    ]
    if slow:
        said.append(
            f"{slow} of them turn so slowly that training never showed a full turn: past {trained:,} tokens they come "
            "to angles that the model has never met, and it loses its way."
        )
    else:
        said.append("All of them made a full turn in training: there is no angle that the model has not met.")
    if spec is None:
        advice = " `--method yarn --factor 8` shows what a method would do about it." if slow else ""
        return [*said[:-1], said[-1] + advice]
    reach, kept = round(trained * spec.factor), sum(row.treatment == "kept" for row in rows)
    unseen = sum(not row.completes_a_turn and row.turns_at_target > row.turns * (1 + 1e-6) for row in rows)
    left = f"{unseen} still come to new angles" if unseen else "none comes to a new angle any more"
    said.append(
        f"{spec.method} at factor {spec.factor:g}, for {reach:,} tokens, keeps {kept} and slows down "
        f"{len(rows) - kept}: of the slow ones {left}. What that is worth has to be measured: longext compare {model}."
    )
    return said


def verification_table(result: Verification) -> Table:
    """One row per check."""
    return Table(
        f"verify {result.model}" + (f" against {result.base}" if result.base else ""),
        ["check", "", "detail"],
        [[check.name, check.status, check.detail] for check in result.checks],
        left=frozenset({1, 2}),
    )
