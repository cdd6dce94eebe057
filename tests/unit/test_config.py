"""Recipes, --set and flags: who wins, what is an error, and the way back to YAML."""

from __future__ import annotations

import pytest

from longext.conversion.config import ExtendConfig
from longext.errors import ConfigError
from longext.evals.suites.ppl import Perplexity
from longext.report.config import CompareConfig
from longext.settings import build_config, find_recipe, to_recipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: a\nlengths: [512, 1024]\nstride: 64\n")
    return path


def test_precedence_is_defaults_recipe_set_typed(recipe):
    config = build_config(Perplexity, recipe, ["stride=32", "seed=7"], {"seed": 9})
    assert (config.model, config.lengths, config.stride, config.seed) == ("a", (512, 1024), 32, 9)
    assert config.protocol == "sliding"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lengths=512,1024", (512, 1024)), ("lengths=[8]", (8,)), ("lengths=64", (64,))],
)
def test_lists_are_spelled_as_on_the_command_line_or_as_yaml(setting, value):
    assert build_config(Perplexity, None, [setting], {"model": "m"}).lengths == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("strid=3", "unknown key 'strid'. Did you mean 'stride'?"),
        ("stride=many", "`stride` must be a whole number, got 'many'"),
        ("stride=2.5", "`stride` must be a whole number, got 2.5"),
        ("force=maybe", "`force` must be true or false, got 'maybe'"),
        ("lengths=[1, x]", "`lengths` must be a whole number, got 'x'"),
        ("stride", "key=value"),
        ("stride=[", "not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(ConfigError) as error:
        build_config(Perplexity, None, [setting], {"model": "m"})
    assert message in str(error.value)


def test_a_false_flag_overrides_a_true_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\npasskey: true\n")
    assert build_config(CompareConfig, tmp_path / "r.yaml", [], {"passkey": False}).passkey is False


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", ": : :\n"])
def test_a_recipe_that_is_not_a_mapping(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="r.yaml"):
        build_config(ExtendConfig, tmp_path / "r.yaml", [], {})


def test_to_recipe_comes_back_equal_but_for_force(tmp_path):
    config = ExtendConfig(model="m", method="yarn", factor=4.5, truncate=False, output="o", force=True)
    (tmp_path / "r.yaml").write_text(to_recipe(config))
    again = build_config(ExtendConfig, tmp_path / "r.yaml", [], {})
    assert again == ExtendConfig(model="m", method="yarn", factor=4.5, truncate=False, output="o")
    compare = CompareConfig(model="m", methods=("none", "dynamic:alpha=8"), depths=(0.5,))
    (tmp_path / "r.yaml").write_text(to_recipe(compare))
    assert build_config(CompareConfig, tmp_path / "r.yaml", [], {}) == compare


def test_a_recipe_holds_what_is_a_default_but_not_the_one_that_other_settings_imply(tmp_path):
    given = {"model": "m", "memory": "window:64", "protocol": "sliding", "lengths": (512, 1024, 2048, 4096)}
    config = build_config(Perplexity, None, [], given)
    (tmp_path / "r.yaml").write_text(to_recipe(config))
    assert build_config(Perplexity, tmp_path / "r.yaml", [], {}) == config


def test_a_shipped_recipe_is_found_by_name():
    assert find_recipe("extend/books-5m-4k-yarn").name == "books-5m-4k-yarn.yaml"
    with pytest.raises(ConfigError, match="Did you mean 'extend/books-5m-4k-yarn'"):
        find_recipe("extend/books-5m-4k-yarm")


@pytest.mark.parametrize(("written", "read"), [("off", "off"), ("'off'", "off"), ("auto", "auto"), ("4096", "4096")])
def test_off_is_a_word_where_it_is_a_choice(written, read):
    """YAML 1.1 reads a bare `off` as false."""
    from longext.training.config import FinetuneConfig

    settings = ["model=m", "data=d", f"sweep={written}"]
    assert build_config(FinetuneConfig, None, settings, {}).sweep == read
    with pytest.raises(ConfigError, match="`sweep` must be text"):
        build_config(FinetuneConfig, None, [*settings, "sweep=on"], {})
