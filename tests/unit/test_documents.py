"""Documents: folders, splits, and what is not a document."""

from __future__ import annotations

from longext.config import DataConfig
from longext.data.documents import data_hash, load_documents


def ids(folder, **keys):
    return [document.id for document in load_documents(DataConfig(data=str(folder), **keys))]


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")


def test_a_downloaded_dataset_is_read_one_split_at_a_time(tmp_path):
    fill(tmp_path, "README.md", "train/a.txt", "test/b.txt", "test/c.txt")
    assert ids(tmp_path) == ["b.txt", "c.txt"]
    assert ids(tmp_path, split="train") == ["a.txt"]


def test_a_plain_folder_is_read_whole(tmp_path):
    fill(tmp_path, "a.txt", "the-test-of-time.txt", "sub/z.md")
    assert ids(tmp_path, split="validation") == ["a.txt", "z.md", "the-test-of-time.txt"]


def test_a_folder_of_one_split_is_read_whatever_the_split_asked_for(tmp_path):
    fill(tmp_path, "validation/a.txt")
    assert ids(tmp_path) == ["a.txt"]


def test_max_documents_and_the_hash_follow_the_texts(tmp_path):
    fill(tmp_path, "a.txt", "b.txt")
    assert ids(tmp_path, max_documents=1) == ["a.txt"]
    whole = load_documents(DataConfig(data=str(tmp_path)))
    assert data_hash(whole) == data_hash(whole)
    assert data_hash(whole) != data_hash(whole[:1])
