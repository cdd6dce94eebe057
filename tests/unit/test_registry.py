"""Registries: entries by name, from a folder of files or registered at run time, and lookups that say what was meant."""

from __future__ import annotations

import sys

import pytest

from longext.errors import ConfigError
from longext.registry import Registry, did_you_mean


@pytest.fixture
def fruit(tmp_path, monkeypatch):
    """A registry of the package `fruit_basket`, which has three entries, one of which cannot be imported."""
    package = tmp_path / "fruit_basket"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "blood_orange.py").write_text('"""Red inside.\n\nMore."""\n\nFRUIT = "orange"\n')
    (package / "apple.py").write_text("FRUIT = 'pip'\n")
    (package / "rotten.py").write_text('"""Bad."""\n\nraise RuntimeError("imported")\n')
    (package / "_shared.py").write_text("raise RuntimeError('no entry')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("fruit", package="fruit_basket")
    for name in [name for name in sys.modules if name.startswith("fruit_basket")]:
        del sys.modules[name]


def test_names_and_summaries_come_from_the_folder_without_an_import(fruit):
    assert list(fruit) == ["apple", "blood-orange", "rotten"]
    assert (len(fruit), "blood-orange" in fruit, "_shared" in fruit) == (3, True, False)
    assert [fruit.summary(name) for name in fruit] == ["", "Red inside", "Bad"]
    assert not any(name.startswith("fruit_basket.") for name in sys.modules)


def test_a_module_is_imported_when_it_is_looked_up(fruit):
    assert fruit["blood-orange"] == "orange"
    assert "fruit_basket.blood_orange" in sys.modules
    assert "fruit_basket.apple" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        fruit["rotten"]


def test_registered_entries_follow_those_of_the_folder(fruit):
    fruit.register("quince", "hard", "For jelly.")
    assert list(fruit)[-1] == "quince"
    assert fruit.summary("quince") == "For jelly."
    assert (fruit["quince"], len(fruit)) == ("hard", 4)
    for name in ("quince", "apple"):
        with pytest.raises(AssertionError):
            fruit.register(name, "again")


@pytest.mark.parametrize("look_up", [Registry.__getitem__, Registry.summary])
def test_a_miss_names_the_nearest_of_all(fruit, look_up):
    with pytest.raises(ConfigError, match="Unknown fruit 'aple'. Did you mean 'apple'\\? Available: apple, blood-oran"):
        look_up(fruit, "aple")


def test_a_registry_without_a_folder_keeps_the_order_of_registration():
    registry: Registry[int] = Registry("fruit")
    registry.register("pear", 1)
    registry.register("apple", 2)
    assert list(registry) == ["pear", "apple"]
    assert list(registry.items()) == [("pear", 1), ("apple", 2)]
    with pytest.raises(AssertionError):
        registry.register("pear", 3)


def test_did_you_mean_stays_silent_when_nothing_is_near():
    assert did_you_mean("zzz", ["apple"]) == "Available: apple."
