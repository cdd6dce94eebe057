"""Tables and pictures of results, the same for one result, a comparison and a report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from longext.report.build import Report, build_report
from longext.report.find import Result
from longext.report.layout import report_tables
from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.report.draw import Picture


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


def render(name: str, record: dict[str, Any], config: Any) -> Rendered:
    """Return what is shown of one result; `name` is its directory, `config` the dataclass of its settings."""
    return Rendered(build_report([Result(name=name, record=record, config=dataclasses.asdict(config))]))
