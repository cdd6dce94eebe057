"""The Python API: what the commands do, as functions; the same numbers, and errors that name arguments."""

from __future__ import annotations

import inspect
import json

import pytest

import longext
from longext.api import in_python
from longext.errors import ConfigError, LongextError

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = {"lengths": [96, 192], "max_tokens": 400, "num_bootstrap": 20, "device": "cpu"}
FUNCTIONS = "load evaluate compare gate extend finetune compress merge generate chat build_memory plan".split()


@pytest.fixture(scope="module")
def yarn():
    return longext.load("books-5m", method="yarn", factor=8, device="cpu")


@pytest.fixture(scope="module")
def result(yarn):
    return longext.evaluate(yarn, "perplexity", **{key: value for key, value in SMALL.items() if key != "device"})


def numbers(record):
    return [(row["length"], row["nll"]) for row in record["results"]]


def test_a_loaded_model_and_a_named_one_give_the_numbers_of_the_command(result, run, tmp_path):
    named = longext.evaluate("books-5m", "ppl", method="yarn", factor=8, **SMALL)
    run(*"eval ppl books-5m --method yarn --factor 8 --lengths 96,192 --max-tokens 400 -o out --device cpu".split())
    command = json.loads((tmp_path / "out" / "result.json").read_text())
    assert numbers(result.record) == numbers(named.record) == numbers(command)
    assert result.record["model"] == named.record["model"]
    assert command["command"].startswith("longext eval ppl books-5m --method yarn --factor 8 --lengths 96,192")
    assert named.record["command"] == "(called from Python)"


def test_a_result_prints_draws_and_is_a_data_frame(result):
    text = repr(result)
    assert "books-5m + yarn 8x" in text
    assert "192" in text
    assert repr(result.table()) == text
    assert "<table>" in result._repr_html_()
    frame = result.to_pandas()
    row = frame[frame["score"] == "results[length=192].ppl"].iloc[0]
    assert row["value"] == result.record["results"][1]["ppl"]
    assert row["low"] < row["value"] < row["high"]
    assert result.plot().axes
    assert result.passed


def test_a_saved_result_is_what_the_command_writes(result, run, tmp_path):
    result.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "result.json").read_text())["results"] == result.record["results"]
    assert run("report", "saved", "-o", "report").exit_code == 0
    assert run("eval", "ppl", "-c", "saved/recipe.yaml", "-o", "again", "--device", "cpu").exit_code == 0
    with pytest.raises(ConfigError, match="force"):
        result.save(tmp_path / "saved")


def test_a_result_is_a_page(result, tmp_path):
    page = result.report(tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_extend_writes_what_load_reads(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("longext.threads.set_threads", asked.append)
    path = longext.extend("books-5m", "linear", factor=2, output=tmp_path / "out", check=False)
    assert longext.load(path, device="cpu", threads=1).context_length == 1024
    longext.compare(path, ["none"], device="cpu", threads=1, lengths=[64], max_tokens=200, stride=32, passkey=False)
    assert asked == [1, 1]


def test_a_plan_and_a_continuation():
    assert longext.plan("books-5m", length=1024, gpus="1xH100-80GB") is not None
    text = longext.generate("books-5m", "The old man", max_new_tokens=4, device="cpu")
    assert len(text.tokens) == 4


def test_training_and_what_becomes_of_it(tmp_path):
    shared = {"data": "sample", "device": "cpu", "num_steps": 1, "accumulation": 1}
    small = {"target_length": 640, "method": "linear", "group_size": 64, "lora_r": 2}
    trained = longext.finetune("books-5m", output=tmp_path / "adapter", **shared, **small)
    assert trained.directory == tmp_path / "adapter"
    assert trained.record["target_length"] == 640
    assert trained.metrics
    longext.merge(trained.directory, output=tmp_path / "merged")
    assert longext.load(tmp_path / "merged", device="cpu").context_length == 640
    packed = longext.compress("books-5m", output=tmp_path / "memory", segment=64, ratio=[8], lora_r=2, **shared)
    model = longext.load(packed.directory, device="cpu")
    result = longext.evaluate(model, "ppl", lengths=[0, 64], max_tokens=400, num_bootstrap=0, num_places=2)
    assert result.record["kind"] == "memory-perplexity"
    with pytest.raises(ConfigError, match="num_processes"):
        longext.finetune("books-5m", output=tmp_path / "more", num_processes=2, **shared)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: longext.evaluate("books-5m", "ppl", strid=3), "unknown key 'strid'. Did you mean 'stride'?"),
        (lambda: longext.evaluate("books-5m", "ppl", output="out"), "output: results are returned, not written"),
        (lambda: longext.evaluate("books-5m", "perplexty"), "Did you mean 'perplexity'?"),
        (lambda: longext.evaluate("books-5m", "ppl", lengths=[64], stride=64), "stride must be below"),
        (lambda: longext.load("books-5m", factor=8), "factor 8 needs a method"),
        (lambda: longext.load("nowhere"), "No model at 'nowhere'"),
        (lambda: longext.evaluate("books-5m", "effective"), "Missing: max_length."),
        (lambda: longext.extend("books-5m", "yarn"), "factor"),
    ],
)
def test_errors_speak_python(call, message):
    with pytest.raises(LongextError) as error:
        call()
    assert message in str(error.value)
    assert "--" not in str(error.value)


def test_a_loaded_model_stays_as_it_was_loaded(yarn):
    with pytest.raises(ConfigError, match="factor, method: the model is loaded already"):
        longext.evaluate(yarn, "ppl", method="linear", factor=2)


def test_a_loaded_model_is_asked_as_the_evaluation_says(yarn):
    with pytest.raises(ConfigError, match="template_arg is for a chat template"):
        longext.evaluate(yarn, "needle", lengths=[256], template_arg=["enable_thinking=false"])


def test_flags_become_arguments():
    assert in_python("Give --max-length, or --no-check with -o.") == "Give max_length, or check as output."


def test_a_gate_is_true_or_says_what_failed(tmp_path):
    given = {"lengths": [128], "num_prompts": 10, "fail_under": ["0.5"], "device": "cpu"}
    verdict = longext.gate("books-5m", **given, summary=str(tmp_path / "summary.md"))
    assert (tmp_path / "summary.md").read_text().startswith("### longext gate: books-5m")
    assert verdict and verdict.passed and verdict.record["kind"] == "gate"
    assert repr(verdict).startswith("PASS: 1 of 1 checks passed (95 % sure).\n") and "passkey" in repr(verdict.table())
    assert verdict._repr_html_().startswith("<p>PASS")
    verdict.require()
    failed = longext.gate("books-5m", **{**given, "lengths": [768]})
    assert not failed
    with pytest.raises(LongextError, match=r"passkey at 768 is 0.0% \(at least 50.0%\)"):
        failed.require()
    with pytest.raises(ConfigError, match="Unknown test 'pass'"):
        longext.gate("books-5m", tests=["pass"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_api_is_documented_and_typed(name):
    function = getattr(longext, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    assert "Args:" in inspect.getdoc(function)
