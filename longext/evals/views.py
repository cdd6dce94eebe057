"""The language in which an evaluation says what its tables and pictures show; without torch or matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

Column = int | float | str
ANY = "*"
# When a table or a picture is made: always, for one result alone, for several results together.
ALWAYS, ONE, SEVERAL, NEVER = "always", "one", "several", "never"
_COUNT = "num_"
_WITH_PLAIN_INTERVAL = ("accuracy", "score", "mean", "value")  # what `low` and `high` in the same row are of


@dataclass(frozen=True)
class Score:
    """One number of a record.

    Attributes:
        name: its path in the record, as `eval diff` spells it: `results[length=512].ppl`.
        keys: the same without rows: ("results", "ppl").
        rows: the rows that hold it, the outermost first.
        parent: the mapping that holds it, with its interval and its counts.
    """

    name: str
    keys: tuple[str, ...]
    value: float
    rows: tuple[Mapping[str, Any], ...]
    parent: Mapping[str, Any]

    @property
    def is_count(self) -> bool:
        """True for a number of tokens, prompts or documents."""
        return self.keys[-1].startswith(_COUNT)

    def field(self, name: str) -> Any:
        """Return a field of the innermost row that has it, None if none has; "a.b" is field b of field a."""
        first, _, rest = name.partition(".")
        value = next((row[first] for row in reversed(self.rows) if first in row), None)
        for key in rest.split(".") if rest else ():
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the number, None if the record has none.

        Of a `value` with a `stderr` alone (older results of lm-eval) it is that of `stderr_interval`.
        """
        key = self.keys[-1]
        named = {**(self.parent.get("intervals") or {}), **(self.field("bucket_intervals") or {})}.get(key)
        if named is not None:
            return named[0], named[1]
        pairs = [(f"{key}_low", f"{key}_high"), *([("low", "high")] if key in _WITH_PLAIN_INTERVAL else [])]
        for low, high in pairs:
            if self.parent.get(low) is not None and self.parent.get(high) is not None:
                return self.parent[low], self.parent[high]
        if key != "value":
            return None
        from longext.evals.statistics import stderr_interval  # numpy: not for `--help`

        return stderr_interval(self.value, self.parent.get("stderr"), self.parent.get("num_documents"))


Reader = str | Callable[[Score], Any]  # a field of the score's rows, or what computes a value from the score


def read(reader: Reader, score: Score) -> Any:
    """Return what a reader finds for a score."""
    return score.field(reader) if isinstance(reader, str) else reader(score)


def thousands(column: Column) -> str:
    """Return a column as text: 4096 as "4,096"."""
    return column if isinstance(column, str) else f"{column:,}"


class Detail(NamedTuple):
    """A further column that the table of a single result has.

    Attributes:
        form: how its value is written: a format string, or what returns the text; None is always "-".
    """

    heading: str
    reader: Reader
    form: str | Callable[[Any], str] = "{}"

    def text(self, score: Score) -> str:
        """Return the cell of a score."""
        value = read(self.reader, score)
        if value is None:
            return "-"
        return self.form.format(value) if isinstance(self.form, str) else self.form(value)


@dataclass(frozen=True)
class View:
    """One table and picture of a section.

    Attributes:
        of: path of the numbers in the record, without rows: "results.ppl"; "*" stands for any key.
        unit: how the numbers are written; see `report.report_tables`.
        lower_is_better: None if nothing is best; a row's own `higher_is_better` has precedence.
        columns, heading, spell: what each column is, what columns are called, and how one is written.
        panel, panel_name: the block of rows that a score belongs to, and what blocks are: tasks.
        variant: what tells rows of one result apart.
        name: ends its file's name; "" for a section's first.
        where: fields that a score's rows must have.
        lone: a column that says nothing of a panel if it is the only one.
        pooled: over all tasks of a result, so shown only if results have the same tasks.
        table, picture: when they are made: `ALWAYS`, `ONE` (for one result alone), `SEVERAL` or `NEVER`.
        exact: numbers of a machine, which are no samples of anything and need no interval to be told apart.
        value, details: of a single result's table with a row for each number: its heading, further columns.
        per_cell: (what, its field): a count behind each number, for the caption of a single result: ("prompts", ...).
        note: of a single result's table, in its caption.
    """

    title: str
    _: KW_ONLY
    of: str
    unit: str = "share"
    lower_is_better: bool | None = False
    columns: Reader = "length"
    heading: str = "length"
    spell: Callable[[Column], str] = thousands
    panel: Reader | None = None
    panel_name: str = "task"
    variant: Reader | None = None
    name: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    lone: str = ""
    pooled: bool = False
    table: str = ALWAYS
    picture: str = ALWAYS
    exact: bool = False
    value: str = "accuracy"
    details: tuple[Detail, ...] = ()
    per_cell: tuple[str, str] | None = None
    note: str = ""

    @property
    def axis_name(self) -> str:
        """Return what the columns are, for an axis of numbers; "" for names."""
        return ""

    def shows(self, score: Score) -> bool:
        """True if a score is one of this view."""
        keys = tuple(self.of.split("."))
        if len(score.keys) != len(keys):
            return False
        same = all(mine in (ANY, key) for mine, key in zip(keys, score.keys, strict=True))
        return same and all(score.field(name) == value for name, value in self.where.items())

    def is_lower_better(self, score: Score) -> bool | None:
        """Return which way is better for this score, None if neither is."""
        higher = score.field("higher_is_better")
        return self.lower_is_better if higher is None else not higher


@dataclass(frozen=True)
class Lines(View):
    """A line for each result over columns that are numbers.

    Attributes:
        axis: what the columns are, with their unit.
        steps: each column is a range of positions, drawn as one step.
    """

    _: KW_ONLY
    axis: str
    steps: bool = False

    @property
    def axis_name(self) -> str:
        """Return what the columns are."""
        return self.axis


@dataclass(frozen=True)
class Bars(View):
    """A bar for each result in each column.

    Attributes:
        scale: what a number is measured in, if not all can be drawn on one axis.
        shade: the group of a single result's bars that share a colour: a category of tasks.
    """

    _: KW_ONLY
    scale: Reader | None = None
    shade: Reader | None = None


@dataclass(frozen=True)
class HeatMap(View):
    """A map for each result and panel: `rows` by columns, the number written in each cell."""

    _: KW_ONLY
    rows: Reader
    rows_name: str = ""
    spell_row: Callable[[Any], str] = str


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a report shows of one kind of result.

    Attributes:
        kind: of the records it shows, "" for `name`; with `protocol` (an id) if those of others have another section.
        picture: name of the picture's file for a single result; "" for `name`.
        must_agree: fields of `model` that must agree, besides protocol and data, for numbers to share a table.
        measured: record -> what else must agree, that its numbers or its model say.
        unknown: why results of this section cannot be told to be comparable, "" if their record says.
    """

    name: str
    title: str
    views: tuple[View, ...]
    kind: str = ""
    protocol: str = ""
    picture: str = ""
    must_agree: frozenset[str] = frozenset()
    measured: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda record: {}
    unknown: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)


TOKENS = "context length (tokens)"  # axes that evaluations share
PROMPT = "prompt length (tokens)"
SCORED = Detail("tokens scored", "num_tokens", "{:,}")
TOKENIZER = frozenset({"model.tokenizer_sha256"})  # a value per token is of that tokenizer's tokens


def either(word: str, other: str) -> Callable[[Any], str]:
    """Return the form of a detail that is true or false: `word`, or `other`."""
    return lambda value: word if value else other


# --- of scores by task, length and depth ------------------------------------------------------------------------------

MEAN_TOKENS = Detail("tokens", "num_tokens", "{:,.0f}")
_TRIALS = ("prompts", "num_trials")


def by_task(title: str, of: str, axis: str = PROMPT, **more: Any) -> Lines:
    """Return the view of scores by length, a block for each task."""
    return Lines(title, of=of, panel="task", axis=axis, per_cell=_TRIALS, **more)


def pooled(title: str, **more: Any) -> Lines:
    """Return the view of all tasks together; they are drawn task by task in another view."""
    return Lines(
        title, of="by_length.score", axis=PROMPT, name="all", pooled=True, picture=NEVER, per_cell=_TRIALS, **more
    )


def task_map(title: str, of: str, **more: Any) -> HeatMap:
    """Return the picture of a single result: tasks by lengths."""
    return HeatMap(title, of=of, rows="task", name="tasks", table=NEVER, picture=ONE, **more)


def depth_map(title: str, of: str, **more: Any) -> HeatMap:
    """Return the view of depths by lengths."""
    return HeatMap(title, of=of, name="depths", rows="depth", rows_name="depth", spell_row=_spell_depth, **more)


def _spell_depth(depth: float | None) -> str:
    return "random" if depth is None else f"{depth:.0%}"


def depths_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the depths of a record, which must agree for its scores to share a table with others."""
    depths = {row.get("depth") for row in record["results"]} - {None}
    return {"depths": sorted(depths)} if depths else {}
