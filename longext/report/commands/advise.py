"""What `longext advise` says and shows: two sentences, tables, a picture and the command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from longext.conversion.engines import serving_engines
from longext.evals.sequential.elimination import FEWEST
from longext.report.tables import Table, number
from longext.settings import shown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.report.outcome import Tables

_COLOURS = {"serving engines read it": "#0072b2", "transformers only": "#d55e00", "put aside, or a control": "#9a9a9a"}
_FEW = 3  # names that a sentence spells out


@dataclass(frozen=True, repr=False)
class Advice:
    """What `longext advise` found; `record` is the JSON, `answer` the sentences, `commands` what to run next."""

    record: Mapping[str, Any]

    @property
    def answer(self) -> list[str]:
        """The answer: what serving engines take, what transformers takes, and what a reader has to know."""
        return sentences(self.record)

    @property
    def commands(self) -> list[str]:
        """The commands to run next."""
        return next_commands(self.record)

    def method(self, where: str = "transformers") -> str:
        """Return the method to take in "transformers" or for serving "engines", as `method=` of `load` spells it."""
        return str(self.record["answers"][where]["method"])

    def table(self) -> Tables:
        """Return the tables; they print as text, and as HTML in a notebook."""
        from longext.report.outcome import Tables

        return Tables(advice_tables(self.record))

    def plot(self) -> Figure:
        """Return the picture: perplexity and passkeys of every method, with their intervals."""
        return advice_figures(self.record)["advice"]

    def __repr__(self) -> str:
        return "\n".join([*self.answer, "", *self.commands, "", repr(self.table())])

    def _repr_html_(self) -> str:
        answer = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.answer)
        commands = escape("\n".join(self.commands))
        return f"{answer}<pre>{commands}</pre>{self.table()._repr_html_()}"


def _row(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(row for row in record["methods"] if row["name"] == name)
    return row


def _at(row: Mapping[str, Any], length: int) -> Any:
    return next((each for each in row["perplexity"] if each["length"] == length), None)


# --- the answer -------------------------------------------------------------------------------------------------------


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Return the answer in two sentences, then what it leaves open."""
    answers = record["answers"]
    first, second = answers.get("engines"), answers["transformers"]
    said = [_for_engines(record, first), _for_transformers(record, first, second)]
    return [*said, *_open(record, second["method"])]


def _for_engines(record: Mapping[str, Any], answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return "No serving engine reads any of the methods that were tried."
    row = _row(record, answer["method"])
    read = f"{_readers(row)} read it{_tied(record, answer)}"
    return f"For serving engines take {row['name']}: {_figures(record, row)}; {read}."


def _for_transformers(record: Mapping[str, Any], first: Mapping[str, Any] | None, second: Mapping[str, Any]) -> str:
    name = second["method"]
    if first and name == first["method"]:
        text = f"In transformers with longext nothing is told apart from {name} as better, so take it there too"
        best = next((other for other in second["not_told_apart"] if _is_better(record, other, name)), None)
        more = f" ({best} has better numbers: more --minutes may tell them apart)" if best else ""
        return f"{text}{more}."
    text = f"In transformers with longext take {name}: {_figures(record, _row(record, name))}{_tied(record, second)}"
    return f"{text}; no serving engine reads it." if first else f"{text}."


def _readers(row: Mapping[str, Any]) -> str:
    """Return the engines that read a method, without their versions."""
    return ", ".join(name.rpartition(" ")[0] for name in row["engines"]) or "none"


def _is_better(record: Mapping[str, Any], one: str, other: str) -> bool:
    """True if both numbers of `one` are at least as good."""
    a, b, target = _row(record, one), _row(record, other), record["target_length"]
    more = a["passkey"]["accuracy"] >= b["passkey"]["accuracy"]
    return bool(more and _at(a, target)["ppl"] <= _at(b, target)["ppl"])


def _figures(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return perplexity, passkeys and price in words."""
    target, trained, passkey = record["target_length"], record["trained_length"], row["passkey"]
    found = f"{passkey['num_correct']} of {passkey['num_trials']} passkeys"
    return (
        f"perplexity {number(_at(row, target)['ppl'])} and {found} at {target:,} tokens, {_price(row)} within the "
        f"trained {trained:,}"
    )


def _price(row: Mapping[str, Any]) -> str:
    price = row["price"]["change"]
    return "no change" if abs(price) < 5e-4 else f"{price:+.1%}"


def _tied(record: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    others = answer["not_told_apart"]
    if not others:
        return ""
    more = f" and {len(others) - _FEW} more" if len(others) > _FEW else ""
    are = "is" if len(others) == 1 else "are"
    simple = ", and nothing is simpler" if record["is_enough"] else ""
    return f"; {', '.join(others[:_FEW])}{more} {are} not told apart from it{simple}"


def _open(record: Mapping[str, Any], name: str) -> list[str]:
    """Return what a reader has to know: too few places, no use of far context, the sample instead of own text."""
    notes = []
    if not record["is_enough"]:
        measured = record["num_places"]
        minutes = sum(row["seconds"] for row in record["methods"]) / measured * FEWEST / 60
        notes.append(
            f"Undecided: {measured} place(s) were measured, and {FEWEST} are needed to tell methods apart: about "
            f"{minutes:.1f} minutes at this speed. Give more --minutes, more --num-places or text, or fewer --methods."
        )
    change = _row(record, name)["against_window"]
    window = f"a window of the last {record['trained_length']:,} tokens by the model as it is"
    if change and "change_high" in change:
        span = f"{change['change_low']:+.1%} to {change['change_high']:+.1%}"
        if change["change_high"] < 0:
            notes.append(
                f"The far text helps: {name} has {change['change']:+.1%} ({span}) perplexity against {window}."
            )
        else:
            notes.append(
                f"The far text does not help to predict this data: {name} has {change['change']:+.1%} ({span}) "
                f"perplexity against {window}, on the same tokens. What is gained is what can be looked up."
            )
    if record["data"]["source"] == "sample":
        notes.append("This was measured on the bundled story: give your own text with --data.")
    return notes


def next_commands(record: Mapping[str, Any]) -> list[str]:
    """Return the commands to run next, ready to be pasted."""
    answers, target = record["answers"], record["target_length"]
    revision = ["--revision", record["revision"]] if record.get("revision") else []
    model, factor = [record["model"]["id"], *revision], f"{target / record['trained_length']:g}"
    commands = []
    if "engines" in answers:
        commands.append(_extend(model, answers["engines"]["method"], target))
    chosen = answers["transformers"]["method"]
    if chosen != answers.get("engines", {}).get("method"):
        given = ["longext", "generate", *model, "--method", chosen, "--factor", factor, "--context", "FILE"]
        commands.append(shlex.join([*given, "--prompt", "..."]))
    return commands


def _extend(model: Sequence[str], method: str, target: int) -> str:
    name, *settings = method.split(":")
    flags = [text for setting in settings for text in _flag(*setting.split("=", 1))]
    length = [] if {"--factor", "--target-length"} & {*flags} else ["--target-length", str(target)]
    output = f"{shown_name(model[0]).split('/')[-1]}-{target}"
    return shlex.join(["longext", "extend", *model, "--method", name, *flags, *length, "-o", output])


def _flag(key: str, value: str) -> list[str]:
    flag = f"--{key.replace('_', '-')}"
    return {"true": [flag], "false": [f"--no-{flag[2:]}"]}.get(value.lower(), [flag, value])


# --- tables and picture -----------------------------------------------------------------------------------------------


def _sorted(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    target = record["target_length"]
    return sorted(record["methods"], key=lambda row: (row["beaten_by"] is not None, _at(row, target)["ppl"]))


def advice_tables(record: Mapping[str, Any]) -> list[Table]:
    """Return what was measured of each method, and what reads it."""
    rows, trained = _sorted(record), record["trained_length"]
    lengths = [each["length"] for each in rows[0]["perplexity"] if each["length"] > trained]
    chosen = {answer["method"] for answer in record["answers"].values()}
    best = frozenset((i, 0) for i, row in enumerate(rows) if row["name"] in chosen)
    control = f"a window of the last {trained:,} tokens by the model as it is has {number(record['window_perplexity'])}"
    measured = Table(
        f"Methods at {record['target_length']:,} tokens",
        ["method", *(f"ppl {length:,}" for length in reversed(lengths)), f"price {trained:,}", "passkeys"],
        [
            [
                row["name"],
                *(number(_at(row, length)["ppl"]) for length in reversed(lengths)),
                f"{row['price']['change']:+.1%}",
                f"{row['passkey']['num_correct']}/{row['passkey']['num_trials']}",
            ]
            for row in rows
        ],
        best=best,
        caption=f"ppl: perplexity of the same tokens with that much text before them, lower is better ({control}). "
        f"price: its change within the trained {trained:,} tokens. passkeys: hidden numbers that were found.",
    )
    engines = Table(
        "What reads it",
        ["method", "serving engines", "put aside for"],
        [[row["name"], _readers(row), _aside(row)] for row in rows],
        best=best,
        left=frozenset({1, 2}),
        caption=f"{record['num_places']} places of {record['data']['source']} were measured; a method that is told "
        "apart from a better one is put aside. transformers reads all; remapping inside attention needs longext there. "
        f"Versions looked at: {', '.join(engine.title for engine in serving_engines())} (docs/engines.md).",
    )
    return [measured, engines]


def _aside(row: Mapping[str, Any]) -> str:
    if row["is_control"]:
        return "a control"
    return f"{row['beaten_by']}, after {row['num_places']} places" if row["beaten_by"] else "-"


def advice_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the picture by name: a row for each method, perplexity against the raw window, and passkeys."""
    from longext.report.plots import INK, new_figure, style

    rows = list(reversed(_sorted(record)))
    figure = new_figure(7.4, 1.8 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    target, trained = record["target_length"], record["trained_length"]
    for y, row in enumerate(rows):
        colour = _colour(row)
        _dot(left, y, row["against_window"], ("change", "change_low", "change_high"), colour)
        _dot(right, y, row["passkey"], ("accuracy", "low", "high"), colour)
    style(left, f"Perplexity at {target:,}", f"against a window of {trained:,} tokens, %", "")
    style(right, f"Passkeys at {target:,}", "found, %", "")
    left.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    if max(abs(row["against_window"]["change"]) for row in rows) > 1:
        left.set_xscale("symlog", linthresh=20)
        left.set_xticks([-10, 0, 10, 20, 100, 1000])
    left.xaxis.set_major_formatter(lambda value, _: f"{value:+,.0f}" if value else "0")
    right.set_xlim(-3, 103)
    for name, colour in _COLOURS.items():
        left.plot([], [], "o", color=colour, markersize=5, label=name)
    figure.legend(loc="outside lower center", ncols=len(_COLOURS), frameon=False, fontsize=9)
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    return {"advice": figure}


def _colour(row: Mapping[str, Any]) -> str:
    """Return the colour of a method, as the legend explains it."""
    if row["beaten_by"] or row["is_control"]:
        return _COLOURS["put aside, or a control"]
    return _COLOURS["serving engines read it" if row["is_checkpoint"] else "transformers only"]


def _dot(axes: Any, y: int, cell: Mapping[str, float], names: Sequence[str], colour: str) -> None:
    value, low, high = (100 * cell[name] if name in cell else None for name in names)
    if low is not None:
        axes.hlines(y, low, high, color=colour, alpha=0.45, linewidth=1.6)
    axes.plot([value], [y], "o", color=colour, markersize=5)
