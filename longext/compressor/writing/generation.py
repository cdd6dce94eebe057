"""What `longext generate` does: read a context and a prompt with any model and memory, and continue them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.compressor.checkpoint import is_compressor
from longext.compressor.config import GenerateConfig
from longext.compressor.reading.continuing import Choice, Continued
from longext.compressor.reading.session import Session
from longext.compressor.reading.window import WindowSession
from longext.compressor.writing.conversation import Conversation
from longext.compressor.writing.opening import check_memory_config, open_text
from longext.compressor.writing.pieces import Generated, OnText, TextStream
from longext.data.documents import SAMPLE
from longext.errors import ConfigError, DataError
from longext.models.chat import (
    chat_frame,
    chat_tokens,
    check_asking,
    has_template,
    set_asking,
    stripped_marks,
    user_text,
    uses_template,
)
from longext.models.decode import check_sampling
from longext.untrusted import read_text


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
        if config.context is None:
            raise ConfigError("--save-memory keeps what --context is read into: give --context.")
        check_file("--save-memory", config.save_memory, config.force)
    check_memory_config(config)
    if config.when_full and not (config.memory or is_compressor(config.model)):
        raise ConfigError(f"{config.model} is a plain model, whose window refuses what does not fit: no --when-full.")


def check_file(flag: str, name: str, force: bool, advice: str = ", or add --force to replace it") -> None:
    """Raise ConfigError unless a memory file can be written there: a directory that exists, nothing in the way."""
    path = Path(name).expanduser()
    is_other = (path.exists() or path.is_symlink()) and not path.is_file()  # a directory, a device, a dead link
    if is_other or not path.parent.is_dir():
        raise ConfigError(f"{flag} {path} must be a file in a directory that exists.")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already: choose another {flag}{advice}.")


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
    return Writer(config, read_context(config.context))


class Writer:
    """Reads what a config names, and continues it.

    Attributes:
        num_unread: tokens that `read` will read.
        notes: what the reader of the text has to know, once all is read.

    Raises:
        ConfigError: the text and what is to come do not fit, or a memory that cannot be kept.
    """

    def __init__(self, config: GenerateConfig, context: str) -> None:
        self._config = config
        self.notes: Sequence[str] = ()
        self.opened = open_text(config)
        self._model, self._text = self.opened.model, self.opened.text
        set_asking(self._model, config)
        self._text.eos = self._model.ending_tokens
        self.is_chat = bool(config.chat_template) or (
            config.chat_template is None and bool(self.opened.turn) and has_template(self._model)
        )
        self._context, self._prompt = self._tokens(context)
        self.num_unread = len(self._context) + len(self._prompt)
        if not (self.num_unread or self._text.num_tokens):
            raise ConfigError("There is nothing to continue: the text given has no tokens.")
        self._check_room(self._text)
        if config.save_memory is not None:
            self.opened.check_saving()

    def _check_room(self, text: Continued) -> None:
        """Raise ConfigError if all that is to come is more than the text may grow to."""
        config = self._config
        whole = text.num_tokens + self.num_unread + config.max_new_tokens
        is_full = text.limit is not None and whole > text.limit
        if isinstance(text, WindowSession):
            if is_full:
                raise ConfigError(
                    f"{self.num_unread:,} tokens of text and --max-new-tokens {config.max_new_tokens:,} exceed the "
                    f"{text.limit:,} positions of {config.model}: give less text, extend the model "
                    "(longext extend), or give a compressor trained on it (longext compress-train)."
                )
            text.hold_rope(whole)
        elif is_full:
            raise ConfigError(f"{whole:,} tokens, those of --max-new-tokens included: {text.refusal(whole)}")

    def _tokens(self, context: str) -> tuple[list[int], list[int]]:
        """Return context and prompt in tokens; with --chat-template they are one message, whose turn stays open."""
        model, prompt, is_new = self._model, self._config.prompt or "", not self._text.num_tokens
        if not self.is_chat:
            read = model.encode(user_text(model, context), add_bos=is_new)
            return read, model.encode(user_text(model, prompt), add_bos=False)
        uses_template(model, True)
        if not (is_new or context or prompt) and self.opened.turn != "user":
            return [], []  # an answer goes on
        if is_new and not context:
            return [], chat_tokens(model, user_text(model, prompt))
        frame = chat_frame(model)
        before = f"{frame.before if is_new else self._head()}{user_text(model, context)}"
        question = f"{user_text(model, prompt)}{frame.after}"
        if not context:
            return [], model.encode(f"{before}{question}", add_bos=False)
        return model.encode(before, add_bos=is_new and not frame.begins), model.encode(question, add_bos=False)

    def _head(self) -> str:
        """Return what stands between a text that goes on and the user's next words."""
        # a message that is open goes on as a text does
        return "" if self.opened.turn == "user" else Conversation(self.opened, template=True).head()

    def read(self, advance: Callable[[int], object]) -> None:
        """Read the context, save its memory if asked to, and read the prompt; `advance` is told of the tokens."""
        config, text, unread = self._config, self._text, self.num_unread

        def tell(amount: int) -> None:
            nonlocal unread
            unread -= amount
            advance(amount)

        text.expect([*self._context, *self._prompt])
        text.absorb(self._context, tell)
        if config.save_memory is not None:
            self.opened.turn = "user" if self.is_chat else ""
            read = {"name": Path(config.context or "").name, "num_tokens": len(self._context)}
            self.opened.documents = [*self.opened.documents, read]
            self.opened.save(Path(config.save_memory).expanduser())
        text.absorb(self._prompt, tell)
        advance(unread)
        self.notes = fullness_notes(text)

    def write(self, on_text: OnText) -> Generated:
        """Continue; `on_text` is told the text in pieces as it comes."""
        config, text, num_read = self._config, self._text, self._text.num_tokens
        strip = config.strip_thinking
        is_stripped = self.is_chat if strip is None else strip
        marks = stripped_marks(self._model) if is_stripped else None
        stream = TextStream(self._model, on_text, marks, [*self._context, *self._prompt], config.stop)
        choose = Choice(config.temperature, config.top_p, config.seed)
        for _ in text.steps([[]], config.max_new_tokens, choose, is_over=lambda row, token: stream.add(token)):
            pass
        stream.end()
        if isinstance(text, WindowSession):
            return stream.result(num_read, None)
        named = {"spec": self.opened.spec} if self.opened.spec else {}
        return stream.result(num_read, {**named, **text.facts()})


def fullness_notes(text: object) -> Sequence[str]:
    """Return what has to be said of a memory that had to make room."""
    if not isinstance(text, Session):
        return []
    gone, thin, whole = text.num_forgotten, text.num_thinned, text.num_tokens
    if gone:
        return [
            f"The memory is full: of {whole:,} tokens read the first {gone:,} ({gone / whole:.0%}) are forgotten, "
            f"and only the last {whole - gone:,} can be used. A higher --ratio or a longer window keeps more."
        ]
    if thin:
        highest = max(text.trail.state.ratios)
        return [
            f"The memory is full: of {whole:,} tokens read the first {thin:,} ({thin / whole:.0%}) were thinned, "
            f"to {highest}x at most. A higher --ratio keeps all text alike, a longer window more of it."
        ]
    return []
