"""llama.cpp on a GGUF file, through llama-cpp-python: token ids in, logits out."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.errors import CheckpointError, ConfigError, LongextError
from longext.extras import require

if TYPE_CHECKING:
    import numpy as np

BATCH = 512  # tokens that go through the engine at once
_SHORTEST = 512  # tokens of the smallest context
_GGML_F32, _GGML_F16, _GGML_BF16 = 0, 1, 30
CACHES = {"auto": _GGML_F32, "float32": _GGML_F32, "float16": _GGML_F16, "bfloat16": _GGML_BF16}


def llama_cpp() -> Any:
    """Return the package llama_cpp (MissingExtraError: it is not installed)."""
    require("Running a .gguf file", ["gguf"], ["llama_cpp"])
    import llama_cpp as package

    return package


def engine_version() -> str:
    """Return the engine and its version, "llama-cpp-python 0.3.36"."""
    return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"


def runs_on_gpu() -> bool:
    """Return True if the llama.cpp that is installed was built for a GPU."""
    return bool(llama_cpp().llama_supports_gpu_offload())


class LlamaCpp:
    """One model in llama.cpp; contexts are made as long as the texts that come.

    Args:
        path: a .gguf file.
        cache: type of cached keys and values, a name in `CACHES`; "auto" is float32.
        on_gpu: all layers on a GPU, if llama.cpp was built for one.
        num_threads: CPU threads.

    Raises:
        CheckpointError: llama.cpp cannot load the file.
        MissingExtraError: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path, *, cache: str = "auto", on_gpu: bool = False, num_threads: int = 1) -> None:
        if cache not in CACHES:
            raise ConfigError(f"--dtype must be one of {', '.join(CACHES)} (of keys and values), got '{cache}'.")
        self._api = llama_cpp()
        self._cache, self.num_threads, self.on_gpu, self.path = CACHES[cache], num_threads, on_gpu, path
        self._context: Any = None
        self._length = self._position = self._kept = 0
        parameters = self._api.llama_model_default_params()
        parameters.n_gpu_layers = -1 if on_gpu else 0
        with _quiet(self._api):
            self._api.llama_backend_init()
            self._model = self._api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise CheckpointError(f"llama.cpp ({engine_version()}) cannot load {path}: {_last_line()}")
        self._vocabulary = self._api.llama_model_get_vocab(self._model)
        self.num_tokens: int = self._api.llama_vocab_n_tokens(self._vocabulary)

    def close(self) -> None:
        """Free the model; nothing can be computed afterwards."""
        self._free_context()
        self._api.llama_model_free(self._model)

    def _free_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def _reserve(self, length: int) -> None:
        """Make room for `length` tokens, and forget what was read."""
        if self._context is None or length > self._length:
            self._free_context()
            parameters = self._api.llama_context_default_params()
            self._length = max(_SHORTEST, 1 << (length - 1).bit_length())
            parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = self._length, BATCH, BATCH
            parameters.type_k = parameters.type_v = self._cache
            parameters.n_threads = parameters.n_threads_batch = self.num_threads
            parameters.flash_attn_type = 0  # as it is written, in the type of the cache
            with _quiet(self._api):
                self._context = self._api.llama_init_from_model(self._model, parameters)
            if not self._context:
                raise LongextError(f"llama.cpp has no room for {self._length:,} tokens of {self.path}: {_last_line()}")
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def logits(self, input_ids: Sequence[int], first: int = 0, room: int = 0) -> Iterator[np.ndarray[Any, Any]]:
        """Yield float32 logits [n, V] behind the tokens `first` .. T-1 of one text, in pieces of up to `BATCH`.

        A piece is overwritten by the next one.

        Args:
            room: tokens that `go_on` may add.
        """
        self._reserve(len(input_ids) + room)
        self._position = 0
        for start in range(0, len(input_ids), BATCH):
            wanted = self._decode(input_ids[start : start + BATCH], max(first - start, 0))
            if wanted:
                yield self._read(wanted)

    def go_on(self, count: int, ends: frozenset[int]) -> list[int]:
        """Return the greedy continuation of the text whose last logits were just read.

        It has `count` tokens, fewer up to and with one of `ends`.
        """
        new: list[int] = []
        while len(new) < count:
            new.append(int(self._read(1)[0].argmax()))
            if len(new) == count or new[-1] in ends:
                break
            self._decode(new[-1:], 0)
        return new

    def continue_greedily(self, input_ids: Sequence[int], count: int, ends: frozenset[int]) -> list[int]:
        """Return the greedy continuation of one prompt, as `go_on` does."""
        for _ in self.logits(input_ids, len(input_ids) - 1, room=count):
            pass
        return self.go_on(count, ends)

    def _decode(self, tokens: Sequence[int], first: int) -> int:
        """Read tokens behind what was read; return behind how many of them, from `first` on, logits are kept."""
        api, count, position = self._api, len(tokens), self._position
        batch = api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i >= first
            answer = api.llama_decode(self._context, batch)
        finally:
            api.llama_batch_free(batch)
        if answer:
            raise LongextError(f"llama.cpp stopped at token {position:,} of a text ({answer}): {_last_line()}")
        self._position, self._kept = position + count, max(0, count - first)
        return self._kept

    def _read(self, count: int) -> np.ndarray[Any, Any]:
        """Return the last `count` of the logits that were kept."""
        import numpy as np

        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (self._kept, self.num_tokens))[self._kept - count :]

    # --- tokens -------------------------------------------------------------------------------------------------

    @property
    def bos(self) -> int | None:
        """Return the token that begins a text, None if there is none."""
        token = int(self._api.llama_vocab_bos(self._vocabulary))
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        """Return the token that ends a text, None if there is none."""
        token = int(self._api.llama_vocab_eos(self._vocabulary))
        return token if token >= 0 else None

    @property
    def prefix(self) -> tuple[int, ...]:
        """Return the tokens that the engine puts in front of a text."""
        adds = self._api.llama_vocab_get_add_bos(self._vocabulary)
        return (self.bos,) if adds and self.bos is not None else ()

    @property
    def ending_tokens(self) -> frozenset[int]:
        """Return the tokens at which the engine stops."""
        return frozenset(self._tokens_that(self._api.llama_vocab_is_eog))

    @property
    def control_tokens(self) -> list[int]:
        """Return the tokens that are no text."""
        return self._tokens_that(self._api.llama_vocab_is_control)

    def _tokens_that(self, holds: Any) -> list[int]:
        return [token for token in range(self.num_tokens) if holds(self._vocabulary, token)]

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, none in front; control tokens that it spells are read as such."""
        content = text.encode()
        room = len(content) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._api.llama_tokenize(self._vocabulary, content, len(content), tokens, room, False, True)
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, control tokens left out."""
        return b"".join(map(self._piece, tokens)).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._api.llama_token_to_piece(self._vocabulary, token, text, room, 0, False)
            if count >= 0:
                return text.raw[:count]
            room = -count


_lines: list[str] = []
_callback: Any = None


@contextlib.contextmanager
def _quiet(api: Any) -> Iterator[None]:
    """Keep what llama.cpp prints to standard error; its last line says why something failed."""
    global _callback
    if _callback is None:

        def keep(level: int, text: bytes, data: Any) -> None:
            line = text.decode("utf-8", "replace").strip()
            if level in (3, 4) and line:  # warnings and errors
                _lines.append(line)
                del _lines[:-8]

        _callback = api.llama_log_callback(keep)  # ctypes holds no reference to it
    api.llama_log_set(_callback, ctypes.c_void_p(0))
    _lines.clear()
    yield


def _last_line() -> str:
    causes = [line for line in _lines if "error" in line] or _lines[-1:] or ["it gave no reason"]
    return causes[0].partition("error loading model: ")[2] or causes[0]
