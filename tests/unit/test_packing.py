"""Token caches and rows against a straightforward reference, and what happens when things go wrong around them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BatchEncoding

import longext.data.cache as token_cache
from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.checks import check_token_cache
from longext.data.cache import TokenizedText, build_token_cache, open_token_cache
from longext.data.documents import data_hash, iterate_documents, load_documents
from longext.data.packing import PackedExamples, PackedRows, collate_rows, pack_lengths, pose_positions
from longext.data.rows import _batches, cached_tokens, encode_documents, open_rows, tokenizer_hash
from longext.errors import ConfigError, DataError
from longext.options import DataConfig
from longext.training.config import FinetuneConfig

LENGTHS = (5, 1, 17, 8, 3, 30, 2, 9)  # documents of a small stream: 75 tokens


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGEXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])


def small_cache(directory, lengths=LENGTHS, trained=None):
    stream = iter(range(100_000, 200_000))
    texts = [
        TokenizedText(id=f"d{n}", input_ids=[next(stream) for _ in range(k)], trained=trained and trained(k))
        for n, k in enumerate(lengths)
    ]
    return build_token_cache(texts, directory, meta=lambda: {"pad_token_id": 7})


def books(tmp_path, *texts):
    folder = tmp_path / "books"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return FinetuneConfig(model="books-5m", data=str(folder))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_tokens_make_the_round_trip_and_ids_above_65535_survive(tmp_path):
    cache = small_cache(tmp_path / "c")
    assert cache.tokens.tolist() == list(range(100_000, 100_075))
    assert np.diff(cache.bounds).tolist() == list(LENGTHS)
    assert cache.names(2, 4) == ["d2", "d3"]
    again = pickle.loads(pickle.dumps(cache))
    assert again.num_documents == 8 and again.tokens.tolist() == cache.tokens.tolist()
    assert cache.tokens.dtype == np.dtype("<u4") and (tmp_path / "c/tokens.bin").stat().st_size == 75 * 4


def test_documents_get_bos_and_eos_and_empty_ones_are_counted(tmp_path, tokenizer):
    config = books(tmp_path, "One day.", "  \n", "Another day.")
    cache = cached_tokens(config, tokenizer, length=8)
    texts = [tokenizer.decode(cache.tokens[a:b]) for a, b in zip(cache.bounds[:-1], cache.bounds[1:], strict=True)]
    assert texts == ["<s>One day.</s>", "<s>Another day.</s>"]
    assert cache.meta["num_empty_documents"] == 1
    assert cache.meta["data_sha256"] == data_hash(load_documents(DataConfig(data=config.data)))


def test_documents_are_tokenised_in_batches_and_read_one_batch_ahead_at_most(tokenizer):
    read = []

    def documents():
        for number in range(6):
            read.append(number)
            yield f"d{number}", "word " * 10

    encoded = encode_documents(documents(), tokenizer, batch_characters=100)
    assert [next(encoded).id, next(encoded).id] == ["d0", "d1"] and read == [0, 1]
    assert len(list(encoded)) == 4
    assert [len(batch) for batch in _batches([("a", "b"), ("c", "long" * 9), ("d", "e")], 30)] == [1, 1, 1]
    whole = list(encode_documents([("a", "b " * 9)], tokenizer))[0].input_ids
    assert list(encode_documents([("a", "b " * 9)], tokenizer, max_tokens=4))[0].input_ids == whole[:4]


def test_a_tokenizer_whose_bos_is_its_eos_or_that_has_none(tokenizer):
    class Fake:
        bos_token_id = eos_token_id = 5
        prefix: list[int] = []

        def __call__(self, texts, add_special_tokens=True, **_):
            ids = [*(self.prefix if add_special_tokens else []), 1, 2]
            return BatchEncoding({"input_ids": ids if isinstance(texts, str) else [ids for _ in texts]})

    assert list(encode_documents([("a", "x")], Fake()))[0].input_ids == [1, 2, 5]
    Fake.bos_token_id = Fake.eos_token_id = None
    assert list(encode_documents([("a", "x")], Fake()))[0].input_ids == [1, 2]
    Fake.prefix = [8, 9]  # GLM's [gMASK]<sop>: no BOS, two tokens before every text
    assert list(encode_documents([("a", "x")], Fake()))[0].input_ids == [8, 9, 1, 2]


def test_no_text_at_all_is_an_error_and_leaves_nothing(tmp_path, root, tokenizer):
    with pytest.raises(DataError, match="holds no text"):
        cached_tokens(books(tmp_path, " ", "\n"), tokenizer, length=8)
    assert list(root.iterdir()) == []


def test_documents_are_iterated_lazily(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n')
    documents = iterate_documents(DataConfig(data=str(tmp_path / "a.jsonl")))
    assert next(documents).text == "one"
    with pytest.raises(DataError, match="a.jsonl, line 2 is not valid JSON"):
        next(documents)


def test_a_broken_file_leaves_no_cache(tmp_path, root, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="line 2: no text under 'text'"):
        cached_tokens(FinetuneConfig(model="m", data=str(tmp_path / "a.jsonl")), tokenizer, length=8)
    assert list(root.iterdir()) == []


def test_a_cache_is_used_again_and_made_anew_when_anything_it_depends_on_changes(tmp_path, tokenizer):
    made = []

    def tokens(config, tokenizer=tokenizer, length=8):
        before = len(made)
        cached_tokens(config, tokenizer, length=length, on_progress=made.append)
        return len(made) > before

    config = books(tmp_path, "One day.", "Another day.")
    assert tokens(config) and not tokens(config)
    assert not tokens(config, length=16)  # rows of another length come from the same tokens
    assert not tokens(FinetuneConfig(model="other", data=config.data, seed=5))
    assert tokens(FinetuneConfig(model="m", data=config.data, max_documents=1))
    assert tokens(FinetuneConfig(model="m", data=config.data, max_tokens=3))
    other = AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])
    other.add_tokens(["day"])
    assert tokens(config, other)
    books(tmp_path, "One fay.", "Another day.")  # as long as before
    assert tokens(config) and not tokens(config)


def test_the_tokenizer_hash_ignores_what_calls_leave_behind(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer("a b c", truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before


def test_a_hub_cache_made_online_serves_offline(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([{"text": "a book of the Hub"}]))
    monkeypatch.setattr("longext.data.documents._hub_commit", lambda name: "abc")
    config = FinetuneConfig(model="m", data="owner/books")
    online = cached_tokens(config, tokenizer, length=8)

    def unreachable(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("longext.data.documents._hub_commit", lambda name: None)
    assert cached_tokens(config, tokenizer, length=8).directory == online.directory
    with pytest.raises(DataError, match="cannot be read"):
        cached_tokens(FinetuneConfig(model="m", data="owner/others"), tokenizer, length=8)
    monkeypatch.setattr("longext.data.documents._hub_commit", lambda name: "def")
    with pytest.raises(DataError, match="cannot be read"):  # a new commit is new data
        cached_tokens(config, tokenizer, length=8)


def _build_slowly(directory, barrier):
    def texts():
        yield TokenizedText(id="a", input_ids=[1, 2, 3])
        barrier.wait(30)  # both are in the middle
        yield TokenizedText(id="b", input_ids=[4])

    cache = build_token_cache(texts(), directory)
    assert cache.tokens.tolist() == [1, 2, 3, 4]


def test_two_builders_of_one_cache_both_end_well(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    builders = [context.Process(target=_build_slowly, args=(tmp_path / "c", barrier)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_the_second_builder_uses_what_the_first_made(tmp_path):
    def slow():
        small_cache(tmp_path / "c")  # another process was faster
        yield TokenizedText(id="mine", input_ids=[1])

    assert build_token_cache(slow(), tmp_path / "c").num_tokens == 75
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("file", ["tokens.bin", "documents.bin", "labels.bin", "names.jsonl"])
def test_a_file_altered_at_the_same_size_is_refused_and_replaced(tmp_path, file):
    """One bit, and the time of the file as it was."""
    directory = tmp_path / "c"
    whole = small_cache(directory, trained=lambda k: [True] * k).tokens.tolist()
    path = directory / file
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=f"{file} is not what was written"):
        open_token_cache(directory)
    assert small_cache(directory, trained=lambda k: [True] * k).tokens.tolist() == whole


def test_a_token_without_a_row_of_embeddings_is_named(tmp_path, tokenizer):
    cache = small_cache(tmp_path / "c")
    largest = int(cache.tokens.max())
    check_token_cache(cache, largest + 1, tokenizer, "d")
    check_token_cache(cache, None, tokenizer, "d")
    with pytest.raises(DataError, match=rf"d holds the token '.+' \({largest}\), and the model has {largest:,} rows"):
        check_token_cache(cache, largest, tokenizer, "d")


@pytest.mark.parametrize("damage", ["tokens.bin", "documents.bin", "labels.bin", "meta.json"])
def test_a_damaged_cache_is_refused_and_replaced(tmp_path, damage):
    directory = tmp_path / "c"
    small_cache(directory, trained=lambda k: [False] + [True] * (k - 1))
    if damage == "labels.bin":
        (directory / damage).unlink()  # prompts must not be trained on by accident
    else:
        (directory / damage).write_bytes((directory / damage).read_bytes()[:-8])
    with pytest.raises(DataError, match="Delete the directory"):
        open_token_cache(directory)
    assert small_cache(directory).num_tokens == 75
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full():
        yield TokenizedText(id="a", input_ids=[1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match="Set LONGEXT_CACHE"):
        build_token_cache(full(), tmp_path / "root/c")
    assert list((tmp_path / "root").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Set LONGEXT_CACHE"):
        build_token_cache([], tmp_path / "file/c")


# --- rows -------------------------------------------------------------------------------------------------------------


def reference_row(cache, start, length, separate):
    ids, labels, owners = [], [], []
    owner_of = np.repeat(np.arange(cache.num_documents), np.diff(cache.bounds))
    for t in range(start, start + length):
        ids.append(int(cache.tokens[t]))
        owners.append(int(owner_of[t] - owner_of[start]))
        first = t > start and owner_of[t] != owner_of[t - 1]
        labels.append(-100 if separate and first else ids[-1])
    return {"input_ids": ids, "labels": labels, "document_ids": owners}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("length", [1, 4, 10, 75])
def test_rows_equal_the_reference_and_an_epoch_sees_every_token_once(tmp_path, length, separate):
    cache = small_cache(tmp_path / "c")
    number = 75 // length
    rows = PackedRows(cache, length, 3, 2 * number, separate_documents=separate)
    assert rows.num_available == number and len(rows) == 2 * number
    for epoch in range(2):
        seen = []
        for i in range(epoch * number, (epoch + 1) * number):
            row = rows[i]
            start = int(row["input_ids"][0]) - 100_000
            assert {key: value.tolist() for key, value in row.items()} == reference_row(cache, start, length, separate)
            assert all(value.dtype == torch.int64 for value in row.values())
            seen += row["input_ids"].tolist()
        assert sorted(seen) == list(range(100_000, 100_000 + number * length))


def test_rows_depend_on_seed_and_number_only(tmp_path):
    cache = small_cache(tmp_path / "c")
    make = lambda seed=0: PackedRows(cache, 4, seed, 60, positions="pose", target_length=64)  # noqa: E731
    rows = make()
    forward = [rows[i] for i in range(60)]
    backward = [rows[i] for i in reversed(range(60))][::-1]  # the order of asking, resuming
    ranks = [PackedRows(cache, 4, 0, 60, positions="pose", target_length=64) for _ in range(3)]
    shared = [ranks[i % 3][i] for i in range(60)]  # three processes
    workers = [collate_rows([row]) for row in DataLoader(make(), batch_size=None, num_workers=2)]
    for i in range(60):
        for key, value in forward[i].items():
            assert torch.equal(value, backward[i][key]) and torch.equal(value, shared[i][key])
            assert torch.equal(value[None], workers[i][key])
    first = [[int(row["input_ids"][0]) for row in forward[k : k + 18]] for k in (0, 18)]
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])  # epochs differ in order only
    assert any(not torch.equal(make(1)[i]["input_ids"], forward[i]["input_ids"]) for i in range(18))


def test_rows_outside_the_run_do_not_exist(tmp_path):
    rows = PackedRows(small_cache(tmp_path / "c"), 4, 0, 5)
    for index in (5, -1):
        with pytest.raises(IndexError):
            rows[index]
    assert len(list(rows)) == 5


def test_a_stream_too_short_says_how_long_it_is(tmp_path):
    with pytest.raises(DataError, match="has 75 tokens, too few for one row of 76"):
        PackedRows(small_cache(tmp_path / "c"), 76, 0, 1)


def test_a_row_can_be_described(tmp_path):
    cache = small_cache(tmp_path / "c", lengths=(5, 5, 1, 1, 1, 1, 1))
    assert PackedRows(cache, 15, 0, 3).describe(2) == (
        "row 2 (epoch 2): tokens 0 to 14 of the data, from d0, d1, d2, d3 and 3 more"
    )
    assert "tokens 5 to 9 of the data, from d1" in {PackedRows(cache, 5, 0, 3).describe(i)[17:] for i in range(3)}


def test_rows_are_stacked(tmp_path):
    rows = PackedRows(small_cache(tmp_path / "c"), 4, 0, 5)
    batch = collate_rows([rows[0], rows[1]])
    assert set(batch) == {"input_ids", "labels", "document_ids"}
    assert torch.equal(batch["labels"], torch.stack([rows[0]["labels"], rows[1]["labels"]]))


# --- whole examples ---------------------------------------------------------------------------------------------------


def test_packing_is_a_partition_without_overflow_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 101, 3000)
    rows = pack_lengths(lengths, 100, 0)
    assert sorted(item for row in rows for item in row) == list(range(3000))
    sums = [sum(lengths[row]) for row in rows]
    assert max(sums) <= 100 and np.mean(sums) > 97
    assert rows == pack_lengths(lengths, 100, 0) != pack_lengths(lengths, 100, 1)


def test_examples_stay_whole_padded_at_the_right_and_each_is_seen_once(tmp_path):
    cache = small_cache(tmp_path / "c", trained=lambda k: [False] * ((k + 1) // 2) + [True] * (k // 2))
    rows = PackedExamples(cache, 32, 0, 50)
    seen = []
    for i in range(rows.num_available):
        row = {key: value.tolist() for key, value in rows[i].items()}
        ids, labels, owners = row["input_ids"], row["labels"], row["document_ids"]
        used = owners.index(-1) if -1 in owners else 32
        assert (ids[used:], labels[used:], owners[used:]) == tuple([x] * (32 - used) for x in (7, -100, -1))
        for owner in range(max(owners) + 1):
            here = [t for t in range(32) if owners[t] == owner]
            size = len(here)
            example = int(np.searchsorted(cache.bounds, ids[here[0]] - 100_000))
            assert here == list(range(here[0], here[-1] + 1)) and size == LENGTHS[example]
            assert [ids[t] for t in here] == [int(cache.bounds[example]) + 100_000 + k for k in range(size)]
            assert [labels[t] for t in here] == [-100] * ((size + 1) // 2) + [ids[t] for t in here[(size + 1) // 2 :]]
            seen.append(example)
    assert sorted(seen) == list(range(8))
    assert rows.describe(0).startswith("row 0 (epoch 0): ")
    with pytest.raises(DataError, match="An example has 30 tokens"):
        PackedExamples(cache, 29, 0, 1)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 16])
def test_pose_positions_rise_and_stay_inside(num_chunks):
    generator = np.random.default_rng(0)
    for _ in range(200):
        positions = pose_positions(16, 64, generator, num_chunks)
        steps = positions.diff()
        assert positions.dtype == torch.int64 and positions.shape == (16,)
        assert positions[0] == 0 and positions[-1] < 64 and steps.min() >= 1
        assert (steps > 1).sum() <= num_chunks - 1


def test_pose_reaches_every_position_with_the_paper_s_distribution():
    generator = np.random.default_rng(0)
    draws = np.stack([pose_positions(8, 32, generator).numpy() for _ in range(20_000)])
    skips = draws[:, -1] - 7
    counts = np.bincount(skips, minlength=25)
    assert len(counts) == 25 and abs(counts / 800 - 1).max() < 0.2  # u_1 is uniform in 0 .. 24
    cuts = np.argmax(np.diff(draws[skips > 0], axis=1) > 1, axis=1)
    assert abs(np.bincount(cuts, minlength=7) / (len(cuts) / 7) - 1).max() < 0.1  # and the cut in 1 .. 7
    assert set(np.unique(draws)) == set(range(32))


def test_pose_rows_have_positions_and_others_do_not(tmp_path):
    cache = small_cache(tmp_path / "c")
    assert "position_ids" not in PackedRows(cache, 8, 0, 9)[0]
    rows = PackedRows(cache, 8, 0, 40, positions="pose", target_length=64)
    drawn = {tuple(rows[i]["position_ids"].tolist()) for i in range(40)}
    assert len(drawn) > 30 and max(max(row) for row in drawn) < 64
    same = PackedRows(cache, 8, 0, 9, positions="pose", target_length=8)[0]
    assert same["position_ids"].tolist() == list(range(8))


@pytest.mark.parametrize("target", [None, 7])
def test_pose_needs_a_longer_target(tmp_path, target):
    with pytest.raises(ConfigError, match="target_length"):
        PackedRows(small_cache(tmp_path / "c"), 8, 0, 1, positions="pose", target_length=target)
    with pytest.raises(ConfigError, match="Did you mean 'pose'"):
        PackedRows(small_cache(tmp_path / "d"), 8, 0, 1, positions="poze")
    with pytest.raises(ConfigError, match="17 chunks"):
        pose_positions(16, 64, np.random.default_rng(0), 17)


# --- from a config ----------------------------------------------------------------------------------------------------


def test_open_rows_of_the_sample(tokenizer):
    progress = []
    config = FinetuneConfig(model="books-5m", data="sample", seed=1)
    rows = open_rows(config, tokenizer, length=512, num_rows=100, on_progress=progress.append)
    text = load_documents(DataConfig())[0].text
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert progress == [len(ids)] and rows.num_available == len(ids) // 512
    epoch = {tuple(rows[i]["input_ids"].tolist()) for i in range(rows.num_available)}
    assert epoch == {tuple(ids[k * 512 : (k + 1) * 512]) for k in range(len(ids) // 512)}
    report = rows.report
    assert report["num_tokens"] == len(ids) and report["row_length"] == 512 and len(report["data_sha256"]) == 64
    assert json.loads(json.dumps(report)) == report
    with pytest.raises(ConfigError, match="got no target_length"):  # said before anything is tokenised
        open_rows(FinetuneConfig(model="m", data="absent", positions="pose"), tokenizer, length=8, num_rows=1)
    with pytest.raises(ConfigError, match="Did you mean 'pretrain'"):
        open_rows(FinetuneConfig(model="m", data="sample", task="pretrian"), tokenizer, length=8, num_rows=1)


def test_the_cache_root_follows_the_environment(monkeypatch):
    from longext.data.cache import cache_root

    monkeypatch.setenv("LONGEXT_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("LONGEXT_CACHE")
    assert cache_root() == Path.home() / ".cache/longext/tokens"
    assert token_cache.SCHEMA == "longext.tokens/1"
