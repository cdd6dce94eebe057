"""Every command computes what it computed before it was restructured, and is spelled as it was; see tests/golden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden.cases import CASES, arguments_of, with_needs
from golden.inputs import write_inputs
from golden.interface import parse, spellings, stored_commands, stored_options
from golden.records import RECORDS, differences, leftovers, normalise


class Folder:
    """The folder of all cases. Each runs once, when it or one that needs it is tested."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left: dict[str, dict] = {}
        write_inputs(path)

    def leftovers_of(self, name, run):
        for needed in with_needs(name):
            if needed not in self.left:
                result = run(*arguments_of(needed))
                assert result.exit_code == CASES[needed].code, f"{needed}: {result.output}"
                self.left[needed] = leftovers(self.path, needed, result.stdout)
        return self.left[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("golden") / "work")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", CASES)
def test_a_command_leaves_what_it_left_before(run, folder, monkeypatch, name):
    monkeypatch.chdir(folder.path)
    stored = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    found = list(differences(stored, normalise(folder.leftovers_of(name, run))))
    assert not found, "\n".join([f"longext {CASES[name].command}", *found])


def test_every_record_is_of_a_case():
    assert {path.stem for path in RECORDS.iterdir()} == set(CASES)


def test_no_option_or_argument_is_gone():
    now = spellings()
    for name, stored in stored_options().items():
        assert name in now
        assert set(stored["options"]) <= set(now[name]["options"]), name
        assert stored["arguments"] == now[name]["arguments"], name


@pytest.mark.parametrize("line", stored_commands())
def test_a_command_line_of_the_documentation_parses(line):
    assert parse(line).params
