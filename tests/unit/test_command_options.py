"""What `--help` shows is what a command does: defaults are those of its config, recipes are for their own command."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

import pytest
from advice import commands

from longext.errors import ConfigError
from longext.settings import shipped_recipes

COMMANDS = commands()


def configs_of(command):
    """The dataclasses that a command's module fills from its flags."""
    module = importlib.import_module(inspect.unwrap(command.callback).__module__)
    names = re.findall(r"config(?:_from|_with_memory)\(\s*ctx,\s*(\w+)", inspect.getsource(module))
    return [getattr(module, name) for name in set(names) if hasattr(module, name)]


def shown(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", COMMANDS)
def test_the_default_that_help_shows_is_the_config_s(name):
    command = COMMANDS[name]
    for config in configs_of(command):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for param in command.params:
            default = defaults.get(param.name, dataclasses.MISSING)
            if default is not dataclasses.MISSING and default != ():
                assert param.default == shown(default), param.name


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
    shown_help = run("finetune", "--help").output
    assert "Required: text file" in shown_help
    assert ConfigError.exit_code == run("finetune", "books-5m", "-o", "out").exit_code
