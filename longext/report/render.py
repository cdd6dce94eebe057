"""Tables and pictures of results, the same for one result, a comparison and a report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.report.build import Report, build_report
from longext.report.find import Result
from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rendered:
    """What is shown of results; made when it is asked for."""

    report: Report

    def tables(self) -> list[Table]:
        """Return the tables of all sections."""
        from longext.report.report_views import report_tables

        return report_tables(self.report)

    def figures(self) -> dict[str, Figure]:
        """Return the pictures by file name."""
        from longext.report.report_figures import report_figures

        return {name: figure for figures in report_figures(self.report).values() for name, figure in figures.items()}


def render(name: str, record: dict[str, Any], config: Any) -> Rendered:
    """Return what is shown of one result; `name` is its directory."""
    result = Result(name=name, file=Path(name) / "result.json", record=record, config=dataclasses.asdict(config))
    return Rendered(build_report([result], []))
