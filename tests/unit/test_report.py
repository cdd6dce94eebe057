"""What `longext report` puts beside each other, keeps apart, marks and tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_records as made
from report_records import write

from longext.errors import DataError
from longext.report.build import build_report, csv_rows
from longext.report.commands.difference import compare_results
from longext.report.find import find_results, kinds, sections
from longext.report.layout import report_tables

DOCUMENTED = Path(__file__).parents[2] / "docs" / "results"


def report(tmp_path, **records):
    """Return the report on records by the name of their directory; a pair is (record, config of its run.json)."""
    for name, own in records.items():
        record, config = own if isinstance(own, tuple) else (own, None)
        write(tmp_path / name, record, config)
    return build_report(*find_results([str(tmp_path)]))


def shown(found, suite, view=""):
    """Return {(label, panel, column): (value, interval)} of a view, and the best of it."""
    cells = [
        cell
        for group in found.groups
        for own in group.shown
        if (group.section.name, own.view.name) == (suite, view)
        for cell in own.cells
    ]
    values = {(cell.label, cell.panel, cell.column): (cell.score.value, cell.score.interval()) for cell in cells}
    return values, {(cell.label, cell.panel, cell.column) for cell in cells if cell.is_best}


@pytest.mark.parametrize(
    ("record", "suite", "view", "expected"),
    [
        (made.perplexity(), "perplexity", "", {("m", "", 512): (40, (38, 43)), ("m", "", 1024): (20, (18, 23))}),
        (made.positions(), "positions", "", {("m", "", "1-256"): (3.5, None), ("m", "", "256-512"): (3.25, None)}),
        (
            made.memory_perplexity(),
            "memory-perplexity",
            "",
            {("m", "", 0): (30, (20, 40)), ("m", "", 512): (29, (20, 40))},
        ),
        (
            made.memory_perplexity(),
            "memory-perplexity",
            "controls",
            {("m", "no memory", n): (-0.125, (-0.25, 0)) for n in (0, 512)},
        ),
        (made.short(), "short-context", "", {("m", "", 256): (0.025, (0.01, 0.04))}),
        (made.effective(), "effective-length", "", {("m", "", n): (256, None) for n in ("effective", "unbroken")}),
        (made.effective(), "effective-length", "tried", {("m", "", 256): (0.9, (0.6, 1))}),
        (made.passkey(), "passkey", "", {("m", "", 512): (0.5, (0, 1))}),
        (
            made.needle("a", "b"),
            "needle",
            "",
            {("m", t, n): (s, (s / 2, 1)) for t in "ab" for n, s in ((512, 0.5), (1024, 0.25))},
        ),
        (
            made.needle("a", "b"),
            "needle",
            "all",
            {("m", "", 512): (0.5, (0.25, 1)), ("m", "", 1024): (0.25, (0.125, 1))},
        ),
        (made.needle("a"), "needle", "all", {}),
        (made.longeval(), "longeval", "", {("m", "lines", 200): (0.5, (0.25, 1)), ("m", "topics", 10): (1, (0.5, 1))}),
        (made.babilong(), "babilong", "all", {("m", "", n): (0.5, (0.25, 1)) for n in (0, 4000)}),
        (
            made.longbench(trec=63.5),
            "longbench",
            "",
            {("m", "english", "single"): (30.5, None), ("m", "english", "code"): (56, None)},
        ),
        (made.longbench(trec=63.5), "longbench", "tasks", {("m", "", "trec"): (63.5, None)}),
        (
            made.longbench_e(),
            "longbench-e",
            "",
            {("m", b, "single"): (v, None) for b, v in (("0-4k", 30), ("4-8k", 20))},
        ),
        (
            made.longbench_e(),
            "longbench-e",
            "tasks",
            {("m", "qasper", "0-4k"): (30, None), ("m", "qasper", "4-8k"): (20, None)},
        ),
        (
            made.reconstruction(),
            "reconstruction",
            "bleu",
            {("m + memory", c, 8): (0.5, (0.4, 0.6)) for c in ("text", "random")},
        ),
        (
            made.efficiency(),
            "efficiency",
            "prefill-seconds",
            {("full", "", 512): (0.5, None), ("uio 8x", "", 512): (0.25, None)},
        ),
        (
            made.longbench_lm_eval(trec=50.0),
            "longbench-lm-eval",
            "",
            {("m", "", "single"): (21.5, None)},
        ),
        (made.longbench_lm_eval(trec=50.0), "longbench-lm-eval", "tasks", {("m", "", "trec"): (50, None)}),
        (made.training(), "training", "perplexity", {("r", "", 512): (50, None), ("r", "", 1024): (51, None)}),
        (made.training("compress-train"), "training", "", {("r", "", "loss"): (3.5, None)}),
        (
            made.compare(),
            "perplexity",
            "",
            {
                ("none", "", 512): (41, (39, 44)),
                ("none", "", 1024): (20.5, (18.5, 23.5)),
                ("yarn 8x ramp=paper", "", 512): (42, (40, 45)),
                ("yarn 8x ramp=paper", "", 1024): (21, (19, 24)),
            },
        ),
        (
            made.compare(),
            "positions",
            "",
            {("none", "", "1-256"): (3.25, None), ("yarn 8x ramp=paper", "", "1-256"): (3.25, None)},
        ),
        (
            made.compare(),
            "passkey",
            "",
            {("none", "", 512): (0.5, (0, 1)), ("yarn 8x ramp=paper", "", 512): (0.5, (0, 1))},
        ),
    ],
)
def test_every_kind_shows_its_headline_numbers_with_their_intervals(tmp_path, record, suite, view, expected):
    values, _ = shown(report(tmp_path, r=record), suite, view)
    assert values == {
        key: (value, None if between is None else pytest.approx(between)) for key, (value, between) in expected.items()
    }


def test_the_interval_of_lm_eval_is_made_of_its_standard_error(tmp_path):
    values, _ = shown(report(tmp_path, r=made.harness()), "harness")
    assert values["m", "", "arc acc"] == (0.25, pytest.approx((0.25 - 0.0196, 0.25 + 0.0196), abs=1e-6))
    assert values["m", "", "wiki word_perplexity"][0] == 50


def test_every_kind_that_a_report_takes_is_tested_here():
    records = (made.perplexity, made.memory_perplexity, made.short, made.effective, made.passkey, made.longeval)
    records += (made.babilong, made.reconstruction, made.efficiency, made.harness, made.compare, made.training)
    known = {own()["kind"] for own in records} | {"needle", "longbench", "compress-train"}
    known |= {
        "ruler",
        "nolit",
        "mrcr",
        "graphwalks",
        "longbench2",
        "infinitebench",
    }  # drawn by the views of every question, as needle
    known |= {"longppl"}  # lines, as perplexity
    assert known == set(kinds())
    assert {"positions", "longbench-e", "longbench-lm-eval", "training"} | known - {
        "compare",
        "finetune",
        "compress-train",
    } == {section.name for section in sections()}


def test_the_unchanged_model_is_none_among_methods_and_else_called_by_its_name(tmp_path):
    memory = changed(made.perplexity(), "model", "memory", {"spec": "out/uio@8"})
    memory["model"]["id"] = "m + out/uio@8"
    assert labels(tmp_path / "1", a=made.perplexity(), b=memory) == ["m", "uio@8"]
    yarn = changed(made.perplexity(), "model", "rope_parameters", {"rope_type": "yarn", "factor": 4.0})
    assert labels(tmp_path / "2", a=made.perplexity(), b=yarn) == ["none", "yarn 4x"]


def test_the_price_is_the_change_at_the_longest_length_within_the_trained_one(tmp_path):
    group = report(tmp_path, a=made.compare()).groups[0]
    assert (group.price.length, group.trained_length) == (512, 512)
    assert group.price.changes == {"none": 0, "yarn 8x ramp=paper": pytest.approx(42 / 41 - 1)}
    assert report(tmp_path / "alone", a=made.perplexity()).groups[0].price is None


# --- the best ---------------------------------------------------------------------------------------------------------


def tied(found):
    return {
        (cell.label, cell.column) for own in found.groups for view in own.shown for cell in view.cells if cell.is_tied
    }


def test_the_best_is_apart_from_all_others_by_its_interval(tmp_path):
    # 40 (38 to 43) and 20 (18 to 23) against 60 (58 to 63) and 30 (28 to 33)
    found = report(tmp_path, a=made.perplexity(40.0), b=made.perplexity(60.0))
    assert shown(found, "perplexity")[1] == {("m (a)", "", n) for n in (512, 1024)} and not tied(found)
    first, second = made.passkey(0.5), made.passkey(0.75)
    first["by_length"][0] |= {"low": 0.4, "high": 0.6}
    second["by_length"][0] |= {"low": 0.61, "high": 0.9}
    found = report(tmp_path / "k", a=first, b=second)
    assert shown(found, "passkey")[1] == {("m (b)", "", 512)}


def test_results_whose_intervals_meet_share_the_lead(tmp_path):
    found = report(tmp_path, a=made.perplexity(40.0), b=made.perplexity(44.0), c=made.perplexity(80.0))
    assert shown(found, "perplexity")[1] == set()
    assert tied(found) == {(f"m ({name})", n) for name in "ab" for n in (512, 1024)}
    wilson = [made.passkey(value) for value in (0.17, 0.0)]  # 17 % (3 to 56) and 0 % (0 to 39)
    wilson[0]["by_length"][0] |= {"low": 0.03, "high": 0.56}
    wilson[1]["by_length"][0] |= {"low": 0.0, "high": 0.39}
    found = report(tmp_path / "k", a=wilson[0], b=wilson[1])
    assert shown(found, "passkey")[1] == set() and not tied(found)  # nothing is said of all


def test_no_result_is_best_across_base_models(tmp_path):
    other = made.perplexity(400.0)
    other["model"] |= {"tokenizer_sha256": "t", "num_parameters": 7}
    same = made.perplexity(60.0)
    for record in (own := made.perplexity(40.0), same):
        record["model"] |= {"num_parameters": 5}
    found = report(tmp_path, a=own, b=same, c=other)
    assert shown(found, "perplexity")[1] == {("m (a)", "", n) for n in (512, 1024)}
    assert "of each base model" in report_tables(found)[0].caption


def test_nothing_is_best_alone_or_among_equals(tmp_path):
    assert shown(report(tmp_path / "one", a=made.passkey()), "passkey")[1] == set()
    assert shown(report(tmp_path / "two", a=made.passkey(0.0), b=made.passkey(0.0)), "passkey")[1] == set()


def test_lm_eval_says_itself_which_way_is_better(tmp_path):
    worse = made.harness()
    worse["results"][0]["value"], worse["results"][1]["value"] = 0.125, 60.0
    _, best = shown(report(tmp_path, a=made.harness(), b=worse), "harness")
    assert best == {("m (a)", "", "arc acc"), ("m (a)", "", "wiki word_perplexity")}


def test_losses_of_two_objectives_are_two_columns(tmp_path):
    """S2-Attn in groups is not full attention; a record from before objectives were named says it by its settings."""
    attention = {"training": "s2", "group_size": 8192, "objective": "s2 attention in groups of 8,192"}
    runs = {"a": attention, "b": {"training": "s2", "group_size": 8192}, "c": {"training": "full", "group_size": None}}
    records = {name: made.training() for name in runs}
    for name, own in runs.items():
        records[name]["finetune"] = {**records[name].get("finetune", {}), "attention": own}
    values, _ = shown(report(tmp_path, **records), "training", "")
    assert {(label, column) for label, _, column in values} == {
        ("a", "s2 attention in groups of 8,192"), ("b", "s2 attention in groups of 8,192"), ("c", "full attention"),
    }  # fmt: skip


def test_training_runs_have_no_best(tmp_path):
    other = {**made.training(), "final_loss": 1.0}
    found = report(tmp_path, a=made.training(), b=other)
    assert shown(found, "training")[1] == set()
    assert len(found.groups) == 1


# --- what may stand in one table --------------------------------------------------------------------------------------


def changed(record, part, key, value):
    return {**record, part: {**record[part], key: value}}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("protocol", "stride", 64),
        ("protocol", "definition", "other windows"),
        ("data", "sha256", "e" * 64),
        ("data", "num_tokens", 901),
        ("data", "num_documents", 2),
        ("model", "tokenizer_sha256", "u"),
    ],
)
def test_what_must_agree_keeps_results_apart_and_is_named(tmp_path, part, key, value):
    other = changed(made.perplexity(44.0), part, key, value)
    found = report(tmp_path, a=made.perplexity(), b=other)
    first, second = found.groups
    assert (first.conflicts, first.labels, second.labels) == ([], ["m"], ["m"])
    named = [(own.field, own.here, own.there) for own in second.conflicts]
    assert named == [(f"{part}.{key}", value, made.perplexity()[part][key])]
    assert shown(found, "perplexity")[1] == set()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("protocol", "seed", 7), ("model", "dtype", "bfloat16"), ("versions", "torch", "3"), ("model", "device", "cuda")],
)
def test_what_may_differ_is_told(tmp_path, part, key, value):
    found = report(tmp_path, a=made.perplexity(), b=changed(made.perplexity(), part, key, value))
    (group,) = found.groups
    (caution,) = group.cautions
    before = made.perplexity()[part][key]
    assert (caution.field, caution.values) == (f"{part}.{key}", [(before, ["m (a)"]), (value, ["m (b)"])])


@pytest.mark.parametrize(
    ("part", "key", "value"), [("data", "source", "elsewhere/"), ("protocol", "reference", "x"), ("model", "id", "n")]
)
def test_places_and_prose_matter_not(tmp_path, part, key, value):
    (group,) = report(tmp_path, a=made.perplexity(), b=changed(made.perplexity(), part, key, value)).groups
    assert group.cautions == []


def test_a_passkey_of_one_key_that_does_not_say_so_is_not_beside_one_of_four(tmp_path):
    former, four, one = made.compare(), made.passkey(), made.passkey()
    four["protocol"]["num_needles"], one["protocol"]["num_needles"] = 4, 1
    sets = [own for own in report(tmp_path, a=former, b=four, c=one).groups if own.section.name == "passkey"]
    assert [(own.number, len(own.parts), own.agreed["protocol.num_needles"]) for own in sets] == [(1, 3, 1), (2, 1, 4)]
    assert [own.field for own in sets[1].conflicts] == ["protocol.num_needles"]


@pytest.mark.parametrize(("tokenizer", "sets"), [("t", 2), ("other", 1)])
def test_another_template_of_one_tokenizer_is_not_comparable(tmp_path, tokenizer, sets):
    first, second = made.needle("x"), made.needle("x")
    first["protocol"] |= {"template_sha256": "a" * 64, "prompts_sha256": "1" * 64}
    second["protocol"] |= {"template_sha256": "b" * 64, "prompts_sha256": "2" * 64}
    second["model"]["tokenizer_sha256"] = tokenizer
    found = report(tmp_path, a=first, b=second).groups
    assert len(found) == sets
    told = [own.field for own in (found[1].conflicts if sets == 2 else found[0].cautions)]
    assert ("protocol.template_sha256" in told) == (sets == 2)
    assert compare_results(first, second).reasons == (["another template"] if sets == 2 else [])


def test_a_field_that_a_result_does_not_record_is_told(tmp_path):
    silent = made.perplexity()
    del silent["protocol"]["stride"]
    (group,) = report(tmp_path, a=made.perplexity(), b=silent).groups
    (caution,) = group.cautions
    assert (caution.field, caution.is_missing, caution.values) == ("protocol.stride", True, [(None, ["m (b)"])])


def test_counts_that_differ_at_a_place_are_told(tmp_path):
    (group,) = report(tmp_path, a=made.passkey(trials=10), b=made.passkey(trials=40)).groups
    (caution,) = group.cautions
    assert (caution.field, caution.values) == ("num_trials", [(10, ["m (a)"]), (40, ["m (b)"])])


def test_timings_of_two_devices_are_not_compared(tmp_path):
    other = changed(made.efficiency(), "model", "device", "cuda")
    first, second = report(tmp_path, a=made.efficiency(), b=other).groups
    assert [own.field for own in second.conflicts] == ["model.device"]


def test_other_tasks_are_no_conflict_but_leave_no_common_mean(tmp_path):
    found = report(tmp_path, a=made.needle("x", "y"), b=made.needle("x", "z"))
    (group,) = found.groups
    assert group.cautions == []
    assert {panel for _, panel, _ in shown(found, "needle")[0]} == {"x", "y", "z"}
    assert shown(found, "needle", "all")[0] == {}


def test_a_task_on_other_rows_is_a_conflict(tmp_path):
    other = made.longbench(trec=50.0)
    other["data"]["sha256"]["trec"] = "i"
    _, second = report(tmp_path, a=made.longbench(trec=63.5), b=other).groups
    assert [own.field for own in second.conflicts] == ["data.sha256.trec"]


def test_published_answers_are_held_to_the_references_since_they_have_no_prompts(tmp_path):
    own, given, other = (made.longbench(trec=score) for score in (1.0, 2.0, 3.0))
    for record, rows, references in ((own, "h", "r"), (given, "i", "r"), (other, "j", "s")):
        record["data"] |= {"sha256": {"trec": rows}, "references_sha256": {"trec": references}}
    given["model"] = other["model"] = {"id": "published", "answers_from": "x/"}
    del given["protocol"]["max_length"]
    first, second = report(tmp_path, a=own, b=given, c=other).groups
    assert [(own.field, own.is_missing) for own in first.cautions] == [("protocol.max_length", True)]
    assert (first.labels, second.labels) == (["m", "published"], ["published"])
    assert [own.field for own in second.conflicts] == ["data.references_sha256.trec"]


def test_the_length_that_prompts_are_cut_to_is_told(tmp_path):
    own = changed(made.longbench(trec=63.5), "protocol", "truncation", "the middle goes")
    other = changed(changed(own, "protocol", "max_length", 31500), "protocol", "truncation", "none")
    (group,) = report(tmp_path, a=own, b=other).groups
    assert [own.field for own in group.cautions] == ["protocol.max_length", "protocol.truncation"]


def test_where_the_documents_of_a_task_lie_matters_not_but_their_hash_does(tmp_path):
    moved, other = made.harness(), made.harness()
    moved["data"]["tasks"]["arc"]["config"] |= {"dataset_path": "/c", "doc_to_text": "<function f at 0x9>"}
    other["data"]["tasks"]["arc"]["sha256"] = "i"
    first, second = report(tmp_path, a=made.harness(), b=moved, c=other).groups
    assert (len(first.parts), first.cautions) == (2, [])
    assert [own.field for own in second.conflicts] == ["data.tasks.arc.sha256"]


def other_depths(record):
    for row in record["results"]:
        row["depth"] = 0.25
    return record


def shorter(record):
    record["results"] = [row for row in record["results"] if row["length"] < 512]
    return record


def other_segment(record):
    return changed(record, "model", "compressor", {**record["model"]["compressor"], "segment": 64})


@pytest.mark.parametrize(
    ("record", "other", "field"),
    [
        (made.passkey(), other_depths(made.passkey()), "measured.depths"),
        (made.memory_perplexity(), shorter(made.memory_perplexity()), "measured.longest context"),
        (made.positions(), shorter(made.positions()), "measured.window"),
        (made.reconstruction(), other_segment(made.reconstruction()), "measured.segment"),
    ],
)
def test_what_only_the_numbers_or_the_model_say_must_agree_too(tmp_path, record, other, field):
    _, second = report(tmp_path, a=record, b=other).groups
    assert second.conflicts[0].field == field


def test_short_texts_against_another_base_are_apart(tmp_path):
    other = changed(made.short(), "base", "config_sha256", "another")
    _, second = report(tmp_path, a=made.short(), b=other).groups
    assert [own.field for own in second.conflicts] == ["base.config_sha256"]


def test_a_method_of_a_comparison_stands_beside_a_perplexity_of_its_own(tmp_path):
    found = report(tmp_path, a=made.compare(), b=made.perplexity(50.0))
    group = found.groups[0]
    assert group.labels == ["none (a)", "yarn 8x ramp=paper", "none (b)"]
    assert [own.field for own in group.cautions] == ["protocol.weighting"]  # such a comparison does not record it


# --- labels -----------------------------------------------------------------------------------------------------------


def labels(tmp_path, **records):
    return report(tmp_path, **records).groups[0].labels


def test_labels_say_model_method_and_memory(tmp_path):
    yarn = changed(made.perplexity(), "model", "rope_parameters", {"rope_type": "yarn", "factor": 4.0})
    memory = changed(made.perplexity(), "model", "memory", {"spec": "out/uio@8"})
    memory["model"]["id"] = "m + out/uio@8"
    other = changed(made.perplexity(), "model", "id", "owner/other")
    assert labels(tmp_path, a=yarn, b=memory, c=other) == ["m + yarn 4x", "m + uio@8", "other"]


def test_settings_say_the_method_that_the_rope_does_not(tmp_path):
    ntk = (made.perplexity(), {"method": "ntk", "factor": 8.0})
    plain = (made.perplexity(), {"method": None, "factor": None})
    assert labels(tmp_path, a=ntk, b=plain) == ["ntk 8x", "none"]


def test_one_model_goes_into_the_title_where_other_things_differ(tmp_path):
    found = report(tmp_path, a=(made.perplexity(), {"method": "ntk", "factor": 8.0}), b=made.perplexity())
    assert found.model == "m"
    assert report(tmp_path / "2", a=made.perplexity()).groups[0].labels == ["m"]


def test_equal_labels_get_their_directory_and_equal_names_more_of_their_path(tmp_path):
    assert labels(tmp_path / "d", **{"x/e": made.passkey(), "y/e": made.passkey()}) == ["m (x/e)", "m (y/e)"]
    one, two = (changed(made.perplexity(), "model", "id", f"{owner}/llama") for owner in ("a", "b"))
    assert labels(tmp_path / "m", p=one, q=two) == ["a/llama", "b/llama"]


def test_answers_that_were_given_are_named_by_the_user_or_their_folder(tmp_path):
    named, unnamed = made.longbench(trec=1.0), made.longbench(trec=2.0)
    named["model"] = {"id": "LongAlpaca", "answers_from": "x/predictions"}
    unnamed["model"] = {"id": None, "answers_from": "x/predictions"}
    assert labels(tmp_path, a=named, b=unnamed) == ["LongAlpaca", "predictions"]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_folders_are_searched_and_each_result_counts_once(tmp_path):
    write(tmp_path / "x/a", made.passkey())
    write(tmp_path / "x/deep/b", made.perplexity())
    write(tmp_path / "x/.hidden/c", made.perplexity())
    write(tmp_path / "x/run.running/d", made.perplexity())
    write(tmp_path / "x/report", {**made.passkey(), "kind": "report"})
    found = build_report(
        *find_results([str(tmp_path / "x"), str(tmp_path / "x/a"), str(tmp_path / "x/deep/b/result.json")])
    )
    assert [own.name for own in found.results] == [str(tmp_path / "x/a"), str(tmp_path / "x/deep/b")]
    assert found.left_out == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**made.passkey(), "kind": "plan"}, "kind 'plan'"),
        ({**made.passkey(), "schema": "other/1"}, "no result of longext: its `schema`"),
        ({key: value for key, value in made.passkey().items() if key != "protocol"}, "no `protocol`"),
        ({**made.passkey(), "by_length": [], "results": []}, "no numbers"),
        ({**made.perplexity(), "results": [{"ppl": 3.0}]}, "no complete result"),
    ],
)
def test_what_cannot_be_shown_is_an_error_where_named_and_told_where_found(tmp_path, record, reason):
    write(tmp_path / "x/bad", record)
    with pytest.raises(DataError, match=reason):
        build_report(*find_results([str(tmp_path / "x/bad")]))
    with pytest.raises(DataError, match=reason):
        build_report(*find_results([str(tmp_path / "x")]))
    write(tmp_path / "x/good", made.passkey())
    found = build_report(*find_results([str(tmp_path / "x")]))
    assert len(found.results) == 1
    assert reason in found.left_out[0]
    assert "bad" in found.left_out[0]


def test_broken_files_end_in_a_line_that_names_file_and_line(tmp_path):
    write(tmp_path / "x/good", made.passkey())
    (tmp_path / "x/bad").mkdir()
    file = tmp_path / "x/bad/result.json"
    file.write_text('{\n "schema": "longext.result/1",\n "kind": \n}')
    with pytest.raises(DataError, match=r"bad/result.json is not valid JSON.*line 4"):
        build_report(*find_results([str(tmp_path / "x")]))


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No result in"):
        build_report(*find_results([str(tmp_path)]))
    with pytest.raises(DataError, match="No result at"):
        build_report(*find_results([str(tmp_path / "nowhere")]))


def test_every_result_in_the_documentation_can_be_shown():
    found = build_report(*find_results([str(DOCUMENTED)]))
    assert len(found.results) == len(list(DOCUMENTED.rglob("result.json")))


# --- numbers in long form ---------------------------------------------------------------------------------------------


def test_the_csv_has_every_number_those_of_no_table_too(tmp_path):
    header, *rows = csv_rows(report(tmp_path, a=made.passkey(), b=made.perplexity()))
    table = [dict(zip(header, row, strict=True)) for row in rows]
    values = {(row["suite"], row["score"]): (row["value"], row["low"], row["high"], row["count"]) for row in table}
    assert values["passkey", "by_length[length=512].accuracy"] == (0.5, 0.0, 1.0, 10)
    assert values["perplexity", "results[length=1024].ppl"] == (20.0, 18.0, 23.0, 99)
    assert values["perplexity", "results[length=1024].nll"] == (3.5, None, None, 99)
    assert {row["length"] for row in table} == {512, 1024}
