"""What `eval diff` calls a score, a difference and comparable."""

from __future__ import annotations

import copy
import json

import pytest

from longext.errors import DataError
from longext.report.commands.difference import compare_results
from longext.report.scores import read_result, scores_of


def record(**changes):
    row = {"start": 0, "length": 512, "ppl": 40.0, "ppl_low": 38.0, "nll": 3.7, "num_tokens": 99, "seconds": 1.5}
    base = {
        "schema": "longext.result/1",
        "kind": "perplexity",
        "command": "x",
        "versions": {"torch": "1"},
        "model": {"id": "m", "tokenizer_sha256": "t", "rope_parameters": {"factor": 1.0}},
        "protocol": {"id": "ppl/sliding", "stride": 256, "seed": 0},
        "data": {"source": "books/", "sha256": "d", "num_documents": 3},
        "results": [{**row, "per_document": [{"id": "a", "ppl": 1.0}]}, {**row, "length": 1024, "ppl": 50.0}],
    }
    return copy.deepcopy({**base, **changes})


def test_scores_are_named_by_their_row_and_hold_no_counts_times_or_intervals():
    assert scores_of(record()) == {
        "results[length=512].ppl": 40.0,
        "results[length=512].nll": 3.7,
        "results[length=1024].ppl": 50.0,
        "results[length=1024].nll": 3.7,
    }


def test_nested_rows_and_mappings_and_rows_of_equal_names():
    body = {
        "methods": [{"name": "yarn", "passkey": [{"length": 64, "depth": 0.5, "accuracy": 0.25}], "seconds": 3}],
        "results": [{"x": 1.0}, {"x": 2.0}],
        "averages": {"english": {"average": 30.0}, "chinese": None, "flag": True},
    }
    assert scores_of(record(**body)) == {
        "methods[yarn].passkey[length=64 depth=0.5].accuracy": 0.25,
        "results[#0].x": 1.0,
        "results[#1].x": 2.0,
        "averages.english.average": 30.0,
    }


def test_a_result_against_itself_has_no_difference():
    found = compare_results(record(), record(command="another"))
    assert {pair.difference for pair in found.scores} == {0.0}
    assert (found.fields, found.cautions, found.comparable) == ([], [], True)


def test_differences_and_what_only_one_has():
    other = record()
    other["results"][0]["ppl"] = 44.0
    other["results"][1]["length"] = 2048
    found = compare_results(record(), other)
    assert [(pair.score, pair.difference, pair.change) for pair in found.scores] == [
        ("results[length=512].ppl", 4.0, pytest.approx(0.1)),
        ("results[length=512].nll", 0.0, 0.0),
    ]
    assert found.only_a == ["results[length=1024].ppl", "results[length=1024].nll"]
    assert found.only_b == ["results[length=2048].ppl", "results[length=2048].nll"]


@pytest.mark.parametrize(
    ("part", "key", "value", "reason"),
    [("protocol", "id", "ppl/longlora", "the protocol id differs"), ("data", "sha256", "e", "the data hash differs")],
)
def test_not_comparable(part, key, value, reason):
    other = record()
    other[part][key] = value
    found = compare_results(record(), other)
    assert (found.comparable, found.reasons) == (False, [reason])
    assert [(own.field, own.b) for own in found.fields] == [(f"{part}.{key}", value)]


def test_data_that_one_result_lacks():
    assert compare_results(record(), record(data=None)).reasons == ["the data hash is missing in one"]
    assert compare_results(record(data=None), record(data=None)).comparable


def test_a_protocol_of_several_parts_is_compared_by_their_ids():
    parts = {"perplexity": {"id": "ppl/sliding"}, "passkey": {"id": "passkey/landmark"}}
    other = {**parts, "passkey": {"id": "passkey/yarn"}}
    assert compare_results(record(protocol=parts), record(protocol=parts)).comparable
    assert not compare_results(record(protocol=parts), record(protocol=other)).comparable


def test_cautions_name_what_the_rule_does_not_ask():
    other = record()
    other["protocol"]["stride"] = 8
    other["data"]["source"] = "elsewhere/"
    other["model"]["tokenizer_sha256"] = "u"
    other["results"][0]["num_tokens"] = 100
    found = compare_results(record(), other)
    assert found.comparable
    assert found.cautions[0] == "settings differ: protocol.stride"
    assert "tokenizers differ" in found.cautions[1]
    assert found.cautions[2] == "counts differ: num_tokens"


def test_a_score_that_differs_is_no_count():
    first, second = (
        record(results=[{"length": 9, "accuracy": n / 4, "num_correct": n, "num_trials": 4}]) for n in (1, 3)
    )
    assert compare_results(first, second).cautions == []
    second["results"][0]["num_trials"] = 8
    assert compare_results(first, second).cautions == ["counts differ: num_trials"]


def test_different_kinds_are_refused():
    with pytest.raises(DataError, match="'perplexity', B of kind 'passkey'"):
        compare_results(record(), record(kind="passkey"))


def test_reads_directories_and_files(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(record()))
    assert read_result(str(tmp_path)) == read_result(str(tmp_path / "result.json")) == record()
