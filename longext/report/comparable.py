"""Which results may stand in one table: what must agree of protocol, data and model, and what is only reported.

If a field that must agree differs, results go into tables of their own. A field that may differ (what follows from
the model, and what only blurs a comparison) is named under the table, and so is one that a result does not record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longext.evals.views import Score, Section
from longext.report.find import Part
from longext.report.scores import leaves

# Prose, places, what other fields say better, and what moves intervals or verdicts alone.
_NOT_COMPARED = re.compile(
    r"protocol\.(reference|scoring_definition|prompts_from|notes|tolerance|num_bootstrap|tasks\..*\.summary)$"
    r"|data\.(source|data|split|documents|num_too_short|num_segments_available)$"
)
# A task of lm-eval is its version, its documents and its questions; the rest of its config says where the files are.
_QUESTION = re.compile(
    r".*\.(version|sha256|config\.(output_type|num_fewshot|description|doc_to_\w+|generation_kwargs\..*))$"
)
# What follows from the model (the length that prompts are cut to), or gives other samples of the same thing.
_MAY_DIFFER = re.compile(
    r"protocol\.(max_length|truncation|chat_template|seed|lm_eval|window|bytes_per_position|template_\w+|prompts_sha256"
    r"|strip_thinking)$|protocol\.template_arguments\..*|model\..*|versions\.(?!python$).*"
)
_TOKENIZER, _TEMPLATE = "model.tokenizer_sha256", "protocol.template_sha256"
_REPORTED = frozenset({_TOKENIZER, "model.dtype", "model.device", "model.prefix", "model.ending_tokens"})
# What follows from the tokenizer, and is reported only of models that share it.
_OF_A_TOKENIZER = frozenset({_TEMPLATE, "protocol.prompts_sha256", "model.prefix", "model.ending_tokens"})
# One entry for each task: a result without it has other tasks, which the table shows.
_BY_TASK = re.compile(r"(protocol\.(tasks|prompts|content)|data\.(sha256|tasks))\..*")
_COUNTS = ("num_trials", "num_rows", "num_documents", "num_windows", "num_places", "num_segments")
_RECORDED = ("protocol.", "data.")  # what each result should say
_OF_A_RUN = ("protocol.id", "data.data_sha256")
Fields = Mapping[str, Any]
# What older results do not record: the only value that it had then.
_FORMER: dict[str, Fields] = {
    "passkey": {"protocol.num_needles": 1, "protocol.filler": "landmark", "protocol.num_digits": 5},
    "needle": {"protocol.answer_prefix": True},
}
_ADDRESS = " at 0x"  # of a function in a config that was written as text: another one in each run


Place = tuple[Score, str]  # with the label of its result


@dataclass(frozen=True)
class Conflict:
    """A field that keeps results out of a table: its value in them, and in that table."""

    field: str
    here: Any
    there: Any


@dataclass(frozen=True)
class Caution:
    """A field that differs within a table: (value, labels) pairs. Without a value: those that do not record it."""

    field: str
    values: list[tuple[Any, list[str]]]
    is_missing: bool = False


def fields_of(part: Part) -> dict[str, Any]:
    """Return every field of a part's record that is compared: those that must agree and those that are reported."""
    record = part.record
    parts = {key: record.get(key) or {} for key in ("protocol", "data", "versions", "model")}
    if (record["model"] or {}).get("answers_from") and "references_sha256" in parts["data"]:
        # the hash is of rows without prompts, which published answers do not have
        parts["data"] = {key: value for key, value in parts["data"].items() if key != "sha256"}
    wanted = part.section.must_agree | _REPORTED
    parts["model"] = {key: value for key, value in parts["model"].items() if f"model.{key}" in wanted}
    base = {"config_sha256": record["base"].get("config_sha256")} if isinstance(record.get("base"), Mapping) else {}
    parts |= {"base": base, "measured": part.section.measured(record)}
    fields = {name: value for name, value in leaves(parts) if _is_compared(name, value, part.section)}
    return {**_FORMER.get(part.section.name, {}), **fields}


def base_of(part: Part) -> Any:
    """Return what tells base models apart: tokenizer and size; the name of a model that records neither."""
    model = part.record["model"] or {}
    known = (model.get("tokenizer_sha256"), model.get("num_parameters"))
    return part.model or part.result.name if None in known else known


def is_by_task(name: str) -> bool:
    """True for a field of one task: a result without it has other tasks."""
    return bool(_BY_TASK.match(name))


def _is_compared(name: str, value: Any, section: Section) -> bool:
    if section.unknown and name.startswith(("protocol.", "data.")):
        return name in _OF_A_RUN
    if _NOT_COMPARED.match(name) or _ADDRESS in str(value):
        return False
    return bool(_QUESTION.match(name)) if name.startswith("data.tasks.") else True


def must_agree(name: str, section: Section) -> bool:
    """True for a field in which the results of one table may not differ."""
    return name in section.must_agree or not (section.unknown or _MAY_DIFFER.match(name))


def conflicts(here: Fields, there: Fields, section: Section) -> list[Conflict]:
    """Return the fields that keep two results out of one table; one that either does not record is none."""
    differing = [
        Conflict(name, value, there[name])
        for name, value in here.items()
        if name in there and value != there[name] and must_agree(name, section)
    ]
    if other_template(here.get, there.get):
        differing.append(Conflict(_TEMPLATE, here[_TEMPLATE], there[_TEMPLATE]))
    return differing


def other_template(here: Callable[[str], Any], there: Callable[[str], Any]) -> bool:
    """Return True if two results of one tokenizer were asked through different chat templates.

    Args:
        here, there: name of a field -> its value, None if it is not recorded.
    """
    if here(_TOKENIZER) is None or here(_TOKENIZER) != there(_TOKENIZER):
        return False
    templates = here(_TEMPLATE), there(_TEMPLATE)
    return None not in templates and templates[0] != templates[1]


def group(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts of a section by table: each goes into the first one where it has no conflict."""
    groups: list[list[tuple[Part, Fields]]] = []
    for part in parts:
        fields = fields_of(part)
        fitting = (
            members for members in groups if not any(conflicts(fields, other, part.section) for _, other in members)
        )
        home = next(fitting, None)
        if home is None:
            groups.append(home := [])
        home.append((part, fields))
    return [[part for part, _ in members] for members in groups]


def group_conflicts(parts: Sequence[Part], first: Sequence[Part]) -> list[Conflict]:
    """Return why `parts` are not in the table of `first`: each field once."""
    by_field: dict[str, Conflict] = {}
    there = [fields_of(part) for part in first]
    for part in parts:
        here = fields_of(part)
        for other in there:
            for conflict in conflicts(here, other, part.section):
                by_field.setdefault(conflict.field, conflict)
    return list(by_field.values())


def cautions(parts: Sequence[Part], labels: Sequence[str], places: Iterable[Sequence[Place]]) -> list[Caution]:
    """Return what may make results of one table differ besides what they measure, and what some do not record.

    Args:
        labels: of the parts.
        places: the numbers at each place of the tables.
    """
    fields = [fields_of(part) for part in parts]
    differing: list[Caution] = []
    if len({each.get(_TOKENIZER) for each in fields}) > 1:
        fields = [{name: value for name, value in each.items() if name not in _OF_A_TOKENIZER} for each in fields]
    for name in dict.fromkeys(name for each in fields for name in each):
        recorded = [(each[name], label) for each, label in zip(fields, labels, strict=True) if name in each]
        silent = [label for each, label in zip(fields, labels, strict=True) if name not in each]
        values = _by_value(recorded)
        if len(values) > 1:
            differing.append(Caution(name, values))
        if silent and name.startswith(_RECORDED) and not parts[0].section.unknown and not _BY_TASK.match(name):
            differing.append(Caution(name, [(None, silent)], is_missing=True))
    return [*differing, *_counts(places)]


def _counts(places: Iterable[Sequence[Place]]) -> list[Caution]:
    """Return the counts that differ at a place that several results have: of the first such place."""
    by_name: dict[str, Caution] = {}
    for place in places:
        for count in _COUNTS:
            values = _by_value([(score.parent[count], label) for score, label in place if count in score.parent])
            if len(values) > 1:
                by_name.setdefault(count, Caution(count, values))
    return list(by_name.values())


def _by_value(pairs: Sequence[tuple[Any, str]]) -> list[tuple[Any, list[str]]]:
    """Return (value, its labels); values may be lists, which no dict takes as keys."""
    values: list[tuple[Any, list[str]]] = []
    for value, label in pairs:
        labels = next((known for other, known in values if other == value), None)
        if labels is None:
            values.append((value, [label]))
        else:
            labels.append(label)
    return values
