"""Serving engines: one table, held to the page that shows it and to what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from longext.attention.bands import REMAPS, SHARED
from longext.conversion.engines import ENGINES, KINDS, OTHER, REMAPPED, RIGHT, RUN, engine_notes, kind_of, readers
from longext.report.commands.engines import gguf_engine_table, methods_by_kind
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


def test_the_pages_have_the_tables():
    spec = importlib.util.spec_from_file_location("methods_benchmark", DOCS.parent / "benchmarks" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page, tables in module.pages().items():
        text = page.read_text(encoding="utf-8")
        for table in tables:
            assert table.to_markdown() in text, "python benchmarks/methods.py --write puts it there"


def test_every_method_was_run_in_llama_cpp_as_the_page_says():
    """Static methods give the perplexity and greedy text of transformers; what follows the length is refused."""
    file = DOCS / "results" / "engines" / "llama-cpp-python-0.3.36.json"
    record, page = json.loads(file.read_text(encoding="utf-8")), (DOCS / "engines.md").read_text(encoding="utf-8")
    assert gguf_engine_table(record).to_markdown() in page, "report.commands.engines.gguf_engine_table makes it"
    run = [row for row in record["results"] if "refused" not in row]
    assert {row["setting"].partition(",")[0] for row in record["results"]} >= set(extension_methods())
    for row in run:
        assert row["ppl_llama_cpp"] == pytest.approx(row["ppl_transformers"], rel=1e-4), row
        assert row["same_tokens"] == record["new_tokens"], row
    refused = {row["setting"] for row in record["results"] if "refused" in row}
    assert refused == {"dynamic", "longrope, factors 1 up to L"}


def test_the_rope_of_a_server_was_told_as_the_page_says():
    record = json.loads((DOCS / "results" / "engines" / "endpoint.json").read_text(encoding="utf-8"))
    assert all(row["found"] == row["applied"] for row in record["results"])
    assert f"{record['right']} of {record['of']}" in (DOCS / "engines.md").read_text(encoding="utf-8")


def test_every_parameter_of_a_remapping_is_documented():
    text = (DOCS / "methods.md").read_text(encoding="utf-8").split("\n## Position remapping\n")[1].split("\n## ")[0]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) - {"--method"} == set(REMAPS)
    for name in REMAPS:
        for parameter in REMAPS[name].parameters:
            assert f"`{parameter.name}`" in rows[name], (name, parameter.name)
    assert all(f"`{parameter.name}`" in text for parameter in SHARED)


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
