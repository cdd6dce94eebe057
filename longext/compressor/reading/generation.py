"""What `longext generate` does: continue a text with a plain model inside its window, or with a compressor's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.compressor.checkpoint import check_base_options, is_compressor, load_compressor
from longext.compressor.config import GenerateConfig
from longext.compressor.reading.readers import find_compressor, load_reader
from longext.compressor.reading.session import Session
from longext.compressor.schedule import spelled
from longext.data.documents import SAMPLE
from longext.errors import ConfigError, DataError
from longext.models.answers import begins_thought
from longext.models.chat import (
    chat_frame,
    chat_tokens,
    check_asking,
    set_asking,
    stripped_marks,
    user_text,
    uses_template,
)
from longext.models.decode import Sampler, check_sampling, continue_rows, generate
from longext.models.hf import HFLanguageModel, load_language_model
from longext.models.turns import split_thought
from longext.untrusted import read_text

OnText = Callable[[str], object]


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: what is new, without a thought that was taken off and without what ended it.
        tokens: all that is new.
        num_read: tokens before it.
        tokens_per_second: after the first new token.
        memory: slots, bytes, ratio, thinned and forgotten tokens of a memory; None for a plain model.
        num_thought_tokens: of the thought that was taken off.
    """

    text: str
    tokens: tuple[int, ...]
    num_read: int
    tokens_per_second: float
    memory: dict[str, Any] | None
    num_thought_tokens: int = 0


class TextStream:
    """Turns tokens into pieces of text as soon as they are whole characters.

    A token is decoded together with its predecessors, since spaces and characters may depend on them. Ending tokens
    and thoughts (see `split_thought`) make no text.

    Args:
        model: whose tokens they are.
        marks: texts around a thought that is taken off, None for none.
        prompt: the tokens before the first.
    """

    def __init__(
        self,
        model: HFLanguageModel,
        on_text: OnText,
        marks: tuple[str, str] | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        self._model, self._on_text, self._ends = model, on_text, model.ending_tokens
        self._marks, self._is_begun = marks, marks is not None and begins_thought(model, prompt, marks)
        self._may_be_thought = marks is not None
        self.num_thought = 0
        self._context, self._told = 0, 0  # decoding starts at the one; tokens before the other have been told
        self.tokens: list[int] = []
        self.times: list[float] = []

    def add(self, token: int) -> None:
        """Take a token, and tell the text it completes."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        if self._marks and self._may_be_thought:
            self._find_thought(self._marks)
        if not self._may_be_thought:
            self._tell(is_last=False)

    def end(self) -> None:
        """Tell what is left, whole or not."""
        if self._marks and self._may_be_thought:
            self.num_thought, _ = split_thought(self._raw, self.tokens, self._marks, self._is_begun)
            self._context = self._told = self.num_thought
        self._tell(is_last=True)

    def _find_thought(self, marks: tuple[str, str]) -> None:
        """Decide, as soon as it can be told, what of the tokens so far is a thought."""
        text = self._raw(self.tokens)
        begun = text.lstrip()
        if marks[1] in text:
            self.num_thought, _ = split_thought(self._raw, self.tokens, marks, self._is_begun)
            self._context = self._told = self.num_thought
        elif self._is_begun or begun.startswith(marks[0]) or marks[0].startswith(begun):
            return
        self._may_be_thought = False

    def _raw(self, ids: Sequence[int]) -> str:
        return str(self._model.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([token for token in ids if token not in self._ends])

    def _tell(self, is_last: bool) -> None:
        known = self._decode(self.tokens[self._context : self._told])
        text = self._decode(self.tokens[self._context :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not is_last):
            return
        self._on_text(text[len(known) :])
        self._context, self._told = self._told, len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token; 0 if there is none."""
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.times) - 1) / seconds if seconds else 0.0

    def result(self, num_read: int, memory: dict[str, Any] | None) -> Generated:
        """Return what was written."""
        text, count = self._decode(self.tokens[self.num_thought :]), self.num_thought
        return Generated(text, tuple(self.tokens), num_read, self.tokens_per_second, memory, count)


def check_generate_config(config: GenerateConfig) -> None:
    """Raise ConfigError for what can be told to be wrong before anything is loaded."""
    check_sampling(config.temperature, config.top_p)
    check_asking(config)
    if config.template_arg and not config.chat_template:
        raise ConfigError("--template-arg is for the chat template: add --chat-template.")
    if not (config.prompt or config.context or config.memory):
        raise ConfigError("There is nothing to continue: give --prompt, --context or --memory.")
    if not config.max_new_tokens and not config.save_memory:
        raise ConfigError("--max-new-tokens 0 writes nothing; it is for --save-memory alone.")
    if config.output is not None:
        raise ConfigError("`output` is not for generate: it prints the text; --save-memory keeps the memory.")
    if config.save_memory is not None:
        _check_saving(config, Path(config.save_memory).expanduser())
    if is_compressor(config.model):
        check_base_options(config)
        return
    names = ("save_memory", "ratio", "base")
    wrong = ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(config, name))
    if wrong:
        raise ConfigError(
            f"{config.model} is a plain model, which takes no {wrong}: give the -o directory of "
            "`longext compress-train`."
        )
    if config.memory:
        find_compressor(config.memory)


def _check_saving(config: GenerateConfig, path: Path) -> None:
    if config.context is None:
        raise ConfigError("--save-memory keeps what --context is read into: give --context.")
    is_other = (path.exists() or path.is_symlink()) and not path.is_file()  # a directory, a device, a dead link
    if is_other or not path.parent.is_dir():
        raise ConfigError(f"--save-memory {path} must be a file in a directory that exists.")
    if path.exists() and not config.force:
        raise ConfigError(f"{path} exists already: choose another --save-memory, or add --force to replace it.")


def read_context(name: str | None) -> str:
    """Return the text of a UTF-8 file, of the bundled story for "sample", or nothing for None.

    Raises:
        DataError: no such file, or not text.
    """
    if name is None:
        return ""
    path = SAMPLE_DOCUMENT if name == SAMPLE else Path(name).expanduser()
    try:
        return read_text(path)
    except FileNotFoundError as error:
        raise DataError(f"No text file '{name}' for --context ('{SAMPLE}' is the bundled story).") from error


def open_writer(config: GenerateConfig) -> Writer:
    """Load what `config` names, ready to read and write.

    Raises:
        ConfigError, DataError, CheckpointError: as the message says.
    """
    check_generate_config(config)
    context = read_context(config.context)
    if is_compressor(config.model):
        return MemoryWriter(config, context)
    return ReaderWriter(config, context) if config.memory else Writer(config, context)


class Writer:
    """A model that has the whole text in its window: it reads what a config names, and then continues it.

    Attributes:
        num_unread: tokens that `read` will read.
        notes: what the reader of the text has to know, once all is read.

    Raises:
        ConfigError: the text and what is to come do not fit.
    """

    notes: Sequence[str] = ()

    def __init__(self, config: GenerateConfig, context: str) -> None:
        self._config = config
        self._model = load_language_model(config)
        set_asking(self._model, config)
        self._ids = _prompt_ids(self._model, config, context)
        self.num_unread = len(self._ids)
        if self.num_unread + config.max_new_tokens > self._model.context_length:
            raise ConfigError(
                f"{self.num_unread:,} tokens of text and --max-new-tokens {config.max_new_tokens:,} exceed the "
                f"{self._model.context_length:,} positions of {config.model}: give less text, extend the model "
                "(longext extend), or give a compressor trained on it (longext compress-train)."
            )
        if not self._ids:
            raise ConfigError("There is nothing to continue: the text given has no tokens.")

    def read(self, advance: Callable[[int], object]) -> None:
        """Read context and prompt, here when the first token is written; `advance` is told how many tokens more."""
        advance(self.num_unread)

    def write(self, on_text: OnText) -> Generated:
        """Continue, with transformers' own generation and no setting of the checkpoint's but its ending tokens.

        Args:
            on_text: told the text in pieces as it comes.
        """
        config, stream = self._config, self._stream(on_text, self._ids)
        drawn = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        settings: dict[str, Any] = {"streamer": _Streamer(stream), **(drawn if config.temperature else {})}
        torch.manual_seed(config.seed)
        generate(self._model, [self._ids], config.max_new_tokens, self._model.ending_tokens, **settings)
        return stream.result(len(self._ids), None)

    def _stream(self, on_text: OnText, prompt: Sequence[int]) -> TextStream:
        """Return what takes the tokens; thoughts are taken off as asked, or (None) with --chat-template."""
        strip = self._config.strip_thinking
        is_stripped = self._config.chat_template if strip is None else strip
        return TextStream(self._model, on_text, stripped_marks(self._model) if is_stripped else None, prompt)


def _prompt_ids(model: HFLanguageModel, config: GenerateConfig, context: str) -> list[int]:
    """Return context and prompt in tokens; as one message of a user with --chat-template."""
    prompt = config.prompt or ""
    if config.chat_template:
        uses_template(model, True)
        return chat_tokens(model, user_text(model, f"{context}{prompt}"))
    written = user_text(model, context), user_text(model, prompt)
    return [*model.encode(written[0]), *model.encode(written[1], add_bos=False)]


class _Streamer:
    """Hands transformers' tokens on; the first it gives is the text before them."""

    def __init__(self, stream: TextStream) -> None:
        self._stream, self._has_begun = stream, False

    def put(self, tokens: torch.Tensor) -> None:
        """Take int64 [1, n] once, then one token a call."""
        if self._has_begun:
            self._stream.add(int(tokens))
        self._has_begun = True

    def end(self) -> None:
        """Tell the rest."""
        self._stream.end()


class ReaderWriter(Writer):
    """A model that reads a text of any length by segments, with a memory as `eval --memory` names it."""

    def __init__(self, config: GenerateConfig, context: str) -> None:
        assert config.memory
        self._config = config
        self._reader = load_reader(config, config.memory)
        self._model = self._reader.plain
        set_asking(self._model, config)
        self._ids = _prompt_ids(self._model, config, context)
        self.num_unread = len(self._ids)
        if not self._ids:
            raise ConfigError("There is nothing to continue: the text given has no tokens.")

    def read(self, advance: Callable[[int], object]) -> None:
        """Read context and prompt by segments."""
        unread = self.num_unread

        def tell(amount: int) -> None:
            nonlocal unread
            unread -= amount
            advance(amount)

        self._text = self._reader.stream(self._ids, tell)
        advance(unread)

    def write(self, on_text: OnText) -> Generated:
        """Continue, going on by segments; `on_text` is told the text in pieces as it comes."""
        config, stream, text = self._config, self._stream(on_text, self._ids), self._text

        def take(token: torch.Tensor) -> None:
            stream.add(int(token))
            text.add(token)

        choose = Sampler(config.temperature, config.top_p, config.seed)
        continue_rows(text.next_logits, take, config.max_new_tokens, self._model.ending_tokens, choose)
        stream.end()
        kept = {name: getattr(text.trail, name) for name in ("num_slots", "num_bytes") if hasattr(text.trail, name)}
        return stream.result(len(self._ids), {"spec": self._reader.spec, **kept})


class MemoryWriter(Writer):
    """A compressor that reads a text of any length and keeps what its memory holds, or goes on from such a memory.

    Raises:
        ConfigError: a ratio that is not the memory's.
        CheckpointError: a memory that this compressor did not write.
    """

    def __init__(self, config: GenerateConfig, context: str) -> None:
        self._config = config
        loaded = load_compressor(
            config.model, base=config.base, device=config.device, dtype=config.dtype, attention=config.attention
        )
        if config.memory:
            self._session = Session.load(Path(config.memory).expanduser(), loaded)
        else:
            self._session = Session.of(loaded, ratio=config.ratio or None)
        written = self._session.trail.schedule.ratios
        if config.ratio and config.ratio != written:
            raise ConfigError(
                f"{config.memory} was written at --ratio {spelled(written)}, not {spelled(config.ratio)}."
            )
        self._model = loaded.plain
        set_asking(self._model, config)
        self._context, self._prompt = self._tokens(context)
        self.num_unread = len(self._context) + len(self._prompt)

    def _tokens(self, context: str) -> tuple[list[int], list[int]]:
        """Return context and prompt in tokens; with --chat-template they are one message, whose turn stays open."""
        model, config = self._model, self._config
        before, after, begins = "", "", False
        if config.chat_template:
            uses_template(model, True)
            frame = chat_frame(model)
            before, after, begins = frame.before, frame.after, frame.begins
        read = f"{'' if config.memory else before}{user_text(model, context)}"
        question = f"{user_text(model, config.prompt or '')}{after}"
        return model.encode(read, add_bos=not (config.memory or begins)), model.encode(question, add_bos=False)

    def read(self, advance: Callable[[int], object]) -> None:
        """Compress the context, save its memory if asked to, and read the prompt."""
        config, session, unread = self._config, self._session, self.num_unread

        def tell(amount: int) -> None:
            nonlocal unread
            unread -= amount
            advance(amount)

        session.absorb(self._context, tell)
        if config.save_memory is not None:
            session.save(Path(config.save_memory).expanduser())
        session.absorb(self._prompt, tell)
        advance(unread)
        gone, thin, whole = session.num_forgotten, session.num_thinned, session.num_tokens
        if thin and not gone:
            highest = max(session.trail.state.ratios)
            self.notes = [
                f"The memory is full: of {whole:,} tokens read the first {thin:,} ({thin / whole:.0%}) were thinned, "
                f"to {highest}x at most. A higher --ratio keeps all text alike, a longer window more of it."
            ]
        if gone:
            self.notes = [
                f"The memory is full: of {whole:,} tokens read the first {gone:,} ({gone / whole:.0%}) are forgotten, "
                f"and only the last {whole - gone:,} can be used. A higher --ratio or a longer window keeps more."
            ]

    def write(self, on_text: OnText) -> Generated:
        """Continue, compressing what is written as well; `on_text` is told the text in pieces as it comes."""
        config, session = self._config, self._session
        stream, num_read = self._stream(on_text, self._prompt), session.num_tokens
        session.generate(
            config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            on_token=stream.add,
        )
        stream.end()
        names = ("num_slots", "num_bytes", "num_forgotten", "num_thinned")
        memory = {name: getattr(session, name) for name in names}
        ratio = session.ratio if isinstance(session.ratio, int) else spelled(session.ratio)
        return stream.result(num_read, {**memory, "ratio": ratio})
