"""The reference, as Markdown: every command with every flag and key, and the Python API.

Pages are written from the program when the site is built; none is kept in the repository. No mkdocs in this file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import typer

import longext
from longext.cli.app import COMMANDS, app
from longext.cli.build import PANELS, Command
from longext.cli.evaluation import evaluation_command
from longext.settings import Option, option_of

_DEFAULT = re.compile(r"\s*\[(default: [^\]]*(?:\][^\]]*)*|required)\]$")
_FUNCTIONS = [name for name, module in longext._PUBLIC.items() if module == "longext.api"]
_PYTHON = {
    "functions": ("Functions", [*(f"longext.api.{name}" for name in _FUNCTIONS), "longext.models.remap.attach"]),
    "results": (
        "What functions return",
        [
            "longext.report.outcome.Result",
            "longext.report.outcome.Comparison",
            "longext.report.commands.advise.Advice",
            "longext.report.commands.gate.Verdict",
            "longext.models.protocol.LanguageModel",
            "longext.models.remap.Remapping",
            "longext.training.run.TrainingResult",
            "longext.conversion.merge.MergeResult",
            "longext.compressor.writing.pieces.Generated",
            "longext.compressor.writing.conversation.Conversation",
            "longext.compressor.reading.session.Session",
            "longext.planning.fit.TrainingPlan",
        ],
    ),
    "parts": ("Parts", []),  # what is public and has no other page
    "errors": ("Errors", ["longext.errors"]),
}
_REGISTRIES = ("ROPE_METHODS", "REMAPS", "EVALS")


def pages() -> dict[str, str]:
    """Return every page of the reference: its path in the site -> Markdown."""
    return {**command_pages(), **python_pages()}


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(group: Any = None, before: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command as (full name, click command), in the order of the help; `eval NAME` for evaluations."""
    group = group or typer.main.get_command(app)
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*before, name))
        else:
            yield " ".join((*before, name)), command


def command_pages() -> dict[str, str]:
    """Return one page for each command, and the one that lists them."""
    found = dict(commands())
    written = {path_of(name): _command_page(name, command) for name, command in found.items()}
    rows = [f"| [`longext {name}`]({_slug(name)}.md) | {_cell(_summary(found[name]))} |" for name in found]
    root = typer.main.get_command(app)
    listed = ["# Every command", "", "Written from the program. Flags of `longext` itself:", "", *_options(root), ""]
    listed += ["| command | what it does |", "| :-- | :-- |", *rows]
    return {"reference/commands/index.md": "\n".join(listed) + "\n", **written}


def path_of(name: str) -> str:
    """Return the path of a command's page."""
    return f"reference/commands/{_slug(name)}.md"


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _summary(command: Any) -> str:
    return _paragraphs(command.help)[0]


def _paragraphs(help: str | None) -> list[str]:
    return [" ".join(part.split()) for part in (help or "").split("\n\n") if part.strip()]


def _command_page(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join(["longext", name, *(f"[{param.name.upper()}]" for param in arguments), "[OPTIONS]"])
    lines = ["---", "search: {boost: 2}", "---", "", f"# longext {name}", ""]
    for paragraph in _paragraphs(command.help):
        title, colon, example = paragraph.partition(": longext ")
        lines += [f"{title}:", "", "```", f"longext {example}", "```", ""] if colon else [_plain(paragraph), ""]
    return "\n".join([*lines, "```", usage, "```", "", *_options(command, _settings(name)), *_keys(_settings(name))])


def _settings(name: str) -> Command | None:
    evaluation = name.removeprefix("eval ")
    if name in COMMANDS or evaluation in COMMANDS and evaluation == "diff":
        return COMMANDS[evaluation]
    return evaluation_command(evaluation) if name.startswith("eval ") else None


def _options(command: Any, settings: Command | None = None) -> list[str]:
    """Return the arguments and flags in their panels, as tables."""
    root = typer.main.get_command(app)
    context, panels = typer.Context(command, parent=typer.Context(root, **root.context_settings)), {}
    fields = {} if settings is None else {item.name: option_of(item) for item in dataclasses.fields(settings.config)}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is None:
            continue
        is_argument = param.param_type_name == "argument"
        panel = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or "Output"
        panels.setdefault(panel, []).append(_row(*record, fields.get(param.name)))
    order = ["Arguments", *PANELS[:-1]]
    lines = []
    for panel in sorted(panels, key=lambda panel: order.index(panel) if panel in order else len(order)):
        head = ["| name | meaning | default |", "| :-- | :-- | :-- |"]
        lines += [f"## {panel}", "", *head, *panels[panel], ""]
    return lines


def _row(flag: str, text: str, option: Option | None) -> str:
    default = _DEFAULT.search(text)
    text = text[: default.start()] if default else text
    value = default[1].removeprefix("default: ") if default else ""
    bounds = _bounds(option) if option else ""
    spelled = ", ".join(f"`{part.strip()}`" for part in re.split(r", | / ", flag))
    return f"| {spelled} | {_cell(text)}{bounds} | {_code(value)} |"


def _bounds(option: Option) -> str:
    parts = [f"at least {option.ge:g}" if option.ge is not None else ""]
    parts += [f"at most {option.le:g}" if option.le is not None and option.le < 10**6 else ""]
    said = ", ".join(part for part in parts if part)
    return f" ({said})" if said else ""


def _keys(settings: Command | None) -> list[str]:
    """Return the table of what only a recipe or `--set` gives."""
    if settings is None or not settings.has_recipe:
        return []
    hidden = [item for item in dataclasses.fields(settings.config) if not option_of(item).is_flag]
    if not hidden:
        return []
    lead = "For `-c RECIPE` and `--set key=value` alone; a flag's key is its name with underscores."
    return ["## Keys without a flag", "", lead, "", *_fields(hidden), ""]


def _fields(items: list[dataclasses.Field[Any]]) -> list[str]:
    rows = []
    for item in items:
        option = option_of(item)
        default = "required" if item.default is dataclasses.MISSING else _code(_value(item.default))
        rows.append(f"| `{item.name}` | {_cell(option.text)}{_bounds(option)} | {default} |")
    return ["| key | meaning | default |", "| :-- | :-- | :-- |", *rows]


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _code(value: str) -> str:
    return f"`{_bar(value)}`" if value else ""


def _cell(text: str) -> str:
    return _bar(_plain(" ".join(text.split())))


def _bar(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(text: str) -> str:
    """Return text of a help with what Markdown would read as markup kept as it is, outside backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)


# --- Python -----------------------------------------------------------------------------------------------------------


def python_pages() -> dict[str, str]:
    """Return the pages of what `import longext` offers: docstrings (mkdocstrings), fields, registries."""
    pages = {name: (title, list(objects)) for name, (title, objects) in _PYTHON.items()}
    shown = {path.rpartition(".")[2] for _, objects in pages.values() for path in objects}
    configs = [name for name, module in longext._PUBLIC.items() if module.endswith(".config") or ".suites." in module]
    rest = [name for name in longext._PUBLIC if name not in {*shown, *configs, *_REGISTRIES}]
    pages["parts"][1].extend(f"{longext._PUBLIC[name]}.{name}" for name in rest)
    written = {
        f"reference/python/{name}.md": "\n\n".join([f"# {title}", *(f"::: {path}" for path in objects)]) + "\n"
        for name, (title, objects) in pages.items()
    }
    written["reference/python/settings.md"] = _settings_page(configs)
    written["reference/python/registries.md"] = _registries_page()
    return written


def _settings_page(names: list[str]) -> str:
    lines = [
        "# Settings",
        "",
        "The fields of the dataclasses that functions and commands read their settings into.",
        "",
    ]
    for name in names:
        kind = getattr(longext, name)
        summary = (kind.__doc__ or "").split("\n\n")[0]
        lines += [f"## {name}", "", _plain(" ".join(summary.split())), "", *_fields(list(dataclasses.fields(kind))), ""]
    return "\n".join(lines)


def _registries_page() -> str:
    lines = ["# Registries", "", "What methods and evaluations there are; each is one file.", ""]
    for name in ("ROPE_METHODS", "REMAPS"):
        registry = getattr(longext, name)
        lines += [
            f"## {name}",
            "",
            "| name | method | source | formula | parameters |",
            "| :-- | :-- | :-- | :-- | :-- |",
        ]
        for key in registry:
            method = registry[key]
            parameters = ", ".join(f"`{parameter.name}`" for parameter in method.parameters)
            cells = (_cell(method.title), _cell(method.reference), _code(method.formula), parameters)
            lines.append(f"| `{key}` | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## EVALS", "", "| name | what it measures |", "| :-- | :-- |"]
    for key in longext.EVALS:
        lines.append(f"| [`{key}`](../commands/{_slug(f'eval {key}')}.md) | {_cell(longext.EVALS.summary(key))} |")
    return "\n".join(lines) + "\n"
