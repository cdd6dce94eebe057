"""The results that `longext report` is given: found, read, split into what belongs to one section, and named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.errors import DataError
from longext.evals.base import EVALS, Eval
from longext.evals.views import NEVER, Bars, Lines, Score, Section, read
from longext.manifest import read_manifest
from longext.report.scores import numbers_of, read_record, result_file, schema_trouble

_RESULT = "result.json"
_REPORT, _COMPARE, _TRAINING = "report", "compare", "training"
TRAINING_KINDS = ("finetune", "compress-train")
_HEADER = ("model", "protocol", "data")
_NO_METHOD = (None, "", "none")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result record.

    Attributes:
        name: its directory (or its file, if that is not called result.json) as the user spells it.
        config: the settings of the run, empty if they are not known.
    """

    name: str
    record: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a result has for one section: one method of a comparison, or all of another result.

    Attributes:
        record: as if this part had been measured alone.
        scores: view -> its scores.
        model: id of the model; "" if the section names results by their directory.
        method, memory: what was applied to it, "" for nothing.
    """

    result: Result
    section: Section
    record: Mapping[str, Any]
    scores: Mapping[str, Sequence[Score]]
    model: str
    method: str
    memory: str


# --- files ------------------------------------------------------------------------------------------------------------


def find_results(names: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Return the results in the files and directories given, each once, and what was left out, with the reason.

    A directory with a result.json is a result. Any other is searched, except hidden folders and unfinished runs.

    Raises:
        DataError: a name leads to no result, to one that no section shows, or to a file that is not JSON.
    """
    results: dict[str, Result] = {}
    left_out = []
    for name in names:
        for file, is_named in _files(name):
            path = os.path.realpath(file)
            if path in results:
                continue
            result = _read(file)
            trouble = _trouble(result)
            if trouble is None:
                results[path] = result
                failed = result.record.get("failed") or () if result.record["kind"] == _COMPARE else ()
                left_out += [f"{each['name']} of {result.name}: {each['reason']}" for each in failed]
            elif is_named:
                raise DataError(f"{file} {trouble}")
            elif result.record.get("kind") != _REPORT:
                left_out.append(f"{file} {trouble}")
    if not results:
        why = f" ({left_out[0]})" if left_out else ""
        raise DataError(f"No result in {', '.join(names)}{why}. Give -o directories of evaluations, or one above them.")
    return list(results.values()), left_out


def _files(name: str) -> Iterator[tuple[Path, bool]]:
    """Yield the result files a name leads to, and whether the user named the file itself."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or (folder / _RESULT).is_file():
        yield result_file(name), True
        return
    files = list(_search(folder))
    if not files:
        raise DataError(f"No result in '{name}': neither it nor a folder in it holds a {_RESULT}.")
    yield from ((file, False) for file in files)


def _search(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".running"))
        if _RESULT in files:
            file = Path(path) / _RESULT
            if read_record(file).get("kind") == _COMPARE:
                folders.clear()  # the results of its methods: the comparison holds the same numbers
            yield file


def _read(file: Path) -> Result:
    is_plain = file.name == _RESULT
    config = read_manifest(file.parent).get("config", {}) if is_plain else {}
    return Result(name=str(file.parent if is_plain else file), record=read_record(file), config=config)


def _trouble(result: Result) -> str | None:
    """Return why a report cannot show a result, as the end of a sentence; None if it can."""
    record = result.record
    kind = record.get("kind")
    foreign = schema_trouble(record)
    if foreign is not None:
        return foreign
    if kind not in kinds():
        return f"is of kind '{kind}', which a report does not show. It shows {', '.join(kinds())}."
    missing = [] if kind in TRAINING_KINDS else [key for key in _HEADER if key not in record]
    if missing:
        return f"is no complete result: it has no `{missing[0]}`."
    try:
        parts = parts_of(result)
        _check_columns(parts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"is no complete result of kind '{kind}': {type(error).__name__} {error}."
    return None if parts else "holds no numbers that a report shows."


def kinds() -> tuple[str, ...]:
    """Return the kinds of results that a report shows."""
    names = dict.fromkeys(section.kind for section in sections() if section.kind != _TRAINING)
    return (*names, _COMPARE, *TRAINING_KINDS)


def _check_columns(parts: Sequence[Part]) -> None:
    for part in parts:
        for view in part.section.views:
            lost = [score.name for score in part.scores[view.name] if read(view.columns, score) is None]
            if lost:
                raise ValueError(f"{lost[0]} has no column")


# --- parts ------------------------------------------------------------------------------------------------------------


def parts_of(result: Result) -> list[Part]:
    """Return what a result has for the sections of a report; nothing if it has no number to show."""
    parts = []
    for record in split(result.record):
        section = section_of(record)
        scores = scores_by_view(section, record)
        if any(scores.values()):
            model, method, memory = _names(record, result)
            parts.append(
                Part(
                    result=result,
                    section=section,
                    record=record,
                    scores=scores,
                    model=model,
                    method=method,
                    memory=memory,
                )
            )
    return parts


def _names(record: Mapping[str, Any], result: Result) -> tuple[str, str, str]:
    """Return (model, method, memory) as a label spells them."""
    model = record["model"] or {}
    memory = str((model.get("memory") or {}).get("spec") or (model.get("compressor") or {}).get("directory") or "")
    if record["kind"] == _TRAINING:
        name = ""
    elif model.get("id"):
        name = str(model["id"]).removesuffix(f" + {memory}") if memory else str(model["id"])
    else:
        name = Path(str(model.get("answers_from") or result.name)).name
    return name, _method(record, model, result.config), "no memory" if memory == "none" else Path(memory).name


def _method(record: Mapping[str, Any], model: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the RoPE method and its factor: those of a comparison, of the settings, else what the RoPE is called."""
    rope = model.get("rope_parameters") or {}
    if "method" in record:
        method, factor = record["method"], record["factor"]
    elif "method" in config:
        method, factor = config["method"], config.get("factor")
    else:
        method, factor = rope.get("rope_type", "default").replace("default", ""), rope.get("factor")
    if method in _NO_METHOD:
        return ""
    name, _, settings = str(method).partition(":")
    has_own = re.search(r"(^|:)(factor|target[_-]length)=", settings)
    return " ".join([name, *([f"{factor:g}x"] if factor and not has_own else []), *([settings] if settings else [])])


# --- records that hold several ----------------------------------------------------------------------------------------


def split(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield records that belong to one section each: those of a comparison's methods, what a training run measured."""
    if record["kind"] == _COMPARE:
        for method in record["methods"]:
            yield from _of_method(record, method)
    elif record["kind"] in TRAINING_KINDS:
        yield _of_training(record)
    else:
        yield dict(record)


def _of_method(record: Mapping[str, Any], method: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what `eval ppl` (sliding, positional) and `passkey` would have written of one method of a comparison."""
    protocol = record["protocol"]
    shared = {
        "schema": record["schema"],
        "command": record.get("command"),
        "versions": record.get("versions"),
        "model": {**record["model"], "rope_parameters": method["rope_parameters"]},
        "method": method["name"],
        "factor": record["factor"],
        "trained_length": record["trained_length"],
    }
    seed = {"seed": protocol.get("seed")}
    for key in ("perplexity", "positions"):
        same = {**protocol[key], "stride": protocol["perplexity"]["stride"], **seed}
        yield {**shared, "kind": "perplexity", "protocol": same, "data": record["data"], "results": method[key]}
    if method["passkey"]:
        by_depth = [{**cell, "accuracy": cell["num_correct"] / cell["num_trials"]} for cell in method["passkey"]]
        cells = {"results": by_depth, "by_length": method["passkey_by_length"]}
        yield {**shared, "kind": "passkey", "protocol": {**protocol["passkey"], **seed}, "data": None, **cells}


def _of_training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss and the last measured perplexity of a run, with its data."""
    run = record.get("finetune") or record.get("compress") or {}
    measured = record.get("perplexity") or [{}]
    return {
        "schema": record["schema"],
        "kind": _TRAINING,
        "command": record.get("command"),
        "versions": record.get("versions"),
        "model": {},
        "protocol": {"id": record["kind"]},
        "data": run.get("data"),
        "losses": [{"name": _objective(run), "final_loss": record.get("final_loss")}],
        "perplexity": measured[-1].get("perplexity", {}),
    }


def _objective(run: Mapping[str, Any]) -> str | None:
    """Return what a run trained, None if it does not say: losses under two objectives are two quantities."""
    if "objectives" in run:
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in run["objectives"].items())
    attention = run.get("attention") or {}
    group = f" in groups of {attention['group_size']:,}" if attention.get("group_size") else ""
    objective = f"{attention.get('training')} attention{group}"
    return str(attention.get("objective") or objective) if attention else None


# --- labels -----------------------------------------------------------------------------------------------------------


def model_names(parts: Sequence[Part]) -> dict[str, str]:
    """Return model id -> how labels spell it: the end of a path, "" if there is only one and other things differ.

    The name of "" is that of a model to which nothing was applied: "none" among RoPE methods, as `compare` calls it.
    """
    named = [part for part in parts if part.model]
    ids = list(dict.fromkeys(part.model for part in named))
    names = dict(zip(ids, _shortest(ids), strict=True))
    plain = "none" if any(part.method for part in named) or len(ids) != 1 else names[ids[0]]
    if len(ids) == 1 and len({(part.method, part.memory) for part in named}) > 1:
        names = {ids[0]: ""}
    return {**names, "": plain}


def label_parts(parts: Sequence[Part], names: Mapping[str, str]) -> list[str]:
    """Return a label for each part, unique among them: model, method, memory; the directory if these are equal.

    Args:
        names: of models, as `model_names`.
    """
    plain = [_plain_label(part, names) for part in parts]
    folders = _shortest([str(Path(part.result.name).expanduser().absolute()) for part in parts])
    labels = [
        folder if not label else label if plain.count(label) == 1 else f"{label} ({folder})"
        for label, folder in zip(plain, folders, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: i + 1].count(label)}"
        for i, label in enumerate(labels)
    ]


def _plain_label(part: Part, names: Mapping[str, str]) -> str:
    if not part.model:
        return ""
    return " + ".join(name for name in (names[part.model], part.method, part.memory) if name) or names[""]


def _shortest(paths: Sequence[str]) -> list[str]:
    """Return the last component of each path, and as many more as tell different paths apart."""
    return [
        "/".join(_ending(Path(path).parts, [Path(other).parts for other in paths if other != path])) for path in paths
    ]


def _ending(path: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    sizes = range(1, len(path) + 1)
    size = next((n for n in sizes if all(other[-n:] != path[-n:] for other in others)), len(path))
    return path[-size:]


# --- sections ---------------------------------------------------------------------------------------------------------


def _key_as_length(score: Score) -> int:
    return int(score.keys[-1])


_RUNS = Section(
    name="training",
    title="Training runs",
    kind=_TRAINING,
    must_agree=frozenset({"protocol.id"}),
    unknown="Runs do not record a protocol of what they measure while training: `eval ppl` compares their models.",
    views=(
        Bars(
            "Loss of the last step (nats)",
            of="losses.final_loss",
            unit="nats",
            lower_is_better=None,
            columns=lambda score: score.field("name") or "loss",  # two objectives are two quantities
            picture=NEVER,
        ),
        Lines(
            "Perplexity at the last step that was evaluated, by length",
            of="perplexity.*",
            name="perplexity",
            unit="perplexity",
            lower_is_better=None,
            columns=_key_as_length,
            axis="length (tokens)",
        ),
    ),
)


def sections(evaluations: Iterable[type[Eval]] | None = None) -> tuple[Section, ...]:
    """Return every section, or those of some evaluations, in the order of a report."""
    kinds = EVALS.values() if evaluations is None else evaluations
    return (*(section for kind in kinds for section in kind.sections), _RUNS)


def section_of(record: Mapping[str, Any]) -> Section:
    """Return the section of a record: that of its kind and protocol, else that of its kind.

    Raises:
        KeyError: no section shows this kind.
    """
    kind, protocol = str(record["kind"]), str((record["protocol"] or {}).get("id"))
    for evaluations in (EVALS.loaded(), None):  # the one that was just run needs no other to be imported
        known = sections(evaluations)
        fitting = [section for section in known if section.kind == kind and section.protocol in ("", protocol)]
        if fitting:
            break
    else:
        raise KeyError(kind)
    return max(fitting, key=lambda section: bool(section.protocol))


def scores_by_view(section: Section, record: Mapping[str, Any]) -> dict[str, list[Score]]:
    """Return the scores of each view, by the view's name."""
    scores = [score for score in numbers_of(record) if not score.is_count]
    return {view.name: [score for score in scores if view.shows(score)] for view in section.views}
