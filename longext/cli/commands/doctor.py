"""Look at this machine: versions, devices, kernels, folders, memory; which features work, and what the others lack.

Print it in a bug report. Exits 1 if something that is installed does not fit.

Example: longext doctor
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

from longext.cli.app import COMMANDS
from longext.cli.build import Command


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """`longext doctor`: it has no settings."""


def run(config: DoctorConfig, as_json: bool) -> None:
    """Examine, say the verdict, then the problems, then all that was found."""
    from longext.cli.output import show
    from longext.doctor import examine, verdict
    from longext.manifest import result_record
    from longext.report.commands.doctor import doctor_tables
    from longext.report.console import say, working

    with working("looking at this machine"):
        found = examine()
    said = verdict(found)
    if not as_json:
        for line in (said, *(f"Problem: {problem}." for problem in found["problems"])):
            say(line)
    show(result_record("doctor", verdict=said, **found), doctor_tables(found), as_json=as_json)
    if found["problems"]:
        raise typer.Exit(1)


COMMANDS.register("doctor", Command(config=DoctorConfig, run=run, has_recipe=False))
