"""A model behind a completions server against the same model in this process: answers, log-probabilities, failures."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch
from command_line import fails, fails_in_one_line, no_leftovers, ok, undrawn
from completions_server import CompletionsServer
from typer.testing import CliRunner

from longext.errors import ConfigError, LongextError
from longext.models.engines import client
from longext.models.engines.client import Client, base_url

pytestmark = pytest.mark.usefixtures("no_pictures")
SECRET = "sk-very-secret-0123456789"
# a server that splits texts itself reads from their beginning alone
TRUNCATED = {
    "truncated": ("ppl", "books-5m", "--protocol", "yarn-truncated", "--lengths", "48,64", "--max-tokens", 200)
}
SUITES = {
    "generating": ("needle", "books-5m", "--tasks", "single", "--lengths", 200, "--num-trials", 2,
        "--haystack", "noise", "--max-new-tokens", 8, "--answers", "both"),
    "likelihood": ("ppl", "books-5m", "--lengths", "48,64", "--max-tokens", 200),
    "first choices": ("passkey", "books-5m", "--lengths", 128, "--depths", "0,1", "--num-trials", 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.001)


def record(directory):
    """The tables of a result, numbers rounded to what two kernels agree on."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(own) for key, own in value.items() if key != "seconds"}
        if isinstance(value, list):
            return list(map(rounded, value))
        return float(f"{value:.4g}") if isinstance(value, float) else value

    found = json.loads((directory / "result.json").read_text())
    return {key: rounded(value) for key, value in found.items() if key not in ("command", "model", "seconds", "cost")}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of the results of all suites, measured in this process."""
    from longext.cli import app

    place = tmp_path_factory.mktemp("here")
    with undrawn():
        for name, args in (SUITES | TRUNCATED).items():
            typed = [str(arg) for arg in ("eval", *args, "-o", place / name)]
            done = CliRunner().invoke(app, typed)
            assert done.exit_code == 0, done.output
    return place


@pytest.mark.parametrize("kind", ["vllm", "echo"])
def test_a_served_model_gets_the_record_of_the_model_here(run, tmp_path, books, here, kind):
    suites = SUITES if kind == "vllm" else TRUNCATED | {"generating": SUITES["generating"]}
    server = CompletionsServer(books, kind)
    with server.running() as url:
        for name, args in suites.items():
            server.failures = [429, 503]
            ok(run("eval", *args, "--endpoint", url, "-o", name))
            assert record(tmp_path / name) == record(here / name)
        found = json.loads((tmp_path / "generating/result.json").read_text())["model"]
    assert (found["id"], found["endpoint"]["url"], found["device"]) == ("served", f"{url}/v1", "server")
    assert found["endpoint"]["prompts"] == {"vllm": "token ids", "echo": "text"}[kind]
    answers = [(place / "generating/answers.jsonl").read_text() for place in (here, tmp_path)]
    assert answers[0] == answers[1]
    assert 1 < server.at_once <= 8
    no_leftovers(tmp_path, *suites)


@pytest.mark.parametrize("kind", ["vllm", "echo"])
def test_log_probabilities_are_those_of_the_model(books, kind):
    from longext import load

    ids = torch.tensor([books.encode("It was a dark and stormy night, and the rain fell in torrents on the roof.")])
    with CompletionsServer(books, kind).running() as url:
        served = load("books-5m", endpoint=url)
        for first in (1, 5):
            found, expected = served.score(ids, first), books.score(ids, first)
            torch.testing.assert_close(found.nll, expected.nll, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.is_top1, expected.is_top1)
        assert served.greedy(ids[0].tolist(), 12) == books.greedy(ids[0].tolist(), 12)
        assert (served.context_length, served.trained_length) == (4096, books.trained_length)


def test_a_server_without_log_probabilities_of_prompts_is_told_so_and_generates(run, books):
    with CompletionsServer(books, "llama").running() as url:
        fails(run("eval", *SUITES["likelihood"], "--endpoint", url, "-o", "out"), 1, "gives no log-probabilities")
        ok(run("eval", *SUITES["generating"][:-2], "--endpoint", url, "-o", "out"))


def test_a_server_and_a_tokenizer_that_say_no_length_answer_all_the_same(run, tmp_path, books):
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(books.directory / name, tmp_path / "tokenizer")
    server = CompletionsServer(books, "llama")
    real = server.answer
    server.answer = lambda method, *rest: (200, {"data": [{"id": "m"}]}) if method == "GET" else real(method, *rest)
    args = ("--tasks", "lines", "--sizes", 2, "--num-cases", 1, "-o", "out")
    with server.running() as url:
        ok(run("eval", "longeval", "tokenizer", *args, "--endpoint", url))


def test_log_probabilities_that_are_no_numbers_and_a_usage_of_another_form(books):
    from longext import load

    server = CompletionsServer(books)
    real, changes = server._complete, {}
    server._complete = lambda body: real(body) | changes
    with server.running() as url:
        changes["usage"] = "none"
        served = load("books-5m", endpoint=url)
        rows = [None, *({str(token): {"logprob": float("nan")}} for token in range(5, 9))]
        changes["choices"] = [{"text": "", "prompt_logprobs": rows}]
        with pytest.raises(LongextError, match="for token 1 of a window of 5 are not finite numbers"):
            served.score(torch.tensor([range(4, 9)]), 1)


def test_a_server_that_splits_texts_itself_scores_no_window_without_its_beginning(run, books):
    with CompletionsServer(books, "echo").running() as url:
        fails(run("eval", *SUITES["likelihood"], "--endpoint", url, "-o", "out"), 1, "as text alone", "yarn-truncated")


def test_a_server_that_goes_away_leaves_the_answers_so_far(run, tmp_path, books, here):
    """Six tries, one line, exit code 1; the same command goes on."""
    args = ("eval", *SUITES["likelihood"], "--concurrency", 1, "-o", "out")
    server = CompletionsServer(books)
    with server.running() as url:
        real = server._complete

        def complete(body):
            if len(server.asked) > 4:
                server.failures = [503] * 6
            return real(body)

        server._complete = complete
        fails(run(*args, "--endpoint", url), 1, "after 6 tries", "HTTP 503 (busy)")
        kept = (tmp_path / "out.scores.jsonl").read_text().splitlines()[1:]
        assert len(kept) >= 2
        server._complete, server.failures, server.asked = real, [], []
        ok(run(*args, "--endpoint", url))
        assert record(tmp_path / "out") == record(here / "likelihood")


def test_a_dead_server_is_one_line(run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    fails_in_one_line(run("eval", *SUITES["likelihood"], "--endpoint", url, "-o", "out"), 1, url, "Is the server up?")
    no_leftovers(tmp_path)


def test_the_key_goes_to_the_server_and_nowhere_else(run, tmp_path, books, monkeypatch):
    server = CompletionsServer(books, key=SECRET)
    args = ("eval", *SUITES["likelihood"], "-o", "out", "--endpoint-key", "MY_KEY")
    with server.running() as url:
        message = fails(run(*args, "--endpoint", url), 2, "MY_KEY", "--endpoint-key")
        monkeypatch.setenv("MY_KEY", "another-secret-key")
        message += fails(run(*args, "--endpoint", url), 2, "wrong key ***")
        monkeypatch.setenv("MY_KEY", SECRET)
        message += ok(run(*args, "--endpoint", url))
    assert any(headers.get("Authorization") == f"Bearer {SECRET}" for *_, headers in server.asked)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    for secret in (SECRET, "another-secret-key"):
        assert secret not in message
        assert secret.encode() not in written


@pytest.mark.parametrize("key", [f"{SECRET}\nX-Other: 1", f"{SECRET}\u2026"])
def test_a_key_that_no_header_can_hold_is_in_no_message(key):
    with pytest.raises(ConfigError, match="--endpoint-key") as caught:
        Client("http://a:8", key)
    assert SECRET not in str(caught.value)


def test_a_key_read_from_a_file_ends_with_a_line_break(books):
    server = CompletionsServer(books, key=SECRET)
    with server.running() as url:
        assert Client(url, f"{SECRET}\n").get("/models")["data"]


def test_a_gate_compares_a_served_model_with_a_baseline_here(run, books):
    """The served model is worse than the one in this process, and so fails against it."""
    from longext import load

    text = ("--tests", "none", "--lengths", 64, "--max-tokens", 900, "--num-windows", 4)
    with CompletionsServer(load("books-5m", method="linear", factor=8)).running() as url:
        args = ("gate", "books-5m", *text, "--baseline", "books-5m", "--endpoint", url)
        fails(run(*args), 1, "baseline at 64 is", "at most")


def test_what_a_server_cannot_follow_is_refused(run, books):
    with CompletionsServer(books).running() as url:
        base = ("eval", *SUITES["likelihood"], "-o", "out", "--endpoint", url)
        fails(run(*base, "--method", "yarn", "--factor", 2), 2, "--method, --factor", "as it is")
        fails(run(*base, "--endpoint-model", "servd"), 2, "No model 'servd'", "served")
    for wrong in ("localhost:8000", "ftp://a/v1", "http://:80", "http://a:b/v1", "http://[::1/v1"):
        with pytest.raises(ConfigError, match="must be an address"):
            base_url(wrong)
    for secret in (f"http://me:{SECRET}@host/v1", f"https://host/v1?key={SECRET}"):
        with pytest.raises(ConfigError, match="without user, password") as caught:
            base_url(secret)
        assert SECRET not in str(caught.value)
    for given in ("http://a:8/", "http://a:8/v1", "http://a:8/v1/completions"):
        assert base_url(given) == "http://a:8/v1"
