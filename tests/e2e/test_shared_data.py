"""Checks on real data that lies beside a developer's checkout; skipped in a clone without it."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED

from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint
from longext.conversion.verify import verify_checkpoint
from longext.data.documents import load_documents
from longext.options import DataConfig


@pytest.mark.skipif(not (SHARED / "models/books-27m").is_dir(), reason="no books-27m here")
def test_a_real_sharded_checkpoint(tmp_path):
    config = ExtendConfig(
        model=str(SHARED / "models/books-27m"), method="yarn", factor=8.0, output=str(tmp_path / "out"), copy=True
    )
    assert len(extend_checkpoint(config).shards) == 4
    result = verify_checkpoint(str(tmp_path / "out"))
    assert result.ok, result.checks
    assert "SHA-256" in next(check.detail for check in result.checks if check.name == "weights")


@pytest.mark.skipif(not (SHARED / "longbench/multi_news.jsonl").is_file(), reason="no LongBench rows here")
def test_real_jsonl_with_a_column_of_another_name():
    documents = load_documents(DataConfig(data=str(SHARED / "longbench/multi_news.jsonl"), text_field="context"))
    rows = (SHARED / "longbench/multi_news.jsonl").read_text().splitlines()
    assert [document.text for document in documents] == [json.loads(row)["context"] for row in rows]


@pytest.mark.skipif(not (SHARED / "pg19/test").is_dir(), reason="no PG19 books here")
def test_a_folder_of_books_in_a_fixed_order():
    documents = load_documents(DataConfig(data=str(SHARED / "pg19/test"), max_documents=3))
    assert [document.id for document in documents] == sorted(file.name for file in (SHARED / "pg19/test").iterdir())[:3]
