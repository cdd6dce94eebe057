"""Every command once, as a user types it: exit code, files, table, JSON."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
from command_line import fails, ok, result_of

from longext.errors import LongextError
from longext.evals.runner import run_eval
from longext.settings import shipped_recipes

SMALL = ("--lengths", "96,192", "--max-tokens", "400", "--num-bootstrap", "20")


def test_extend_prints_old_and_new_and_verify_agrees(run, tmp_path):
    out = ok(run("extend", "books-5m", "--method", "yarn", "--target-length", 4096, "-o", "out"))
    for text in ("context length", "512", "4,096", "yarn", "longext verify out"):
        assert text in out
    assert "is what it says" in ok(run("verify", "out"))
    record = json.loads(ok(run("verify", "out", "--json")))
    assert record["ok"] is True
    assert record["kind"] == "verify"
    assert record["base"] == "books-5m"


@pytest.mark.isolated
def test_extend_verify_in_one_go(run):
    assert "is what it says" in ok(
        run("extend", "books-5m", "--method", "linear", "--factor", 2, "-o", "o", "--verify")
    )


def test_dry_run_writes_nothing(run, tmp_path):
    out = ok(run("extend", "books-5m", "--method", "linear", "--factor", 4, "--dry-run"))
    assert "2,048" in out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_extend_from_a_recipe_with_typed_flags_on_top(run, tmp_path):
    (tmp_path / "r.yaml").write_text("model: books-5m\nmethod: linear\nfactor: 2\noutput: from-recipe\n")
    ok(run("extend", "-c", "r.yaml", "--set", "factor=3", "--factor", 4))
    config = json.loads((tmp_path / "from-recipe/config.json").read_text())
    assert config["rope_parameters"]["factor"] == 4.0


def test_inspect_says_which_dimensions_never_turn(run, tmp_path):
    out = ok(run("inspect", "books-5m", "-o", "i"))
    record = result_of(tmp_path / "i")
    # wavelength 2 pi 10000^(2i/64) exceeds 512 from pair 16 on
    assert record["never_complete_a_turn"] == list(range(16, 32))
    assert "16 of 32 dimension pairs never complete a turn" in out
    assert (tmp_path / "i/rope.png").stat().st_size > 5000


def test_a_recipe_for_extend_also_serves_inspect(run, tmp_path):
    ok(run("inspect", "-c", "extend/books-5m-4k-yarn", "-o", "i"))
    assert result_of(tmp_path / "i")["method"]["method"] == "yarn"
    ok(run("inspect", "books-5m", "--set", "method=linear", "--set", "factor=8", "-o", "j"))
    assert result_of(tmp_path / "j")["method"]["method"] == "linear"
    assert not (tmp_path / "out").exists()


def test_inspect_shows_what_a_method_does(run, tmp_path):
    out = ok(run("inspect", "books-5m", "--method", "linear", "--factor", 8, "-o", "i"))
    assert "stretched 8.00x" in out
    rows = result_of(tmp_path / "i")["dimensions"]
    assert all(row["stretch"] == pytest.approx(8) for row in rows)


@pytest.mark.parametrize("protocol", ["sliding", "positional", "yarn-truncated", "yarn-sliding", "longlora"])
def test_eval_ppl(run, tmp_path, protocol):
    out = ok(run("eval", "ppl", "books-5m", "--protocol", protocol, *SMALL, "--stride", 32, "-o", "p"))
    record = result_of(tmp_path / "p")
    assert record["protocol"]["id"] == f"ppl/{protocol}"
    assert record["model"]["attention"] == "full (sdpa)"
    for row in record["results"]:
        if protocol in ("sliding", "positional", "yarn-sliding") and row["num_windows"] > 1:
            assert 1 < row["ppl_low"] <= row["ppl"] <= row["ppl_high"]
        else:  # one document, or windows that score the same tokens again: nothing to resample
            assert row["ppl_low"] is row["ppl_high"] is row["resampled"] is None
    assert (tmp_path / "p/ppl.png").is_file()
    assert f": books-5m (ppl/{protocol})" in out


def test_eval_ppl_reads_every_kind_of_source(run, tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = "It was a bright cold day, and the ship lay at anchor in the bay. " * 40
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text(text)
    (tmp_path / "d/b.jsonl").write_text(
        json.dumps({"text": text}) + "\n\n" + json.dumps({"text": text, "id": "x"}) + "\n"
    )
    (tmp_path / "d/c.json").write_text(json.dumps([{"text": text}]))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "d/e.parquet")
    ok(
        run(
            "eval", "ppl", "books-5m", "--data", "d", "--lengths", "64", "--stride", 32, "--num-bootstrap", 0, "-o", "p"
        )
    )
    rows = result_of(tmp_path / "p")["results"][0]["per_document"]
    assert [row["id"] for row in rows] == ["a.txt", "b.jsonl:1", "x", "c.json:1", "e.parquet:1"]
    assert len({row["ppl"] for row in rows}) == 1


def test_json_goes_to_stdout_alone(run):
    record = json.loads(ok(run("eval", "ppl", "books-5m", *SMALL, "--stride", 32, "--json")))
    assert record["schema"] == "longext.result/1"


def test_results_get_a_directory_of_their_own_by_default(run, tmp_path):
    out = ok(run("passkey", "books-5m", "--lengths", 128, "--depths", "0.5", "--num-trials", 1))
    (directory,) = (tmp_path / "results").iterdir()
    assert directory.name.startswith("passkey-landmark-books-5m-")
    assert directory.name in out


def test_passkey(run, tmp_path):
    ok(run("passkey", "books-5m", "--lengths", "128,256", "--depths", "0,1", "--num-trials", 2, "-o", "k"))
    record = result_of(tmp_path / "k")
    assert [cell["num_tokens"] for cell in record["results"]] == [128, 128, 256, 256]
    assert all(0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1 for cell in record["results"])
    assert (tmp_path / "k/passkey.png").is_file()


def test_passkey_in_a_book_with_several_needles(run, tmp_path):
    args = ("--lengths", 256, "--depths", 0.5, "--num-trials", 1, "--filler", "book", "--num-needles", 2)
    ok(run("passkey", "books-5m", *args, "-o", "k"))
    assert result_of(tmp_path / "k")["protocol"]["num_needles"] == 2


def test_compare_writes_report_csv_and_pictures(run, tmp_path):
    args = ("--methods", "none,linear,dynamic:alpha=4,yarn:ramp=paper", "--factor", 4, "--stride", 32, *SMALL)
    out = ok(run("compare", "books-5m", *args, "--depths", 0.5, "--num-trials", 1, "-o", "c"))
    record = result_of(tmp_path / "c")
    assert [m["name"] for m in record["methods"]] == ["none", "linear", "dynamic:alpha=4", "yarn:ramp=paper"]
    assert record["methods"][2]["rope_parameters"]["factor"] == 4.0
    assert record["methods"][3]["rope_parameters"]["rope_type"] == "longrope"
    page = (tmp_path / "c/report.html").read_text()
    assert page.count("<svg") == 2 * 4
    assert "http://www.w3.org" in page
    assert "src=" not in page and "@import" not in page
    assert "<h2>Verdict</h2>" in page and "price at 192" in page
    rows = list(csv.DictReader((tmp_path / "c/results.csv").open()))
    assert {row["suite"] for row in rows} == {"perplexity", "positions", "passkey"}
    by_hand = next(m for m in record["methods"] if m["name"] == "linear")["perplexity"][0]["ppl"]
    linear = next(r for r in rows if r["label"] == "linear 4x" and r["score"] == "results[length=96].ppl")
    assert float(linear["value"]) == by_hand
    for name in ("perplexity.png", "positions.png", "passkey.png", "passkey-depths.png"):
        assert (tmp_path / "c" / name).is_file()
    assert "report.html" in out


@pytest.mark.usefixtures("no_pictures")
def test_compare_leaves_a_result_of_every_method_and_evaluation(run, tmp_path):
    args = ("--methods", "none,dynamic:alpha=4", "--factor", 4, "--stride", 32, *SMALL, "--depths", 0.5)
    ok(run("compare", "books-5m", *args, "--num-trials", 1, "-o", "c"))
    record = result_of(tmp_path / "c")
    for folder, method in (("none", record["methods"][0]), ("dynamic-alpha-4", record["methods"][1])):
        for name in ("perplexity", "positions"):
            assert result_of(tmp_path / "c" / folder / name)["results"] == method[name]
        assert result_of(tmp_path / "c" / folder / "passkey")["by_length"] == method["passkey_by_length"]
    ok(run("eval", "ppl", "-c", "c/dynamic-alpha-4/perplexity/recipe.yaml", "-o", "again"))
    assert "Comparable" in ok(run("eval", "diff", "c/dynamic-alpha-4/perplexity", "again"))
    ok(run("report", "c/none", "c/dynamic-alpha-4", "-o", "r"))
    ok(run("report", ".", "-o", "all"))
    assert [own["result"] for own in result_of(tmp_path / "all")["results"]] == ["again", "c"]


@pytest.mark.usefixtures("no_pictures")
def test_a_method_that_fails_leaves_the_others_in_a_comparison(run, tmp_path, monkeypatch):
    def failing(task, *args, **options):
        if task.method == "linear":
            raise LongextError("its scores are no numbers.")
        return run_eval(task, *args, **options)

    monkeypatch.setattr("longext.report.compare.run_eval", failing)
    args = ("compare", "books-5m", "--factor", 4, "--lengths", 96, "--max-tokens", 300, "--no-passkey")
    result = run(*args, "--methods", "linear,none", "-o", "c")
    fails(result, 1, "1 of 2 methods failed. linear: its scores are no numbers")
    record = result_of(tmp_path / "c")
    assert record["failed"] == [{"name": "linear", "reason": "its scores are no numbers"}]
    assert [method["name"] for method in record["methods"]] == ["none"]
    assert "Not measured" in result.stdout and "Not measured" in (tmp_path / "c/table.md").read_text()
    assert "Left out: linear of c: its scores" in ok(run("report", "c", "-o", "r"))
    fails(run(*args, "--methods", "linear", "-o", "d"), 1, "no numbers")
    assert not (tmp_path / "d").exists()


@pytest.mark.usefixtures("no_pictures")
def test_compare_equals_the_single_commands(run, tmp_path):
    """The same documents, seeds and protocol: one number, whichever command prints it."""
    shared = ("--stride", 32, *SMALL)
    ok(
        run(
            "compare",
            "books-5m",
            "--methods",
            "none,yarn",
            "--factor",
            4,
            *shared,
            "--depths",
            0.5,
            "--num-trials",
            2,
            "-o",
            "c",
        )
    )
    ok(run("eval", "ppl", "books-5m", "--method", "yarn", "--factor", 4, *shared, "-o", "p"))
    ok(
        run(
            "passkey",
            "books-5m",
            "--method",
            "yarn",
            "--factor",
            4,
            "--lengths",
            "96,192",
            "--depths",
            0.5,
            "--num-trials",
            2,
            "-o",
            "k",
        )
    )
    yarn = result_of(tmp_path / "c")["methods"][1]
    fields = ("ppl", "ppl_low", "ppl_high", "num_tokens")
    alone = result_of(tmp_path / "p")["results"]
    assert [[row[f] for f in fields] for row in yarn["perplexity"]] == [[row[f] for f in fields] for row in alone]
    assert [c["num_correct"] for c in yarn["passkey"]] == [
        c["num_correct"] for c in result_of(tmp_path / "k")["results"]
    ]


@pytest.mark.usefixtures("no_pictures")
def test_none_is_the_model_as_it_is_also_where_it_was_trained_with_scaling(run, tmp_path):
    """A Llama-3.1-like model: `none` keeps its trained ramp, other methods are refused unless told to replace it."""
    base = tmp_path / "base"
    ok(run("extend", "books-5m", "--method", "llama3", "--factor", 4, "-o", base))
    (base / "run.json").unlink()
    shared = ("--stride", 32, *SMALL)
    ok(run("compare", base, "--methods", "none,yarn:replace=true", "--factor", 4, *shared, "--no-passkey", "-o", "c"))
    ok(run("eval", "ppl", base, *shared, "-o", "p"))
    none, yarn = result_of(tmp_path / "c")["methods"]
    assert none["rope_parameters"]["rope_type"] == "llama3"
    assert none["perplexity"][0]["nll"] == result_of(tmp_path / "p")["results"][0]["nll"]
    assert yarn["perplexity"][0]["nll"] != none["perplexity"][0]["nll"]
    refused = run("compare", base, "--methods", "none,yarn", "--factor", 4, *shared)
    assert refused.exit_code == 2
    assert "was trained with llama3 RoPE" in refused.stderr


def test_version_and_module_entry(run):
    import subprocess
    import sys

    import longext

    assert longext.__version__ in ok(run("--version"))
    shown = subprocess.run([sys.executable, "-m", "longext", "--help"], capture_output=True, text=True, check=True)
    assert "extend" in shown.stdout
    assert "compare" in shown.stdout


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_recipe_loads_and_names_its_command(name):
    from longext.cli.app import COMMANDS
    from longext.evals.base import EVALS
    from longext.settings import build_config

    path = shipped_recipes()[name]
    folder, _, file = name.partition("/")
    evaluation = file.partition("-")[0]
    command = {"compress": "compress-train", "eval": "passkey" if evaluation == "passkey" else f"eval {evaluation}"}
    build_config(EVALS[evaluation] if folder == "eval" else COMMANDS[command.get(folder, folder)].config, path, [], {})
    assert path.read_text().splitlines()[0] == f"# longext {command.get(folder, folder)} -c {name}"


@pytest.mark.parametrize("name", [name for name in sorted(shipped_recipes()) if name.startswith("compress/")])
def test_every_compress_recipe_is_a_run_that_could_start(name):
    """The spec and the document fit the positions of the model that is meant."""
    from longext.compressor.config import CompressConfig
    from longext.compressor.settings import check_compress_config, document_length, spec_of
    from longext.settings import build_config

    config = build_config(CompressConfig, shipped_recipes()[name], [], {"device": "cpu"})
    check_compress_config(config)
    window = 4096 if "llama2" in name else 512
    assert document_length(config, spec_of(config, window), window) == config.document_length


@pytest.mark.parametrize("name", [name for name in sorted(shipped_recipes()) if name.startswith("finetune/")])
def test_every_finetune_recipe_is_a_run_that_could_start(name):
    """What the command checks before it reads the model; the rows of a step are LongLoRA's 64 where GPUs are meant."""
    from longext.settings import build_config
    from longext.training.config import FinetuneConfig
    from longext.training.settings import check_finetune_config

    config = build_config(FinetuneConfig, shipped_recipes()[name], [], {"device": "cpu"})
    processes = 64 if "multinode" in name else config.num_processes
    # 4 bits are refused on a CPU; torchrun starts the processes of several nodes
    check_finetune_config(dataclasses.replace(config, quantize="none", num_processes=processes))
    rows = config.batch_size * config.accumulation * processes // config.sequence_parallel
    if processes > 1 and config.task == "pretrain":
        assert rows == 64


@pytest.mark.usefixtures("no_pictures")
def test_the_quick_finetune_recipe_runs(run, tmp_path):
    ok(run("finetune", "-c", "finetune/books-5m-quick", "-o", "out"))
    record = result_of(tmp_path / "out")
    assert record["finetune"]["target_length"] == 1024
    before, after = (record["perplexity"][i]["perplexity"]["1024"] for i in (0, -1))
    assert after < before
