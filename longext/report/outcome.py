"""Results as objects: tables, pictures and data frames of one evaluation, or of several side by side."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.errors import ConfigError
from longext.evals.runner import Measured
from longext.report.build import Report, build_report, csv_rows
from longext.report.find import Result as Record
from longext.report.layout import report_tables
from longext.report.results import Contents, write_results
from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from longext.report.draw import Picture

_WIDTH = 100  # characters of a table as text


@dataclass(frozen=True)
class Rendered:
    """What is shown of results; made when it is called for."""

    report: Report

    def tables(self) -> list[Table]:
        """Return the tables of all sections."""
        return report_tables(self.report)

    @cached_property
    def pictures(self) -> dict[str, Picture]:
        """The pictures by file name."""
        from longext.report.draw import report_pictures

        return report_pictures(self.report)

    def figures(self) -> dict[str, Figure]:
        """Return the figures by file name."""
        return {name: picture.figure for name, picture in self.pictures.items()}


def contents_of(measured: Measured, name: str) -> Contents:
    """Return what the results directory of an evaluation holds; `name` is the result's in titles."""
    settings = dataclasses.asdict(measured.task)
    rendered = Rendered(build_report([Record(name=name, record=measured.record, config=settings)]))
    return Contents(
        command=f"eval {measured.task.name}",
        config=measured.task,
        record=measured.record,
        tables=rendered.tables,
        figures=rendered.figures,
        extra=measured.files,
    )


class Tables(list[Table]):
    """Tables that print as text, and as HTML in a notebook."""

    def __repr__(self) -> str:
        from rich.console import Console

        # in a notebook rich would show the tables itself, a second time, or write colours that only a terminal reads
        console = Console(width=_WIDTH, file=io.StringIO(), highlight=False, force_jupyter=False, force_terminal=False)
        for part in (part for table in self for part in table.parts(_WIDTH)):
            console.print(part.to_rich(mark="*"))
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return "\n".join(map(_html, self))


def _html(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, number: int = -1) -> str:
        best = [(number, column) in table.best for column in range(len(cells))]
        texts = [
            f"<b>{escape(cell)}</b>" if is_best else escape(cell) for cell, is_best in zip(cells, best, strict=True)
        ]
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"

    rows = "".join(row(table.texts(number), "td", number) for number in range(len(table.rows)))
    caption = escape(f"{table.title}: {table.caption}" if table.caption else table.title)
    return f"<table><caption>{caption}</caption><thead>{row(table.columns, 'th')}</thead><tbody>{rows}</tbody></table>"


class _Shown:
    """What one result and several have in common: they are rendered."""

    @property
    def _records(self) -> list[Record]:
        raise NotImplementedError

    @cached_property
    def rendered(self) -> Rendered:
        """The tables and pictures, made when they are called for."""
        return Rendered(build_report(self._records))

    def table(self) -> Tables:
        """Return the tables; they print as text, and as HTML in a notebook."""
        return Tables(self.rendered.tables())

    def plot(self) -> Figure:
        """Return the first picture as a matplotlib figure.

        Raises:
            ConfigError: this evaluation has no picture.
        """
        figures = self.figures()
        if not figures:
            raise ConfigError("This evaluation has no picture.")
        return next(iter(figures.values()))

    def figures(self) -> dict[str, Figure]:
        """Return every picture by name."""
        return self.rendered.figures()

    def to_pandas(self) -> DataFrame:
        """Return every number as a row: label, score, task, length, ..., value, low, high.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("to_pandas needs pandas: pip install pandas.") from error
        header, *rows = csv_rows(self.rendered.report)
        return pandas.DataFrame(rows, columns=header)

    def report(self, file: str | Path) -> Path:
        """Write everything as one self-contained HTML page and return its path."""
        from longext.report.page import report_page

        path = Path(file)
        path.write_text(report_page(self.rendered), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class Result(_Shown):
    """One evaluation that was measured.

    Attributes:
        task: the evaluation with its settings.
        record: the JSON record, as result.json has it.
        notes: what a reader of the numbers has to know.
    """

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self.task = measured.task
        self.record = measured.record
        self.notes = list(measured.notes)

    @property
    def passed(self) -> bool:
        """True if every limit (`fail_under`, `fail_over`) was reached."""
        return all(verdict["passed"] for verdict in self.record.get("bars", ()))

    @property
    def _records(self) -> list[Record]:
        name = self.task.output or self.task.title
        return [Record(name=name, record=self.record, config=dataclasses.asdict(self.task))]

    def save(self, directory: str | Path, *, force: bool = False) -> Path:
        """Write result.json, tables, pictures, run.json and recipe.yaml into `directory`, as the command does."""
        path = Path(directory)
        task = dataclasses.replace(self.task, output=str(path), force=force)
        write_results(path, contents_of(dataclasses.replace(self._measured, task=task), self._records[0].name))
        return path


@dataclass(repr=False, eq=False)
class Comparison(_Shown):
    """Several results side by side.

    Attributes:
        results: one for each method and evaluation.
        record: the JSON record of `longext compare`, all results in one.
    """

    results: Sequence[Result]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def _records(self) -> list[Record]:
        return [record for result in self.results for record in result._records]

    @cached_property
    def rendered(self) -> Rendered:
        """The tables and pictures, made when they are called for."""
        return Rendered(build_report(self._records, [f"{name}: {why}" for name, why in self.failed.items()]))

    @property
    def failed(self) -> dict[str, str]:
        """The methods that failed, with the reason."""
        return {each["name"]: each["reason"] for each in self.record.get("failed", ())}

    def table(self) -> Tables:
        """Return the tables, with one of the methods that failed if there are any."""
        rows = [list(each) for each in self.failed.items()]
        more = [Table("Not measured", ["method", "reason"], rows, left=frozenset({1}))] if rows else []
        return Tables([*super().table(), *more])
