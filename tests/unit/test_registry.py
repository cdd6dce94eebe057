"""Registries: entries of a folder or registered at run time, imported when used; a miss says what was meant."""

from __future__ import annotations

import sys

import pytest

from longext.errors import ConfigError
from longext.registry import Registry, did_you_mean

BASKET = {
    "__init__": "from longext.registry import Registry\nFRUIT = Registry('fruit', 'fruit_basket', order=['pear'])\n",
    "blood_orange": '"""Red inside.\n\nMore."""\nfrom fruit_basket import FRUIT\nFRUIT.register(\'blood-orange\', 1)\n',
    "apple": "from fruit_basket import FRUIT\nFRUIT.register('apple', 'green', 'For cider.')\n",
    "pear": '"""Soft."""\n',
    "rotten": '"""Bad."""\nraise RuntimeError("imported")\n',
    "_shared": "raise RuntimeError('no entry')\n",
}


@pytest.fixture
def fruit(tmp_path, monkeypatch):
    """The registry of a folder with four entries, two of which cannot be used."""
    (tmp_path / "fruit_basket").mkdir()
    for name, text in BASKET.items():
        (tmp_path / f"fruit_basket/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import fruit_basket

    yield fruit_basket.FRUIT
    for name in [name for name in sys.modules if name.startswith("fruit_basket")]:
        del sys.modules[name]


def test_names_and_summaries_come_from_the_folder_without_an_import(fruit):
    assert list(fruit) == ["pear", "apple", "blood-orange", "rotten"]
    assert (len(fruit), "blood-orange" in fruit, "_shared" in fruit, "-shared" in fruit) == (4, True, False, False)
    assert [fruit.summary(name) for name in fruit] == ["Soft", "", "Red inside", "Bad"]
    assert not any(name.startswith("fruit_basket.") for name in sys.modules)


def test_a_module_is_imported_when_it_is_looked_up(fruit):
    assert (fruit["blood-orange"], fruit.summary("blood-orange")) == (1, "Red inside")
    assert "fruit_basket.apple" not in sys.modules
    assert (fruit["apple"], fruit.summary("apple")) == ("green", "For cider.")
    with pytest.raises(RuntimeError, match="imported"):
        fruit["rotten"]
    with pytest.raises(AssertionError, match="fruit_basket.pear does not register the fruit 'pear'"):
        fruit["pear"]


def test_entries_come_and_go_at_run_time(fruit):
    fruit.register("quince", "hard", "For jelly.")
    assert (list(fruit)[-1], fruit["quince"], fruit.summary("quince")) == ("quince", "hard", "For jelly.")
    with pytest.raises(AssertionError, match="twice"):
        fruit.register("quince", "again")
    fruit.unregister("quince")
    assert "quince" not in fruit


def test_a_miss_names_the_nearest_of_all(fruit):
    with pytest.raises(ConfigError, match="Unknown fruit 'aple'. Did you mean 'apple'\\? Available: apple, blood-oran"):
        fruit["aple"]


def test_a_registry_without_a_folder_keeps_the_order_of_registration():
    registry: Registry[int] = Registry("fruit")
    registry.register("pear", 1)
    registry.register("apple", 2)
    assert (list(registry), registry.values(), len(registry)) == (["pear", "apple"], [1, 2], 2)


def test_did_you_mean_stays_silent_when_nothing_is_near():
    assert did_you_mean("zzz", ["apple"]) == "Available: apple."
