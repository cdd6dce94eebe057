"""`longext search`: the spaces and the evolutions, samples, the journal, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import longext
from longext.data.documents import Document
from longext.errors import ConfigError
from longext.searching.samples import split_documents
from longext.searching.searcher import SEARCHERS, Candidate, Space, critical_pair
from longext.searching.searchers import _evolution, curve, longrope, longrope2


def space(**changes):
    pairs = changes.get("num_pairs", 32)
    yarn = Candidate(tuple(np.linspace(1, 8, pairs).tolist()), 1.2079)
    values = {"num_pairs": pairs, "factor": 8.0, "trained_length": 512, "critical_pair": 16, "yarn": yarn}
    more = {"most_temperature": float("inf"), "seed": 0, "evaluations": 40, "num_samples": 8}
    return Space(**{**values, **more, **changes})


@pytest.mark.parametrize(
    ("rotary_dim", "theta", "length", "expected"),
    [
        (128, 1e4, 4096, 46),  # Llama-2; these are the theoretical ones of arXiv 2502.20082
        (128, 5e5, 8192, 35),  # Llama-3-8B
        (128, 1e4, 8192, 50),  # Mistral
        (128, 1e6, 32768, 40),  # Qwen2.5
        (96, 1e4, 2048, 31),  # Phi-3-mini's effective window
        (64, 1e4, 512, 16),
    ],
)
def test_the_critical_pair_is_the_papers(rotary_dim, theta, length, expected):
    assert critical_pair(rotary_dim, theta, length) == expected


def test_the_curve_is_one_then_rises_to_its_plateau():
    factors = np.array(curve.curve(32, 16, 1.0, 8.0))
    assert factors[0] == 1 and (factors[16:] == 8).all() and (np.diff(factors) >= 0).all()
    assert factors[8] == pytest.approx(8**0.5)  # slope 1: LongRoPE2's NTK-like seed z^(j / cd)


def test_the_first_seed_of_longrope2_is_an_ntk_curve_of_the_factor():
    seeds = longrope2.ntk_seeds(space())
    assert len(seeds) == 8
    np.testing.assert_allclose(seeds[0][:15], 8 ** (np.arange(15) / 15))
    np.testing.assert_allclose(seeds[0][15:], 8 + 0.1 * np.arange(15, 32))


def test_longrope2_tries_as_many_as_its_paper():
    assert SEARCHERS["longrope2"].evaluations == 128 + 40 * (16 + 16) == 1408


def bowl(target):
    """A score that is lowest at `target`, and the candidates it was asked about."""
    asked = {}

    def ask(candidate, num_samples):
        asked[candidate.key] = candidate
        return float(np.abs(np.log(candidate.factors) - np.log(target)).mean()) + abs(candidate.attention_factor - 1.25)

    return ask, asked


@pytest.mark.parametrize("name", list(SEARCHERS))
def test_a_searcher_repeats_itself_and_keeps_to_its_evaluations(name):
    own = space()
    runs = []
    for _ in range(2):
        ask, asked = bowl(curve.curve(32, 14, 3.0, 9.0))
        runs.append((SEARCHERS[name].search(own, ask), list(asked)))
    assert runs[0] == runs[1]
    assert 30 < len(runs[0][1]) <= own.evaluations


def test_the_curve_is_found_where_it_is():
    ask, _ = bowl(curve.curve(32, 14, 3.0, 9.0))
    found = curve.search(space(evaluations=64), ask)
    assert ask(found, 8) < 0.5 * ask(space().yarn, 8)
    assert abs(found.point["critical_pair"] - 14) < 1.5


def test_the_temperature_stays_within_what_short_texts_may_pay():
    own = space(most_temperature=1.05)
    found = curve.search(own, bowl(curve.curve(32, 14, 3.0, 9.0))[0])
    assert 1 <= found.attention_factor <= 1.05


@pytest.mark.parametrize("module", [longrope, longrope2])
def test_an_evolution_stays_monotone_within_bounds_without_duplicates(module):
    ask, asked = bowl(curve.curve(32, 14, 3.0, 9.0))
    module.search(space(evaluations=300), ask)
    factors = np.array([candidate.factors for candidate in asked.values()])
    assert (np.diff(factors, axis=1) >= -1e-9).all() and factors.min() >= 1
    assert len(asked) == 300 == len({tuple(row) for row in factors.tolist()})
    if module is longrope2:
        low, high = longrope2.bounds(space())
        assert (factors >= low - 1e-9).all() and (factors <= high + 1e-9).all()


def test_more_evaluations_than_the_default_are_made(monkeypatch):
    ask, asked = bowl(curve.curve(32, 14, 3.0, 9.0))
    monkeypatch.setattr(longrope, "SIZES", _evolution.Evolution(population=8, generations=1, parents=4))
    longrope.search(space(evaluations=90), ask)
    assert len(asked) == 90


def test_documents_that_are_alike_are_split_all_the_same():
    one = Document("rows:1", "text")
    assert split_documents([one, one], None) == ([one], [one])


def test_mutations_and_crossovers_keep_the_order():
    rng = np.random.default_rng(0)
    one, other = np.sort(rng.uniform(1, 8, 32)), np.sort(rng.uniform(1, 8, 32))
    low, high = np.ones(32), np.full(32, 8.0)
    for _ in range(50):
        for child in (_evolution.mutate(one, low, high, 0.3, rng), _evolution.cross(one, other, 0.15, rng)):
            assert _evolution.is_allowed(child, low, high)


# --- the command on the bundled model --------------------------------------------------------------------------------

SETTINGS = {"target_length": 640, "evaluations": 5, "num_samples": 2, "num_trials": 1, "short_weight": 0.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("search") / "out"
    return longext.search("books-5m", output=directory, **SETTINGS)


def test_the_output_is_a_checkpoint_with_its_search_beside_it(found):
    names = {path.name for path in found.iterdir()}
    assert names >= {"result.json", "factors.json", "curve.png", "journal.jsonl", "table.md", "checkpoint", "run.json"}
    record = json.loads((found / "result.json").read_text())
    assert record["kind"] == "search" and record["critical_pair"] == 16
    assert [row["name"] for row in record["results"]] == ["yarn", "curve"]
    assert record["results"][0]["passkey"]["num_trials"] == 5
    rope = json.loads((found / "checkpoint" / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "longrope" and set(rope["short_factor"]) == {1.0}
    assert rope["long_factor"] == record["found"]["long_factor"]
    assert rope["attention_factor"] == record["found"]["attention_factor"]


def test_the_factors_make_the_same_checkpoint_with_extend(found, tmp_path):
    again = longext.extend("books-5m", "longrope", factors=str(found / "factors.json"), output=tmp_path / "again")
    one, other = (json.loads((path / "config.json").read_text()) for path in (found / "checkpoint", again))
    assert one == other


def test_a_search_that_was_killed_goes_on_to_the_same_result(found, tmp_path):
    """What a kill leaves of the journal: whole lines, and one that was cut off."""
    lines = (found / "journal.jsonl").read_bytes().splitlines(keepends=True)
    output = tmp_path / "resumed"
    journal = Path(f"{output}.search.jsonl")
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:9])
    longext.search("books-5m", output=output, **SETTINGS)
    first, second = (json.loads((path / "result.json").read_text()) for path in (found, output))
    assert first["found"] == second["found"] and first["results"] == second["results"]
    assert (output / "journal.jsonl").read_bytes() == b"".join(lines)
    assert not journal.exists()


def test_another_search_does_not_take_the_journal(found, tmp_path):
    output = tmp_path / "other"
    Path(f"{output}.search.jsonl").write_bytes((found / "journal.jsonl").read_bytes())
    with pytest.raises(ConfigError, match="other prompts"):
        longext.search("books-5m", output=output, **{**SETTINGS, "seed": 1})


def test_the_scored_text_has_neither_needle_nor_question():
    from longext.data.documents import load_documents
    from longext.searching.config import SearchConfig
    from longext.searching.samples import make_samples

    model = longext.load("books-5m", device="cpu")
    config = SearchConfig(model="books-5m", target_length=600, num_samples=4)
    documents = load_documents(config)
    text = model.encode(documents[0].text, add_bos=False)
    pairs = set(zip(text, text[1:], strict=False))
    for sample in make_samples(model, documents, 600, config)[::2]:
        ids = sample.input_ids[0]
        kept = [i + sample.first for i in range(len(sample.text)) if sample.text[i]]
        neighbours = [(int(ids[i]), int(ids[i + 1])) for i in kept if i + 1 in set(kept)]
        assert len(kept) > 150 and set(neighbours) <= pairs
        assert "pass key" not in model.decode([int(ids[i]) for i in kept])


@pytest.mark.parametrize(("settings", "message"), [({}, "target"), ({"target_length": 512}, "above the trained")])
def test_a_length_that_is_no_extension_is_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        longext.search("books-5m", output=tmp_path / "out", **settings)
