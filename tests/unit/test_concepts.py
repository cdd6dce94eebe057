"""Plain words: `--explain` behind errors, and what `inspect` says in sentences."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import longext
from longext.concepts import CONCEPTS
from longext.report.commands.model import dimension_table, in_sentences
from longext.rope.analysis import dimension_rows
from longext.rope.spec import RopeSpec

ASKS = {
    "factor": ("extend", "books-5m", "--method", "yarn"),
    "method": ("inspect", "books-5m", "--factor", 2),
    "trained length": ("extend", "books-5m", "--method", "yarn", "--target-length", 100),
}


@pytest.mark.parametrize("concept", ASKS)
def test_a_paragraph_follows_an_error_only_where_it_is_asked_for(run, concept, monkeypatch):
    line = run(*ASKS[concept])
    assert line.exit_code == 2
    assert len(line.stderr.splitlines()) == 1
    explained = run(*ASKS[concept], "--explain")
    assert explained.exit_code == 2
    first, rest = explained.stderr.split("\n", 1)
    assert f"{first}\n" == line.stderr
    assert " ".join(rest.split()) == CONCEPTS[concept]
    assert max(map(len, rest.splitlines())) <= 80
    monkeypatch.setenv("LONGEXT_EXPLAIN", "1")
    assert run(*ASKS[concept]).stderr == explained.stderr


def test_errors_that_are_about_no_concept_stay_one_line(run):
    result = run("extend", "nosuch-model", "--method", "yarn", "--factor", 2, "--explain")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_every_concept_that_an_error_names_is_explained():
    named = set()
    for path in Path(longext.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "about":
                named.add(node.args[0].value)
    assert named and named <= set(CONCEPTS)


def test_inspect_counts_the_pairs_that_come_to_new_angles(run):
    """Linear interpolation maps the target onto the trained window: no slow pair goes beyond what training showed."""
    plain = RopeSpec(method="none", rope_theta=10000.0, rotary_dim=64, original_max_position_embeddings=512)
    for method, unseen in (("linear", "none comes to a new angle"), ("ntk", "15 still come to new angles")):
        spec = RopeSpec(
            method=method, factor=8.0, rope_theta=10000.0, rotary_dim=64, original_max_position_embeddings=512
        )
        text = " ".join(in_sentences(dimension_rows(plain, spec, 4096), "books-5m", 512, spec))
        assert "16 of them turn so slowly" in text
        assert unseen in text
        assert "for 4,096 tokens" in text
    long = RopeSpec(method="none", rope_theta=1e7, rotary_dim=128, original_max_position_embeddings=131072)
    rows = dimension_rows(long, replace(long, method="yarn", factor=8.0), 2**20)
    assert len(dimension_table(rows, 131072, 2**20, "RoPE of it").parts(80)) == 1
    shorter = ("--method", "yarn", "--target-length", 1024, "--set", "original_length=256", "--json")
    found = json.loads(run("inspect", "books-5m", *shorter).stdout)
    assert (found["trained_length"], found["method"]["factor"]) == (256, 4.0)
    assert found["dimensions"][0]["turns"] == pytest.approx(256 / (2 * math.pi))
    said = run("inspect", "books-5m").stdout
    assert said.startswith("books-5m was trained on 512 tokens at a time.")
    short = RopeSpec(method="none", rope_theta=10.0, rotary_dim=8, original_max_position_embeddings=512)
    assert "All of them made a full turn" in " ".join(in_sentences(dimension_rows(short, short, 512), "m", 512, None))
