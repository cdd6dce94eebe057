"""Hub ids without a Hub: what is asked of huggingface_hub and datasets, and what their failures become."""

from __future__ import annotations

import pytest

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.source import resolve_model
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint
from longext.data.documents import load_documents
from longext.errors import CheckpointError, DataError
from longext.options import DataConfig


def test_a_hub_model_is_downloaded_without_legacy_weights(monkeypatch, tmp_path):
    asked = {}

    def snapshot(name, revision, ignore_patterns):
        asked.update(name=name, revision=revision, ignored=ignore_patterns)
        return str(BUNDLED_MODELS["books-5m"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    config = ExtendConfig(model="owner/name", revision="v1", method="yarn", factor=8.0, output=str(tmp_path / "out"))
    extend_checkpoint(config)
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert {"*.bin", "*.gguf", "original/*"} <= set(asked["ignored"])
    assert "*.safetensors" not in asked["ignored"]
    assert "base_model: owner/name" in (tmp_path / "out/README.md").read_text()
    resolve_model("owner/name", weights=False)
    assert "*.safetensors" in asked["ignored"]


def test_a_hub_model_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        resolve_model("owner/name")


def test_a_hub_dataset_is_streamed_with_its_split(monkeypatch):
    def load(name, *, split, streaming):
        assert (name, split, streaming) == ("owner/books", "validation", True)
        return iter([{"text": "one"}, {"text": "two"}, {"text": "three"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    documents = load_documents(DataConfig(data="owner/books", split="validation", max_documents=2))
    assert [(document.id, document.text) for document in documents] == [
        ("owner/books:0", "one"),
        ("owner/books:1", "two"),
    ]


def test_a_dataset_with_a_script_is_read_from_the_parquet_copy(monkeypatch):
    def load(_name, *, revision=None, **_keys):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found pg19.py")
        assert revision == "refs/convert/parquet"
        return iter([{"text": "a book"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert load_documents(DataConfig(data="deepmind/pg19"))[0].text == "a book"


def test_a_dataset_that_cannot_be_reached_says_how_to_get_it_elsewhere():
    with pytest.raises(DataError, match="hf download --repo-type dataset owner/books"):
        load_documents(DataConfig(data="owner/books"))
