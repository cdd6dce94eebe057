"""`longext report` as a user types it, on results that were just made and on those in the documentation."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fails, ok, result_of
from typer.testing import CliRunner

DOCUMENTED = Path(__file__).parents[2] / "docs" / "results"
FILES = {"result.json", "report.html", "report.md", "results.csv", "table.md", "run.json", "recipe.yaml"}
YARN = ("--method", "yarn", "--factor", 4)
PASSKEY = ("passkey", "books-5m", "--lengths", "128,256", "--depths", "0,1", "--num-trials", 1)
NEEDLE = (
    "eval",
    "needle",
    "books-5m",
    "--lengths",
    "128,256",
    "--scoring",
    "exact",
    "--num-trials",
    1,
    "--tasks",
    "single",
)
SMALL = ("--max-tokens", 512, "--lengths", "128,256", "--stride", 64, "--num-bootstrap", 20)
PPL = ("eval", "ppl", "books-5m", *SMALL)


def values_of(record, suite, title=None):
    """Return {(label, panel, column): (value, low, high)} of a suite's tables in a report's record."""
    return {
        (row["label"], row["panel"], row["column"]): (row["value"], row["low"], row["high"])
        for table in record["tables"]
        if table["suite"] == suite and title in (None, table["title"])
        for row in table["rows"]
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Results of two methods on three suites, made once."""
    from longext.cli import app

    folder = tmp_path_factory.mktemp("made")
    for name, method in (("none", ()), ("yarn", YARN)):
        for suite, args in (("passkey", PASSKEY), ("needle", NEEDLE), ("ppl", PPL)):
            typed = [str(arg) for arg in (*args, *method, "-o", folder / f"{suite}-{name}")]
            ok(CliRunner().invoke(app, typed))
    return folder


@pytest.fixture
def results(made, run, tmp_path):
    """Run commands where results/ holds those that were made."""
    shutil.copytree(made, tmp_path / "results")
    return run


def test_a_report_on_a_folder_of_results(results, tmp_path):
    out = ok(results("report", "results", "-o", "report"))
    for text in (
        "Perplexity by context length",
        "Passkey accuracy by prompt length",
        "none",
        "yarn 4x",
        "Results: report",
    ):
        assert text in out
    folder = tmp_path / "report"
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"perplexity.png", "passkey.png", "passkey-depths.png", "needle.png"}
    assert {path.name for path in folder.iterdir()} == FILES | pictures
    record = result_of(folder)
    assert (record["kind"], len(record["results"]), record["left_out"]) == ("report", 6, [])
    for name, label in (("none", "none"), ("yarn", "yarn 4x")):
        own = {row["length"]: row for row in result_of(tmp_path / f"results/ppl-{name}")["results"]}
        for length, row in own.items():
            assert values_of(record, "perplexity")[label, "", length] == (row["ppl"], row["ppl_low"], row["ppl_high"])
        for row in result_of(tmp_path / f"results/passkey-{name}")["by_length"]:
            expected = (row["accuracy"], row["low"], row["high"])
            assert values_of(record, "passkey")[label, "", row["length"]] == expected
        for row in result_of(tmp_path / f"results/needle-{name}")["by_task"]:
            assert values_of(record, "needle")[label, row["task"], row["length"]] == (
                row["score"],
                row["low"],
                row["high"],
            )
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 * len(pictures)  # for wide screens and for narrow ones
    assert out.index("Perplexity: at 256 tokens") < out.index("Perplexity by context length")
    assert f"{own[256]['ppl']:.2f}" in page
    assert f"{own[256]['ppl']:.2f}" in (folder / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_and_the_same_run_alone_share_a_table(run, tmp_path):
    methods = ("--methods", "none,yarn", "--factor", 4, "--depths", "0,1", "--num-trials", 1)
    ok(run("compare", "books-5m", *SMALL, *methods, "-o", "all"))
    ok(run(*PPL, *YARN, "-o", "alone"))
    ok(run("report", "all", "alone", "-o", "report"))
    record = result_of(tmp_path / "report")
    (table,) = [table for table in record["tables"] if table["suite"] == "perplexity"]
    assert table["cautions"] == []
    values = values_of(record, "perplexity")
    assert {label for label, _, _ in values} == {"none", "yarn 4x (all)", "yarn 4x (alone)"}
    assert values["yarn 4x (all)", "", 256] == values["yarn 4x (alone)", "", 256]


@pytest.mark.usefixtures("no_pictures")
def test_what_is_not_comparable_is_apart_and_said(results, tmp_path):
    ok(results(*PPL, "--stride", 32, "-o", "results/other"))
    out = ok(results("report", "results", "-o", "report"))
    assert "Perplexity (set 2): Not comparable with set 1, which has protocol.stride 32 (here 64)." in out
    tables = [table for table in result_of(tmp_path / "report")["tables"] if table["suite"] == "perplexity"]
    assert [len(table["rows"]) for table in tables] == [2, 4]
    assert not any(row["best"] for row in tables[0]["rows"])


@pytest.mark.usefixtures("no_pictures")
def test_the_csv_has_a_row_for_every_number(results, tmp_path):
    ok(results("report", "results", "-o", "report"))
    rows = list(csv.DictReader((tmp_path / "report/results.csv").read_text().splitlines()))
    for row in rows:
        if row["suite"] == "passkey" and row["score"].startswith("results["):
            own = result_of(Path(row["result"]))["results"]
            cell = next(c for c in own if (c["length"], c["depth"]) == (int(row["length"]), float(row["depth"])))
            assert float(row["value"]) == cell["accuracy"]
    scores = {row["score"] for row in rows if row["result"] == "results/ppl-yarn"}
    assert scores == {f"results[length={n}].{key}" for n in (128, 256) for key in ("ppl", "nll", "accuracy")}


@pytest.mark.usefixtures("no_pictures")
def test_json_alone_and_the_recipe_makes_it_again(results, tmp_path):
    record = json.loads(ok(results("report", "results", "-o", "one", "--json")))
    assert record == result_of(tmp_path / "one")
    ok(results("report", "-c", "one/recipe.yaml", "-o", "two"))
    assert result_of(tmp_path / "two")["tables"] == record["tables"]


@pytest.mark.usefixtures("no_pictures")
def test_the_default_directory_is_no_result_of_the_next_report(results, tmp_path):
    ok(results("report", "results"))
    (folder,) = (tmp_path / "results").glob("report-*")
    ok(results("report", "results", "-o", "again"))
    assert result_of(tmp_path / "again")["tables"] == result_of(folder)["tables"]


def test_bad_input_ends_in_one_line(run, tmp_path):
    ok(run(*PASSKEY, "-o", "a"))
    fails(run("report"), 2, "Missing: results")
    fails(run("report", "nowhere"), 2, "No result at 'nowhere'")
    (tmp_path / "empty").mkdir()
    fails(run("report", "empty"), 2, "No result in 'empty'")
    fails(run("report", "a/table.md"), 2, "table.md is not valid JSON")
    fails(run("report", "a/run.json"), 2, "no result of longext")
    (tmp_path / "empty/result.json").write_text('{"schema": "longext.result/1",\n"kind": }')
    fails(run("report", "a", "empty"), 2, "empty/result.json is not valid JSON", "line 2")
    ok(run("report", "a", "-o", "r"))
    fails(run("report", "a", "-o", "r"), 2, "already exists")
    ok(run("report", "a", "-o", "r", "--force"))
    fails(run("report", "a", "-o", "a", "--force"), 2, "which this command reads")
    assert (tmp_path / "a/result.json").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_numbers_of_the_documentation_are_those_of_its_results(run, tmp_path):
    names = ("demo", "books-27m", "compressor/eval-8", "compressor/eval-16", "compressor/eval-16+256")
    documented = {name: json.loads((DOCUMENTED / name / "result.json").read_text()) for name in names}
    ok(run("report", *(DOCUMENTED / name for name in names), "-o", "report"))
    record = result_of(tmp_path / "report")
    for name, model in (("demo", "books-5m"), ("books-27m", "books-27m")):
        for method in documented[name]["methods"]:
            method_name, _, settings = method["name"].partition(":")
            applied = [] if method_name == "none" else [f"{method_name} 8x {settings}".strip()]
            label = " + ".join([model, *applied])
            for row in method["perplexity"]:
                expected = (row["ppl"], row["ppl_low"], row["ppl_high"])
                assert values_of(record, "perplexity")[label, "", row["length"]] == expected
            for row in method["passkey_by_length"]:
                expected = (row["accuracy"], row["low"], row["high"])
                assert values_of(record, "passkey")[label, "", row["length"]] == expected
    for spec in ("8", "16", "16+256"):
        for row in documented[f"compressor/eval-{spec}"]["results"]:
            label = f"books-5m + memory@{spec}"
            if row["method"] == "memory":
                found = values_of(record, "memory-perplexity")[label, "", row["length"]]
                assert found == (row["ppl"], row["ppl_low"], row["ppl_high"])
            else:
                found = values_of(record, "memory-perplexity")[label, row["method"], row["length"]]
                assert found == (row["difference"], row["difference_low"], row["difference_high"])


def test_a_report_needs_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from longext.cli import app\n"
        f"done = CliRunner().invoke(app, ['report', {str(DOCUMENTED / 'demo')!r}, '-o', {str(tmp_path / 'r')!r}])\n"
        "assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
