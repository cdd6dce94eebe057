"""From a `finetune` config to training rows: find or build the token cache, then serve rows from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from longext.data.cache import TokenCache, TokenizedText, build_token_cache, cache_root, open_token_cache, read_meta
from longext.data.config import RowsConfig
from longext.data.documents import iterate_documents, iterate_rows, source_identity
from longext.data.packing import PackedExamples, PackedRows, TokenRows, Windows, check_positions
from longext.data.sft import ExampleEncoder
from longext.errors import ConfigError, DataError
from longext.models.tokens import LONG, control_tokens, count_controls, encode_text
from longext.models.turns import prefix_of
from longext.registry import did_you_mean
from longext.untrusted import note

TASKS = ("pretrain", "sft")
KEEP, TEXT = "keep", "text"  # what control tokens that a document spells out are read as
_VERSION = 2  # raise it whenever the same data gives other tokens, so that old caches are not taken for new ones


def open_rows(
    config: RowsConfig,
    tokenizer: Any,
    *,
    length: int,
    num_rows: int,
    windows: Windows | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TokenRows:
    """Return the `num_rows` training rows of `length` tokens that `config` asks for.

    Args:
        length: tokens in a row; with PoSE the window, while `config.target_length` is what positions reach.
        windows: of a run with mixed windows.
        on_progress: called with the number of tokens so far while they are made; never for tokens found in the cache.

    Raises:
        ConfigError: unknown task, prompt or positions.
        DataError: no such data, or too little of it.
    """
    check_positions(config.positions, length, config.target_length)  # before minutes of tokenising
    cache = cached_tokens(config, tokenizer, length=length, on_progress=on_progress)
    places: dict[str, Any] = {"positions": config.positions, "target_length": config.target_length, "windows": windows}
    if config.task == "sft":
        return PackedExamples(cache, length, config.seed, num_rows, **places)
    separate = config.separate_documents or windows is not None
    return PackedRows(cache, length, config.seed, num_rows, separate_documents=separate, **places)


def cached_tokens(
    config: RowsConfig,
    tokenizer: Any,
    *,
    length: int,
    on_progress: Callable[[int], None] | None = None,
) -> TokenCache:
    """Return the tokens of `config.data`, from the cache if the same data, tokenizer and settings were seen before.

    Caches are under `cache_root()`, one directory for each key. Processes that build one at the same time do so
    independently; the first to finish provides it.

    Args:
        length: only supervised examples depend on it (they are cut to it).
        on_progress: called with the number of tokens so far while they are made.

    Raises:
        ConfigError: unknown task or prompt.
        DataError: no such data, or nothing in it to train on.
    """
    if config.control_tokens not in (KEEP, TEXT):
        raise ConfigError(f"`control_tokens` must be {KEEP} or {TEXT}, got '{config.control_tokens}'.")
    if config.control_tokens == TEXT and config.task == "sft":
        raise ConfigError("`control_tokens` text is for --task pretrain: a chat's template is made of control tokens.")
    if config.task not in TASKS:
        raise ConfigError(f"Unknown task '{config.task}'. {did_you_mean(config.task, TASKS)}")
    encoder = ExampleEncoder(tokenizer, length, config) if config.task == "sft" else None
    key = _cache_key(config, tokenizer, encoder)
    cache = _find_cache(key)
    if cache is None:
        cache = _built(config, tokenizer, encoder, key, on_progress)
    number = cache.meta.get("num_control_tokens", 0)
    if number:
        note(
            f"{config.data} spells out {number:,} control tokens (as <s> or <|im_end|>); the model reads them as such. "
            "With --set control_tokens=text they are text."
        )
    return cache


def _built(
    config: RowsConfig,
    tokenizer: Any,
    encoder: ExampleEncoder | None,
    key: Mapping[str, Any],
    on_progress: Callable[[int], None] | None,
) -> TokenCache:
    directory = cache_root() / _digest(key)[:32]
    if encoder is not None:
        texts, meta = encoder.encode(iterate_rows(config)), encoder.meta
    else:
        source = _DocumentSource(config, control_tokens(tokenizer))
        options = {"split_special_tokens": True} if config.control_tokens == TEXT else {}
        texts = encode_documents(
            source, tokenizer, max_tokens=config.max_tokens, on_text=source.count_controls, options=options
        )
        meta = source.meta
    return build_token_cache(
        texts, directory, meta=lambda: {**meta(), "key": key}, on_progress=on_progress, source=config.data
    )


def encode_documents(
    documents: Iterable[tuple[str, str]],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    batch_characters: int = 1 << 20,
    on_text: Callable[[list[int]], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[TokenizedText]:
    """Yield each (name, text) as BOS + its tokens + EOS, those of the two that the tokenizer has; no other special.

    What the tokenizer itself puts before a text (GLM: two tokens) is there instead of BOS. A tokenizer whose BOS is
    its EOS (GPT-2) gets only the EOS. Documents without text are passed over.

    Args:
        max_tokens: cut each document to its first `max_tokens` tokens, BOS included.
        batch_characters: about how much text is tokenised at a time.
        on_text: called with the tokens of each text itself.
        options: of the tokenizer's calls.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = list(prefix_of(tokenizer)) or ([] if bos is None or bos == eos else [bos])
    end = [] if eos is None else [eos]
    for batch in _batches(((name, text) for name, text in documents if text.strip()), batch_characters):
        for name, ids in _encoded(batch, tokenizer, max_tokens, options or {}):
            if on_text is not None:
                on_text(ids)
            ids[:0] = start
            ids += end
            del ids[max_tokens if max_tokens is not None else len(ids) :]
            yield TokenizedText(id=name, input_ids=ids)


def _encoded(
    batch: list[tuple[str, str]], tokenizer: Any, max_tokens: int | None, options: Mapping[str, Any]
) -> Iterator[tuple[str, list[int]]]:
    """Yield (name, tokens) of each text of a batch; a text that is a batch of its own may be of any length."""
    if len(batch) == 1 and len(batch[0][1]) > LONG:
        name, text = batch.pop()
        yield name, encode_text(tokenizer, text, max_tokens, **options)
        return
    encoded = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False, **options)["input_ids"]
    yield from ((name, ids) for (name, _), ids in zip(batch, encoded, strict=True))


def _batches(documents: Iterable[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    num_characters = 0
    for document in documents:
        if batch and len(document[1]) >= size:  # alone it is tokenised in windows
            yield batch
            batch, num_characters = [], 0
        batch.append(document)
        num_characters += len(document[1])
        if num_characters >= size:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 over all of a tokenizer that decides which tokens a text or chat becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        model.update(truncation=None, padding=None)  # left over from earlier calls
    else:
        model = sorted(tokenizer.get_vocab().items())
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return _digest([type(tokenizer).__name__, model, special, tokenizer.chat_template])


class _DocumentSource:
    """The documents of a config as (name, text), counted and hashed while they pass."""

    def __init__(self, config: RowsConfig, controls: frozenset[int]) -> None:
        self._config = config
        self._controls = controls
        self._num_controls = 0
        self._digest = hashlib.sha256()
        self._num_empty = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for document in iterate_documents(self._config):
            if not document.text.strip():
                self._num_empty += 1
                continue
            self._digest.update(document.id.encode() + b"\0" + document.text.encode() + b"\0")
            yield document.id, document.text

    def meta(self) -> dict[str, Any]:
        """Return what has been counted; `data_sha256` equals `data_hash` of the same documents."""
        return {
            "num_empty_documents": self._num_empty,
            "num_control_tokens": self._num_controls,
            "data_sha256": self._digest.hexdigest(),
        }

    def count_controls(self, ids: list[int]) -> None:
        """Count the control tokens that a text spells out."""
        self._num_controls += count_controls(ids, self._controls)


def _cache_key(config: RowsConfig, tokenizer: Any, encoder: ExampleEncoder | None) -> dict[str, Any]:
    """Return all that the tokens depend on."""
    settings: dict[str, Any] = {"max_documents": config.max_documents, "max_tokens": config.max_tokens}
    settings |= {"control_tokens": TEXT} if config.control_tokens == TEXT else {}
    settings |= {"text_field": config.text_field} if encoder is None else encoder.settings
    return {
        "version": _VERSION,
        "task": config.task,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "data": source_identity(config),
        "settings": settings,
    }


def _find_cache(key: Mapping[str, Any]) -> TokenCache | None:
    """Return the cache of `key`; for Hub data out of reach, the newest cache of any commit of it."""
    candidates = [cache_root() / _digest(key)[:32]]
    if key["data"].get("commit", "") is None and cache_root().is_dir():
        folders = [folder for folder in cache_root().iterdir() if not folder.name.startswith(".")]
        candidates += sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    for directory in candidates:
        with contextlib.suppress(DataError, OSError, ValueError, AttributeError, TypeError):
            if _without_commit(read_meta(directory).get("key", {"data": {}})) == _without_commit(key):
                return open_token_cache(directory)
    return None


def _without_commit(key: Mapping[str, Any]) -> Mapping[str, Any]:
    plain = json.loads(json.dumps(key))
    plain["data"].pop("commit", None)
    return dict(plain)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
