"""The card of a published checkpoint: its metadata, evaluation results in the Hub's schema, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.conversion.card import base_name
from longext.conversion.publish import CARD_NAME, Parcel, base_of, config_hash, pack
from longext.errors import ConfigError
from longext.evals.views import SEVERAL, View, read
from longext.report.find import Part, find_results, parts_of
from longext.report.tables import Table
from longext.settings import option

_MADE_BY = "\n## Made by\n"
_MOST = 40  # numbers of one result that a card takes


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """`longext push`: a checkpoint to the Hugging Face Hub."""

    model: str = option(help="Directory of the checkpoint: of extend, merge, or finetune --tuning full.", argument=True)
    repo: str = option(help="Repository to upload to, OWNER/NAME; it is made if it is not there.", argument=True)
    results: tuple[str, ...] = option((), "Results of evaluations of this checkpoint, for its card (-o of eval).")
    base_model: str | None = option(None, "Hub id of the model it was made from (default: what run.json names).")
    license: str | None = option(None, "Licence, as the Hub spells it (default: that of the base model's card).")
    private: bool = option(False, "Make a private repository.")
    leave_out: bool = option(False, "Leave files out that are no part of a checkpoint, instead of refusing them.")
    message: str = option("Upload with longext", "Message of the commit.")


@dataclass(frozen=True)
class Publication:
    """What is to be uploaded, the numbers its card holds, and what its author should still say."""

    parcel: Parcel
    card: Any
    results: Sequence[Any]
    notes: Sequence[str]


def prepare(config: PushConfig) -> Publication:
    """Collect files, and make the card with its metadata.

    Raises:
        ConfigError, CheckpointError, DataError: no checkpoint, files that do not belong, results of another model.
    """
    from huggingface_hub import ModelCard

    directory = Path(config.model).expanduser()
    if not directory.is_dir():
        raise ConfigError(f"There is no directory '{config.model}'. Give the -o of extend, merge or finetune.")
    parcel = pack(directory, config.repo, config.leave_out)
    found, untold = evaluation_results(config.results, directory)
    try:
        card = ModelCard(parcel.texts[CARD_NAME])
    except (ValueError, TypeError) as error:  # YAML that somebody edited
        told = " ".join(str(error).split())[:200]
        raise ConfigError(f"The metadata of {directory / CARD_NAME} cannot be read: {told}") from error
    base = config.base_model or card.data.get("base_model") or _hub_id(base_of(directory))
    for key, value in {"base_model": base, "license": config.license}.items():
        if value:
            card.data[key] = value
    if found:
        card.data.model_name, card.data.eval_results = config.repo.partition("/")[2], found
        head, mark, tail = card.text.partition(_MADE_BY)
        card.text = f"{head.rstrip()}\n\n{evaluation_section(found)}{mark}{tail}"
    notes = [
        *(["No base model with a Hub id is known: --base-model ID names it."] if not base else []),
        *(["No licence is known: --license ID names it."] if not card.data.get("license") else []),
        *(["The card has no evaluation: --results DIR adds those that were run."] if not found else []),
        *untold,
    ]
    parcel = Parcel(parcel.files, {**parcel.texts, CARD_NAME: str(card)}, parcel.left_out)
    return Publication(parcel, card, found, notes)


def _hub_id(base: str | None) -> str | None:
    return base if base and "/" in base else None


def push(publication: Publication, config: PushConfig) -> str:
    """Upload in one commit, and return its address.

    Raises:
        huggingface_hub's errors: no token, no right to write there, no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, parcel = HfApi(), publication.parcel
    api.create_repo(config.repo, private=config.private, exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=parcel.texts.get(name, "").encode() or str(file))
        for name, file in parcel.files.items()
    ]
    commit = api.create_commit(config.repo, operations=operations, commit_message=config.message)
    return str(commit.commit_url)


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluation_results(names: Sequence[str], directory: Path) -> tuple[list[Any], list[str]]:
    """Return the numbers of results as `huggingface_hub.EvalResult`, and a line on each result that is not whole.

    Args:
        names: results, or folders of them.
        directory: the checkpoint that they have to be of, by the hash of its config.json.

    Raises:
        DataError: there is no result. ConfigError: it is of another model, or of one with a method or memory on top.
    """
    if not names:
        return [], []
    results, left_out = find_results(names)
    expected = config_hash(directory)
    parts = [(result, part) for result in results for part in parts_of(result)]
    for result, part in parts:
        model = part.record.get("model")
        measured = model.get("config_sha256") if isinstance(model, dict) else None
        if measured != expected or part.method or part.memory:
            on_top = f" with {part.method or part.memory}" if part.method or part.memory else ""
            whose = f"{part.model or 'another model'}{on_top}"
            raise ConfigError(f"{result.name} is of {whose}, not of {directory} as it is.")
    numbers = [(result, _numbers(part)) for result, part in parts]
    untold = [f"Not on the card: {reason}" for reason in left_out]
    untold += [
        f"The card has the first {_MOST} of {len(own)} numbers of {result.name}."
        for result, own in numbers
        if len(own) > _MOST
    ]
    return [number for _, own in numbers for number in own[:_MOST]], untold


def _numbers(part: Part) -> list[Any]:
    """The numbers of the first view that a single result's table shows."""
    view = next((view for view in part.section.views if view.table != SEVERAL and part.scores[view.name]), None)
    return [_number(part, view, score) for score in part.scores[view.name]] if view else []


def _number(part: Part, view: View, score: Any) -> Any:
    from huggingface_hub import EvalResult

    protocol, data = part.record.get("protocol") or {}, part.record.get("data") or {}
    kind, source = str(part.record["kind"]), str(data.get("source") or "made by longext")
    column = read(view.columns, score)
    panel = read(view.panel, score) if view.panel else None
    variant = read(view.variant, score) if view.variant else None
    what = "".join(f"{part}, " for part in (panel, variant) if part)
    interval = score.interval()
    return EvalResult(
        task_type="text-generation",
        task_name=part.section.title,
        dataset_type=kind,
        dataset_name=base_name(source),
        dataset_args={"protocol": protocol.get("id"), "sha256": data.get("sha256") or protocol.get("prompts_sha256")},
        metric_type="perplexity" if view.unit == "perplexity" else kind if view.unit != "share" else "accuracy",
        metric_name=f"{view.title}: {what}{view.spell(column)}",
        metric_value=round(float(score.value), 6),
        metric_args={"low": round(interval[0], 6), "high": round(interval[1], 6)} if interval else None,
    )


def evaluation_section(found: Sequence[Any]) -> str:
    """Return the Markdown section of a card that shows evaluation results."""
    lines = ["## Evaluation", "", "| evaluation | data | number | value | 95 % |", "|---|---|---|--:|--:|"]
    for each in found:
        bounds = f"{each.metric_args['low']:.4g} to {each.metric_args['high']:.4g}" if each.metric_args else ""
        name = f"{each.task_name} (`{each.dataset_args['protocol']}`)"
        lines.append(f"| {name} | {each.dataset_name} | {each.metric_name} | {each.metric_value:.4g} | {bounds} |")
    return "\n".join([*lines, ""])


def parcel_table(publication: Publication, repo: str) -> Table:
    """The files that are uploaded, with their sizes."""
    from longext.report.commands.model import megabytes

    parcel = publication.parcel
    rows = [[name, megabytes(parcel.size(name)), "rewritten" if name in parcel.texts else ""] for name in parcel.files]
    return Table(f"upload to {repo}", ["file", "size", ""], rows, left=frozenset({2}))
