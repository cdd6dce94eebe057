"""`longext generate`: plain models and compressors, memories on disk, and whatever is wrong in one line."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import ok

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.compressor.backbone import Backbone
from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, save_compressor
from longext.compressor.spec import CompressorSpec
from longext.compressor.writing.pieces import TextStream
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

PROMPT = ("--prompt", "The old lighthouse", "--max-new-tokens", 12)


@pytest.fixture(scope="module")
def made_compressor(tmp_path_factory):
    """An untrained compressor on books-5m."""
    model = load_language_model(RuntimeConfig(model="books-5m", device="cpu")).model
    spec = CompressorSpec(arch="uio", segment=64, ratios=(8, 16), rank=4, alpha=8)
    directory = tmp_path_factory.mktemp("made")
    save_compressor(directory, build_compressor(Backbone(model), spec), find_base("books-5m"))
    return directory


@pytest.fixture
def compressor(made_compressor, tmp_path):
    """A copy of it in the working directory."""
    shutil.copytree(made_compressor, tmp_path / "uio")
    return "uio"


@pytest.fixture
def story(tmp_path):
    (tmp_path / "story.txt").write_text("The keeper climbed the stairs every night. " * 40)
    return "story.txt"


def test_a_plain_model_continues_as_greedy_does(run, books):
    result = run("generate", "books-5m", *PROMPT)
    expected = books.decode(books.greedy(books.encode(PROMPT[1]), 12))
    assert ok(result) == expected + "\n"
    assert result.stderr.startswith(f"{len(books.encode(PROMPT[1]))} tokens read; 12 written at")


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}, {"num_beams": 3}, {"do_sample": True, "top_k": 3}],
)
def test_settings_of_the_checkpoint_do_not_touch_greedy_text(run, books, tmp_path, settings):
    shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "m")
    path = tmp_path / "m/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    text = ok(run("generate", "m", "--prompt", "He said: he said: he", "--max-new-tokens", 12))
    assert text == books.decode(books.greedy(books.encode("He said: he said: he"), 12)) + "\n"


def test_a_message_goes_through_the_template_and_its_thought_is_hidden(run, tmp_path):
    shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "m")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %} {{ word }} <think>{# </think> #}"
    (tmp_path / "m/chat_template.jinja").write_text(template)
    args = ("generate", "m", "--prompt", "A", "--max-new-tokens", 8, "--template-arg", "word=sea")
    hidden = json.loads(ok(run(*args, "--chat-template", "--json")))
    assert (hidden["text"], hidden["num_thought_tokens"]) == ("", 8)  # a thought without an end
    kept = json.loads(ok(run(*args, "--chat-template", "--no-strip-thinking", "--json")))
    assert kept["tokens"] == hidden["tokens"] and kept["text"] and kept["num_thought_tokens"] == 0
    assert "add --chat-template" in run(*args).stderr
    assert "8 written, 8 of them a thought" in run(*args, "--chat-template").stderr


def test_text_comes_in_whole_characters(books):
    text = "A caf\xe9 in \u6f22\u5b57, na\xefve \U0001f600 and  two spaces"
    pieces: list[str] = []
    stream = TextStream(books, pieces.append)
    tokens = books.encode(text)
    for token in tokens:
        stream.add(token)
    stream.end()
    assert "".join(pieces) == stream.result(0, None).text == books.decode(tokens)
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_draws_repeat_with_their_seed(run):
    draws = [
        ok(run("generate", "books-5m", *PROMPT, "--temperature", 2, "--top-p", 0.9, "--seed", seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_json_is_alone_on_standard_output(run, compressor, story):
    record = json.loads(ok(run("generate", compressor, "--context", story, *PROMPT, "--ratio", 16, "--json")))
    assert record["kind"] == "generate"
    assert len(record["tokens"]) == 12
    assert record["num_read"] > 256
    held = record["memory"]
    assert held["num_slots"] == (record["num_read"] + 12 - 1) // 64 * 4
    assert held["num_bytes"] == (held["num_slots"] + 1) * 4 * 2 * 2 * 64 * 4  # layers, K and V, heads, width, float32
    assert (held["ratio"], held["num_forgotten"]) == (16, 0)


def test_a_saved_memory_stands_for_its_context(run, compressor, tmp_path):
    read = run("generate", compressor, "--context", "sample", "--save-memory", "m.safetensors", *PROMPT)
    text = ok(read)
    assert "tokens thinned" in read.stderr and "%) were thinned, to 64x at most" in read.stderr  # more than the window
    assert "slots" in read.stderr
    again = run("generate", compressor, "--memory", "m.safetensors", *PROMPT)
    assert ok(again) == text
    named = json.loads(ok(run("generate", "--memory", "m.safetensors", *PROMPT, "--json")))
    assert named["model"] == "books-5m" and named["text"] == text[:-1]
    assert again.stderr.split(" tokens read")[0] == read.stderr.split(" tokens read")[0]
    refused = run("generate", compressor, "--context", "sample", "--save-memory", "m.safetensors", *PROMPT)
    assert refused.exit_code == 2
    kept = (tmp_path / "m.safetensors").read_bytes()
    only = ("--context", "sample", "--save-memory", "m.safetensors", "--force", "--max-new-tokens", 0)
    assert ok(run("generate", compressor, *only)).strip() == ""
    assert (tmp_path / "m.safetensors").read_bytes() == kept


def test_a_memory_goes_on_with_more_text(run, compressor, story, tmp_path):
    (tmp_path / "more.txt").write_text("Then the ship came in. " * 20)
    ok(run("generate", compressor, "--context", story, "--save-memory", "a.safetensors", "--max-new-tokens", 0))
    parts = ("--memory", "a.safetensors", "--context", "more.txt")
    ok(run("generate", compressor, *parts, "--save-memory", "b.safetensors", "--max-new-tokens", 0))
    one = ok(run("generate", compressor, "--memory", "b.safetensors", *PROMPT))
    assert one == ok(run("generate", compressor, *parts, *PROMPT))


@pytest.mark.parametrize("spec", ["snapkv:128", "thinned:8+64", "window"])
def test_a_plain_model_reads_beyond_its_window_with_a_memory(run, story, spec):
    args = ("generate", "books-5m", "--context", story, *PROMPT, "--memory", spec)
    record = json.loads(ok(run(*args, "--json")))
    assert record["num_read"] > 256 and len(record["tokens"]) == 12 and record["memory"]["spec"] == spec
    assert spec != "snapkv:128" or record["memory"]["num_slots"] == 128
    assert f"memory {spec}" in run(*args).stderr


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("books-5m",), ("nothing to continue", "--prompt")),
        (("nowhere", *PROMPT), ("No model at 'nowhere'",)),
        (("books-5m", "--context", "none.txt"), ("No text file 'none.txt'", "sample")),
        (("books-5m", "--context", "."), ("folder",)),
        (("books-5m", "--context", "latin.txt"), ("not UTF-8",)),
        (("books-5m", "--context", "sample"), ("512 positions", "longext extend", "compress-train")),
        (("books-5m", *PROMPT, "--memory", "m.safetensors"), ("no trained compressor", "snapkv")),
        (("books-5m", *PROMPT, "--ratio", 8), ("plain model", "--ratio")),
        (("books-5m", *PROMPT, "--temperature", -1), ("--temperature must be >= 0",)),
        (("books-5m", *PROMPT, "--top-p", 0), ("--top-p must be above 0",)),
        (("books-5m", "--prompt", "a", "--max-new-tokens", -1), ("max_new_tokens", ">= 0")),
        (("books-5m", "--prompt", "a", "--max-new-tokens", 0), ("--save-memory",)),
        (("books-5m", *PROMPT, "--set", "output=o"), ("not for generate",)),
        (("uio", *PROMPT, "--save-memory", "m.safetensors"), ("--context",)),
        (("uio", "--context", "latin.txt", "--save-memory", "no/m.safetensors"), ("directory that exists",)),
        (("uio", *PROMPT, "--memory", "none.safetensors"), ("No memory file",)),
        (("uio", *PROMPT, "--memory", "latin.txt"), ("not a memory",)),
        (("uio", *PROMPT, "--ratio", 7), ("does not divide",)),
        (("uio", *PROMPT, "--revision", "main"), ("`revision`", "`base`")),
        (("uio", *PROMPT, "--base", "other"), ("No model at 'other'",)),
    ],
)
def test_bad_input_ends_in_one_line(run, compressor, tmp_path, args, texts):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    result = run("generate", *args)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for text in texts:
        assert text in result.stderr
    assert result.stdout == ""


def test_a_memory_of_another_ratio_or_compressor_is_refused(run, compressor, story, tmp_path):
    ok(run("generate", compressor, "--context", story, "--save-memory", "m.safetensors", "--max-new-tokens", 0))
    assert "--ratio 8, not 16" in run("generate", compressor, "--memory", "m.safetensors", "--ratio", 16).stderr
    model = load_language_model(RuntimeConfig(model="books-5m", device="cpu")).model
    (tmp_path / "gist").mkdir()
    gist = build_compressor(Backbone(model), CompressorSpec(arch="gist", segment=64, sink=0, rank=4, alpha=8))
    save_compressor(tmp_path / "gist", gist, find_base("books-5m"))
    result = run("generate", "gist", "--memory", "m.safetensors")
    assert result.exit_code == 2
    assert "another compressor" in result.stderr
