"""Position remapping as a user runs it: in eval, passkey, generate, compare, finetune and Python; refused by extend."""

from __future__ import annotations

import json

import pytest

import longext

TRAIN = ("finetune", "books-5m", "--data", "sample", "-o", "x")


def _ppl(run, *arguments):
    result = run("eval", "ppl", "books-5m", "--lengths", "256,1024", "--max-tokens", 1100, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_remapping_is_measured_like_any_method(run):
    plain = _ppl(run)
    remapped = _ppl(run, "--method", "leaky-rerope:window=256:logn=true", "--factor", 4)
    assert remapped["model"]["remapping"] == {
        "method": "leaky-rerope", "trained_length": 512, "target_length": 2048, "window": 256,
        "k": pytest.approx((2048 - 256) / (0.9 * 512 - 256)), "logn": True, "temperature": 1.0,
    }  # fmt: skip
    short, long = (row["ppl"] for row in remapped["results"])
    assert short == plain["results"][0]["ppl"]
    assert long < 0.8 * plain["results"][1]["ppl"]  # beyond the trained length the model as it is falls apart


def test_passkey_generate_and_compare(run, tmp_path):
    result = run(
        "passkey", "books-5m", "--method", "dca:chunk=384", "--factor", 4, "--lengths", 600, "--num-trials", 1, "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["remapping"]["chunk"] == 384
    result = run(
        "compare", "books-5m", "--methods", "none,yarn,rerope:window=200", "--factor", 4, "--lengths", "512,1024",
        "--max-tokens", 1100, "--no-passkey", "-o", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    methods = {each["name"]: each for each in json.loads((tmp_path / "out" / "result.json").read_text())["methods"]}
    assert methods["rerope:window=200"]["formula"] == "min(d, W); here window 200, temperature 1.0"
    assert methods["rerope:window=200"]["perplexity"][1]["ppl"] < methods["yarn"]["perplexity"][1]["ppl"]
    alone = run(
        "eval", "ppl", "books-5m", "--lengths", "512,1024", "--max-tokens", 1100, "--json"
    )  # nothing was left on
    assert json.loads(alone.stdout)["results"][1]["ppl"] == pytest.approx(methods["none"]["perplexity"][1]["ppl"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extend", "books-5m", "--method", "dca", "--factor", 4), "no checkpoint can hold: use it with --method of"),
        (("eval", "ppl", "books-5m", "--method", "dca"), "--method dca needs --factor"),
        (("eval", "ppl", "books-5m", "--method", "dcaa", "--factor", 2), "Did you mean 'dca'?"),
        (("eval", "ppl", "books-5m", "--method", "dca:group=3", "--factor", 2), "It takes chunk, window, logn"),
        (("eval", "ppl", "books-5m", "--method", "dca:factor=x"), "factor"),
        ((*TRAIN, "--method", "rerope", "--factor", 2), "train under dca or string"),
        ((*TRAIN, "--method", "dca", "--factor", 2, "--attention", "s2"), "leave --attention out"),
        ((*TRAIN, "--method", "dca", "--factor", 2, "--sweep", "auto"), "leave --sweep out"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_training_under_a_remapping(run, tmp_path):
    result = run(
        "finetune", "books-5m", "--method", "string:shift=100:window=20", "--target-length", 512, "--data", "sample",
        "--num-steps", 1, "--tuning", "lora", "--eval-data", "sample", "--eval-lengths", "256", "-o", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["extension"]["remapping"]["parameters"] == {"shift": "100", "window": "20"}
    assert "distances" in record["finetune"]["attention"]["objective"]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in metrics if "attention" in line]
    assert measured and all("longext_remap" in line["attention"] for line in measured)


def test_from_python():
    model = longext.load("books-5m", method="leaky-rerope:logn=true", factor=4)
    assert model.context_length == 2048
    answer = model.greedy(model.encode("Once upon a time " * 150), 3)
    assert len(answer) <= 3
    model.remap(None)
    with longext.attach(model.model, "dca", 2048) as remapping:
        assert remapping.spec.describe()["chunk"] == 384
