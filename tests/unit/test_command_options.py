"""Commands follow from their settings: flags, defaults, bounds, help; recipes are for their own command."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from advice import commands
from contributing import added_file

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import ConfigError
from longext.evals.base import EVALS
from longext.settings import build_config, option, option_of, shipped_recipes

TOY = added_file("longext/cli/commands/hello.py")


def configs():
    named = {name: COMMANDS[name] for name in COMMANDS}
    return {name: command.config for name, command in named.items()} | {f"eval {name}": EVALS[name] for name in EVALS}


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_has_help(name):
    for param in commands()[name].params:
        assert param.help or param.name == "help", param.name


@pytest.mark.parametrize("name", sorted(configs()))
def test_every_setting_is_a_flag_with_help_or_bounded(name):
    for field in dataclasses.fields(configs()[name]):
        declared = option_of(field)
        assert declared.text or not declared.is_flag, field.name


def test_the_default_in_the_help_is_the_one_that_is_used(run):
    shown = " ".join(run("eval", "ppl", "--help").output.split())
    assert "[default: 512,1024,2048,4096]" in shown
    assert "--num-buckets <int> Position buckets (positional). [default: 16]" in shown


def test_bounds_hold_for_flags_recipes_and_set(run):
    for args in (("--num-buckets", 0), ("--set", "num_buckets=0")):
        result = run("eval", "ppl", "books-5m", *args)
        assert result.exit_code == 2
        assert "`num_buckets` must be >= 1, got 0" in result.stderr


def test_all_missing_settings_are_named_at_once():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two:
        a: str = option(help="One.")
        b: int = option(help="Another.")

    Two.__annotations__ = {"a": str, "b": int}
    with pytest.raises(ConfigError, match="Missing: a, b"):
        build_config(Two, None, [], {})


def test_a_command_names_all_that_it_needs_at_once(run):
    assert "Missing: model, data, output. Give them" in run("finetune").stderr
    assert "Missing: adapter, output. Give them" in run("merge").stderr
    assert "Missing: model. Give it" in run("eval", "ppl").stderr


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A command in a file of its own, as one in cli/commands/ is."""
    (tmp_path / "hello.py").write_text(TOY)
    package = sys.modules["longext.cli.commands"]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield
    COMMANDS.unregister("hello")
    sys.modules.pop("longext.cli.commands.hello")


def test_a_command_is_one_file(toy, run, monkeypatch):
    assert "hello" in run("--help").output
    assert "Say hello" in run("--help").output
    shown = " ".join(run("hello", "--help").output.split())
    assert "How often. [default: 1]" in shown
    assert "Tone: warm, cool. [default: warm]" in shown
    assert run("hello", "Ada", "--times", 2).output == "hello Ada, warm\n" * 2
    assert "`times` must be <= 3, got 9" in run("hello", "Ada", "--times", 9).stderr
    assert "Did you mean 'hello'" in run("helo").stderr


def test_the_shell_completes_commands_and_names():
    def complete(line):
        words = {"_LONGEXT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        command = [sys.executable, "-c", "from longext.__main__ import main; main()"]
        result = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True, check=False)
        return result.stdout.split()

    assert "extend" in complete("longext ext")
    assert "ppl" in complete("longext eval p")
    assert "positional" in complete("longext eval ppl --protocol pos")


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_a_recipe_of_another_command_is_refused(recipe, run):
    other = "finetune" if not recipe.startswith("finetune/") else "compress-train"
    result = run(other, "-c", recipe, "--dry-run") if other == "finetune" else run(other, "-c", recipe)
    assert result.exit_code == 2
    assert f"not of `longext {other}`" in result.stderr


def test_a_recipe_without_a_first_line_of_ours_is_anyone_s(tmp_path, run):
    (tmp_path / "mine.yaml").write_text("model: books-5m\nmethod: yarn\nfactor: 8\n")
    assert run("extend", "-c", "mine.yaml", "--dry-run").exit_code == 0


def test_finetune_says_in_its_help_that_data_must_be_given(run):
    shown = " ".join(run("finetune", "--help").output.split())
    assert (
        "--data <str> Text file, folder, .jsonl, .parquet, Hub dataset id, or sample (bundled story); required."
        in shown
    )
    assert run("finetune", "books-5m", "-o", "out").exit_code == ConfigError.exit_code


def test_recipes_are_listed_shown_and_copied(run, tmp_path):
    assert "extend/books-5m-4k-yarn" in run("recipes").output
    shown = run("recipes", "show", "extend/books-5m-4k-yarn").output
    assert shown.startswith("# longext extend -c")
    assert run("recipes", "copy", "extend/books-5m-4k-yarn", "mine.yaml").exit_code == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    assert "exists already" in run("recipes", "copy", "extend/books-5m-4k-yarn", "mine.yaml").stderr
    assert "Did you mean" in run("recipes", "show", "extend/books-5m-4k-yar").stderr
    assert "list, show or copy" in run("recipes", "remove").stderr


def test_extend_names_its_output(run, tmp_path):
    result = run("extend", "books-5m", "--method", "yarn", "--factor", 8, "--no-check")
    assert "Wrote books-5m-yarn-8x" in result.output
    assert (tmp_path / "books-5m-yarn-8x" / "config.json").is_file()


def test_command_is_what_a_registry_holds():
    assert all(isinstance(command, Command) for command in COMMANDS.values())
