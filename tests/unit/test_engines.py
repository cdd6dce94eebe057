"""Serving engines: one table, held to the page that shows it and to what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longext.conversion.engines import ENGINES, KINDS, OTHER, REMAPPED, RIGHT, RUN, engine_notes, kind_of, readers
from longext.report.commands.engines import engine_tables, methods_by_kind
from longext.rope.spec import extension_methods

DOCS = Path(__file__).parents[2] / "docs"
MEASURED = {
    "linear": "linear",
    "ntk": "default",
    "ntk-by-parts": "llama3",
    "yarn": "yarn",
    "llama3": "llama3",
    "ntk-by-parts, code ramp": "yarn+attention",
    "yarn, paper ramp": "longrope-static",
}


def test_every_engine_says_something_of_every_kind():
    for engine in ENGINES:
        assert set(engine.readings) == set(KINDS), engine.name
        for reading in engine.readings.values():
            assert (reading.verdict == RIGHT) == (not reading.what), engine.name


def test_the_page_has_the_tables():
    page = (DOCS / "engines.md").read_text(encoding="utf-8")
    for table in engine_tables():
        assert table.to_markdown() in page, "python benchmarks/engines.py tables prints them"


@pytest.mark.parametrize("name", ["mlx-0.32.2", "transformers-4.57.6"])
def test_what_was_measured_is_what_the_table_says(name):
    record = json.loads((DOCS / "results" / "engines" / f"{name}.json").read_text(encoding="utf-8"))
    engine = next(each for each in ENGINES if f"{name}.json" in each.source)
    assert engine.version.endswith(record["version"])
    for row in record["results"]:
        if row["setting"] in MEASURED:
            reading = engine.reading(MEASURED[row["setting"]])
            assert reading.evidence == RUN
            assert reading.verdict == (RIGHT if row["largest_difference"] < 1e-3 else OTHER), row["setting"]


def test_every_method_is_written_as_a_kind_of_the_table():
    found = methods_by_kind()
    assert set(found) == set(KINDS)
    named = {name.split("`")[1] for names in found.values() for name in names}
    assert named == set(extension_methods())


def test_kinds_and_notes():
    assert kind_of({"rope_type": "yarn", "attention_factor": 1.0}) == "yarn+attention"
    assert kind_of({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}) == "longrope-static"
    assert kind_of({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}) == "longrope"
    assert "vLLM 0.33.0" in readers("yarn")
    assert not readers(REMAPPED)
    assert not engine_notes({"rope_type": "yarn"})
    (note,) = engine_notes({"rope_type": "dynamic"})
    assert "llama.cpp 0.3.36 ignores" in note
