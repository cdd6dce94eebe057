"""What `longext push` would upload, and the card it makes."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import yaml
from command_line import ok
from huggingface_hub.repocard_data import model_index_to_eval_results

from longext.conversion.card import base_name, paths_of, without_folders
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint
from longext.conversion.publish import config_hash

PPL = ("--lengths", "64,128", "--max-tokens", 300, "--num-bootstrap", 5)


@pytest.fixture
def out(tmp_path):
    directory = tmp_path / "private" / "books-1k"
    directory.parent.mkdir()
    base = tmp_path / "private" / "base"
    extend_checkpoint(ExtendConfig(model="books-5m", method="none", output=str(base), check=False))
    extend_checkpoint(ExtendConfig(model=str(base), method="yarn", factor=2.0, output=str(directory), check=False))
    return directory


def front_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_dry_run_lists_files_and_shows_a_card_without_paths_of_this_machine(run, out, tmp_path):
    shown = ok(run("push", out, "me/books-1k", "--dry-run"))
    assert "Dry run: nothing was uploaded." in shown
    assert "No base model with a Hub id is known" in shown
    record = json.loads(ok(run("push", out, "me/books-1k", "--dry-run", "--json")))
    assert set(record["files"]) == {file.name for file in out.iterdir()}
    card = record["card"]
    assert str(tmp_path) not in card
    assert 'from_pretrained("me/books-1k")' in card and "DIR" not in card
    assert "hard links" not in card
    assert "hf download me/books-1k --local-dir HF && python convert_hf_to_gguf.py HF --outfile" in card
    assert front_of(card)["license"] == "apache-2.0", "that of the bundled model"
    assert "The weights of `base`, unchanged" in card


def test_evaluation_results_are_in_the_schema_of_the_hub_and_in_a_table(run, out, tmp_path):
    ok(run("eval", "ppl", out, *PPL, "-o", tmp_path / "results/ppl"))
    measured = json.loads((tmp_path / "results/ppl/result.json").read_text())
    assert measured["model"]["config_sha256"] == config_hash(out)
    args = ("--results", tmp_path / "results", "--base-model", "org/base", "--license", "mit", "--dry-run", "--json")
    card = json.loads(ok(run("push", out, "me/books-1k", *args)))["card"]
    front = front_of(card)
    assert (front["base_model"], front["license"]) == ("org/base", "mit")
    name, results = model_index_to_eval_results(front["model-index"])
    assert name == "books-1k"
    assert [result.metric_value for result in results] == [round(row["ppl"], 6) for row in measured["results"]]
    assert {result.metric_type for result in results} == {"perplexity"}
    assert results[0].dataset_args["protocol"] == measured["protocol"]["id"]
    first = measured["results"][0]
    assert results[0].metric_args == {"low": round(first["ppl_low"], 6), "high": round(first["ppl_high"], 6)}
    assert f"| Perplexity by context length: 64 | {first['ppl']:.4g} |" in card


def test_results_of_another_model_are_refused(run, out, tmp_path):
    ok(run("eval", "ppl", "books-5m", *PPL, "-o", tmp_path / "other"))
    result = run("push", out, "me/x", "--results", tmp_path / "other", "--dry-run")
    assert result.exit_code == 2
    assert "other is of books-5m, not of" in result.stderr


def test_files_that_are_no_part_of_a_checkpoint_are_refused_by_name(run, out, tmp_path):
    (out / "notes.txt").write_text("private")
    (out / "optimizer.pt").write_bytes(b"x")
    (out / "checkpoints").mkdir()
    (out / "LICENSE").symlink_to(tmp_path / "elsewhere")
    result = run("push", out, "me/x", "--dry-run")
    assert result.exit_code == 2
    assert "no part of a checkpoint: LICENSE, checkpoints/, notes.txt, optimizer.pt." in result.stderr
    shown = ok(run("push", out, "me/x", "--dry-run", "--leave-out"))
    assert "Left out: LICENSE, checkpoints/, notes.txt, optimizer.pt." in shown


@pytest.mark.parametrize(
    ("args", "told"),
    [(("books", "me/x"), "There is no directory 'books'"), (("OUT", "x"), "REPO must be OWNER/NAME")],
)
def test_what_cannot_be_pushed_is_said_in_one_line(run, out, args, told):
    result = run("push", *(out if arg == "OUT" else arg for arg in args), "--dry-run")
    assert result.exit_code == 2
    assert told in result.stderr


class Hub:
    """Stands in for the Hub: keeps what it was asked."""

    asked: list = []

    def create_repo(self, repo, **settings):
        self.asked.append((repo, settings))

    def create_commit(self, repo, operations, commit_message):
        self.asked.append({each.path_in_repo: each.path_or_fileobj for each in operations})

        class Info:
            commit_url = "https://hub/me/x/commit/1"

        return Info


def test_an_upload_is_one_commit_of_the_files_and_the_rewritten_texts(run, out, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    shown = ok(run("push", out, "me/x", "--private"))
    assert "Uploaded: https://hub/me/x/commit/1" in shown
    (repo, settings), files = Hub.asked
    assert (repo, settings) == ("me/x", {"private": True, "exist_ok": True})
    assert files["model.safetensors"] == str(out / "model.safetensors")
    for name in ("README.md", "run.json", "recipe.yaml"):
        assert str(tmp_path) not in files[name].decode(), name
    assert json.loads(files["run.json"])["extension"]["base_path"] == "base"
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}, "the directory is as it was"


def test_names_in_place_of_paths():
    cached = f"/home/me/.cache/huggingface/hub/models--org--some-model/snapshots/{'0' * 40}"
    assert base_name(cached) == "org/some-model"
    assert base_name("/data/llama") == "llama"
    assert base_name("org/model") == "org/model"
    line = f"longext extend {cached} --data=/data/books '/my texts/a b' -o out"
    found = paths_of(line)
    assert found == {cached, "/data/books", "/my texts/a b"}
    assert without_folders(line, found) == "longext extend org/some-model --data=books 'a b' -o out"
    kept = "https://hub/data/books and x/data/books, /data/books/more, /data/bookshelf"
    assert without_folders(kept, found) == kept
    assert without_folders('{"a": "/data/books"}', found) == '{"a": "books"}'
