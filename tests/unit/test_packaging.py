"""What is published: packages, their page on an index, workflows and the action."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from golden.interface import command_lines, parse

import longext

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
SPEC = importlib.util.spec_from_file_location("packages", ROOT / "benchmarks" / "packages.py")
packages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(packages)

FLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = ROOT / "action.yml"
PINNED = re.compile(r"[\w.-]+/[\w./-]+@(v\d+(\.\d+)*|[0-9a-f]{40})")

pytestmark = pytest.mark.skipif(not ACTION.is_file(), reason="not a checkout")


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path):
    content = load(path)
    if "runs" in content:
        return content["runs"]["steps"]
    return [step for job in content["jobs"].values() for step in job["steps"]]


def scripts(path):
    return [step["run"] for step in steps(path) if "run" in step]


def test_there_are_workflows():
    assert [path.stem for path in FLOWS] == ["ci", "release", "weekly"]


@pytest.mark.parametrize("path", [*FLOWS, ACTION], ids=lambda path: path.name)
def test_every_action_is_pinned_and_every_step_does_something(path):
    for step in steps(path):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert PINNED.fullmatch(step["uses"]), step["uses"]
        elif path == ACTION:
            assert step["shell"] == "bash"


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.name)
def test_workflows_say_when_they_run_and_what_they_may(path):
    content = load(path)
    assert content[True], "YAML reads `on` as true"
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["runs-on"]


@pytest.mark.parametrize("path", [*FLOWS, ACTION], ids=lambda path: path.name)
def test_what_others_write_is_no_part_of_a_script(path):
    """An input or a branch name inside a script would be run as shell: they go through the environment."""
    assert not [script for script in scripts(path) if "${{" in script]


@pytest.mark.parametrize("path", [*FLOWS, ACTION], ids=lambda path: path.name)
def test_commands_and_files_of_the_scripts_exist(path):
    from longext.cli.app import COMMANDS

    for script in scripts(path):
        for line in command_lines(f"```\n{script}\n```"):
            words = line.split()
            assert words[1] in COMMANDS, line
            if "$ARGS" in words:  # what the user's workflow gives it
                continue
            assert parse(line.partition("||")[0]), line
        for name in re.findall(r"\b((?:benchmarks|tests)/[\w/.-]+\.py)\b", script):
            assert (ROOT / name).is_file(), name
        for target in re.findall(r"^make (.+)$", script, re.MULTILINE):
            rules = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(f"\n{name}:" in rules for name in target.split()), target


def test_the_matrix_has_every_python_and_the_oldest_packages_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matrix = load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    listed = {text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text}
    assert set(matrix["python"]) == listed
    (last,) = matrix["include"]
    oldest = dict(pair.split("==") for pair in f"{last['torch']} {last['packages']}".split())
    lowest = {}
    for requirement in project["optional-dependencies"]["train"]:
        name, version = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        lowest[name] = version
    assert oldest == {name: f"{lowest[name]}.0" for name in oldest}
    assert {"torch", "transformers", "peft"} <= set(oldest)


def test_the_inputs_of_the_action_are_those_it_reads():
    content = load(ACTION)
    read = set(re.findall(r"inputs\.([\w-]+)", ACTION.read_text(encoding="utf-8")))
    assert read == set(content["inputs"])
    for name, entry in content["inputs"].items():
        assert entry["description"], name
        assert entry.get("required") or "default" in entry, name


def test_an_index_gets_a_readme_without_relative_links():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in TOOL["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert re.match(r"https?://|#", link), link
        own = re.match(r"https://(?:raw\.githubusercontent|github)\.com/longext/longext/(?:blob/)?main/([^#]+)", link)
        assert own is None or (ROOT / own[1]).exists(), link
    assert "](https://raw.githubusercontent.com/longext/longext/main/docs/images/" in text


def test_the_source_archive_holds_what_a_reader_needs():
    included = TOOL["hatch"]["build"]["targets"]["sdist"]["include"]
    found = [path for pattern in included for path in ROOT.glob(pattern)]
    assert {path.name for path in found} >= {name for name in included if "*" not in name}
    files = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    names = [file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts]
    wanted = [name for name in packages.IN_SDIST if name != "PKG-INFO"]  # the build writes it
    assert list(packages.problems(names, wanted)) == []


def test_missing_and_superfluous_files_of_a_package_are_named(tmp_path):
    wheel = tmp_path / "longext-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*packages.IN_WHEEL[1:], "longext/__pycache__/x.pyc", "results/x/result.json"):
            archive.writestr(name, "")
    assert packages.check(wheel) == [
        "longext/__main__.py is missing",
        "longext/__pycache__/x.pyc does not belong there",
        "results/x/result.json does not belong there",
    ]


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert longext.__version__ == version("longext")
    assert re.match(r"\d+\.\d+", TOOL["hatch"]["version"]["fallback-version"])


@pytest.mark.slow
@pytest.mark.network
def test_both_packages_can_be_built_and_hold_what_they_should(tmp_path):
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "packages.py"), str(tmp_path)], check=True)
