"""The results that `longext report` is given: found, read, cut into what belongs to one section, and named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.errors import DataError
from longext.manifest import read_manifest
from longext.report.scores import Score, read_record, result_file, schema_trouble
from longext.report.suites import KINDS, TRAINING, Suite, suite_of, views_of

_RESULT = "result.json"
_REPORT = "report"
_HEADER = ("model", "protocol", "data")
_NO_METHOD = (None, "", "none")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result.json.

    Attributes:
        name: its directory (or the file, where it is called otherwise) as the user spells it.
        config: the settings in the run.json beside it, empty where there is none.
    """

    name: str
    file: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a result has for one section: one method of a comparison, or all of another result.

    Attributes:
        record: of its own, as if it had been measured alone.
        scores: view -> its scores.
        model: id of the model; "" where the section names results by their directory.
        method, memory: what was applied to it, "" for nothing.
    """

    result: Result
    suite: Suite
    record: Mapping[str, Any]
    scores: Mapping[str, Sequence[Score]]
    model: str
    method: str
    memory: str


# --- files ------------------------------------------------------------------------------------------------------------


def find_results(names: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Return the results in the files and directories given, each once, and what was found but left out, and why.

    A directory with a result.json is a result. Any other is searched, hidden folders and unfinished runs left out.

    Raises:
        DataError: a name leads to no result, to one that no section shows, or to a file that is not JSON.
    """
    found: dict[str, Result] = {}
    left_out = []
    for name in names:
        for file, asked_for in _files(name):
            if os.path.realpath(file) in found:
                continue
            result = _read(file)
            trouble = _trouble(result)
            if trouble is None:
                found[os.path.realpath(file)] = result
            elif asked_for:
                raise DataError(f"{file} {trouble}")
            elif result.record.get("kind") != _REPORT:
                left_out.append(f"{file} {trouble}")
    if not found:
        why = f" ({left_out[0]})" if left_out else ""
        raise DataError(f"No result in {', '.join(names)}{why}. Give -o directories of evaluations, or one above them.")
    return list(found.values()), left_out


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
        folders[:] = sorted(own for own in folders if not own.startswith(".") and not own.endswith(".running"))
        if _RESULT in files:
            yield Path(path) / _RESULT


def _read(file: Path) -> Result:
    folder = file.parent
    config = read_manifest(folder).get("config", {}) if file.name == _RESULT else {}
    return Result(
        name=str(folder if file.name == _RESULT else file), file=file, record=read_record(file), config=config
    )


def _trouble(result: Result) -> str | None:
    """Return why a report cannot show a result, as the end of a sentence; None where it can."""
    record = result.record
    kind = record.get("kind")
    foreign = schema_trouble(record)
    if foreign is not None:
        return foreign
    if kind not in KINDS:
        return f"is of kind '{kind}', which a report does not show. It shows {', '.join(KINDS)}."
    missing = [] if kind in TRAINING else [key for key in _HEADER if key not in record]
    if missing:
        return f"is no complete result: it has no `{missing[0]}`."
    try:
        parts = parts_of(result)
        _check_places(parts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"is no complete result of kind '{kind}': {type(error).__name__} {error}."
    return None if parts else "holds no numbers that a report shows."


def _check_places(parts: Sequence[Part]) -> None:
    for part in parts:
        for view in part.suite.views:
            nowhere = [score.name for score in part.scores[view.name] if view.column(score) is None]
            if nowhere:
                raise ValueError(f"{nowhere[0]} has no place")


# --- parts ------------------------------------------------------------------------------------------------------------


def parts_of(result: Result) -> list[Part]:
    """Return what a result has for the sections of a report; nothing where it has no number to show."""
    parts = []
    for record in split(result.record):
        suite = suite_of(record)
        scores = views_of(suite, record)
        if any(scores.values()):
            model, method, memory = _names(record, result)
            parts.append(
                Part(
                    result=result,
                    suite=suite,
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
    if record["kind"] == "training":
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
    return " ".join([name, *([f"{factor:g}x"] if factor else []), *([settings] if settings else [])])


# --- records that hold several ----------------------------------------------------------------------------------------


def split(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield records that belong to one section each: those that `compare` holds, of a training run what it measured."""
    if record["kind"] == "compare":
        for method in record["methods"]:
            yield from _of_method(record, method)
    elif record["kind"] in TRAINING:
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
        own = {**protocol[key], **({"stride": protocol["perplexity"]["stride"]}), **seed}
        yield {**shared, "kind": "perplexity", "protocol": own, "data": record["data"], "results": method[key]}
    if method["passkey"]:
        own = {**protocol["passkey"], **seed}
        cells = {"results": method["passkey"], "by_length": method["passkey_by_length"]}
        yield {**shared, "kind": "passkey", "protocol": own, "data": None, **cells}


def _of_training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss and the last measured perplexity of a run, with its data."""
    run = record.get("finetune") or record.get("compress") or {}
    measured = record.get("perplexity") or [{}]
    return {
        "schema": record["schema"],
        "kind": "training",
        "command": record.get("command"),
        "versions": record.get("versions"),
        "model": {},
        "protocol": {"id": record["kind"]},
        "data": run.get("data"),
        "final_loss": record.get("final_loss"),
        "perplexity": measured[-1].get("perplexity", {}),
    }


# --- labels -----------------------------------------------------------------------------------------------------------


def model_names(parts: Sequence[Part]) -> dict[str, str]:
    """Return model id -> how labels spell it: the end of a path, "" where there is but one and other things differ."""
    ids = list(dict.fromkeys(part.model for part in parts if part.model))
    if len(ids) == 1 and len({(part.method, part.memory) for part in parts if part.model}) > 1:
        return {ids[0]: ""}
    return dict(zip(ids, _shortest(ids), strict=True))


def label_parts(parts: Sequence[Part], names: Mapping[str, str]) -> list[str]:
    """Return a label for each part, unique among them: model, method, memory; the directory where these are equal.

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
    return " + ".join(own for own in (names[part.model], part.method, part.memory) if own) or "none"


def _shortest(paths: Sequence[str]) -> list[str]:
    """Return the last component of each path, and as many more as tell different paths apart."""
    return ["/".join(_ending(Path(path).parts, [Path(own).parts for own in paths if own != path])) for path in paths]


def _ending(path: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    sizes = range(1, len(path) + 1)
    size = next((n for n in sizes if all(other[-n:] != path[-n:] for other in others)), len(path))
    return path[-size:]
