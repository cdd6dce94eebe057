"""Documents: folders, splits, and what is not a document."""

from __future__ import annotations

import os

import pytest

from longext.data.documents import data_hash, load_documents
from longext.errors import DataError
from longext.options import DataConfig
from longext.untrusted import take_notes


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


def test_files_that_a_split_leaves_out_are_told(tmp_path):
    fill(tmp_path, "train_journey.txt", "war.txt", "peace.txt")
    assert ids(tmp_path, split="train") == ["train_journey.txt"]
    assert "Left out are 2 that name no split, as peace.txt" in take_notes()[0]


def test_a_plain_folder_is_read_whole(tmp_path):
    fill(tmp_path, "a.txt", "the-test-of-time.txt", "sub/z.md")
    assert ids(tmp_path, split="validation") == ["a.txt", "z.md", "the-test-of-time.txt"]


def test_a_folder_of_one_split_is_read_whatever_the_split_asked_for(tmp_path):
    fill(tmp_path, "validation/a.txt")
    assert ids(tmp_path) == ["a.txt"]
    assert "names the split validation, not 'test' (--split): all its files were read" in take_notes()[0]
    assert ids(tmp_path, split="validation") == ["a.txt"] and not take_notes()


def test_max_documents_and_the_hash_follow_the_texts(tmp_path):
    fill(tmp_path, "a.txt", "b.txt")
    assert ids(tmp_path, max_documents=1) == ["a.txt"]
    whole = load_documents(DataConfig(data=str(tmp_path)))
    assert data_hash(whole) == data_hash(whole)
    assert data_hash(whole) != data_hash(whole[:1])


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_is_its_bytes_without_the_mark_in_front(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n")
    (document,) = load_documents(DataConfig(data=str(tmp_path / name)))
    assert document.text == "one\r\ntwo\rthree\n\r\n"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_mark_in_front_of_json_is_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r\n')
    assert [own.text for own in load_documents(DataConfig(data=str(tmp_path / name)))] == ["one\r\ntwo"]


def test_hidden_folders_and_files_hold_no_text(tmp_path):
    for name in (".git/a.txt", ".ipynb_checkpoints/b.md", "c/.d.txt", "c/e.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    assert [own.text for own in load_documents(DataConfig(data=str(tmp_path / "data")))] == ["c/e.txt"]
    (tmp_path / "data/f.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"f.txt is a link to a file that is not there"):
        load_documents(DataConfig(data=str(tmp_path / "data")))


def test_a_name_that_is_not_utf8_is_spelled_in_escapes(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.txt")
    path.write_text("text")
    (document,) = load_documents(DataConfig(data=str(path)))
    assert document.id == "\\udcff.txt"
    assert len(data_hash([document])) == 64
