"""What `longext memory` does: documents become a memory file, and a file says what it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longext.compressor.checkpoint import is_compressor
from longext.compressor.config import BuildConfig
from longext.compressor.reading.continuing import Advance, silent
from longext.compressor.reading.memory_file import describe_memory
from longext.compressor.spec import CompressorSpec
from longext.compressor.writing.conversation import Conversation
from longext.compressor.writing.generation import check_file, fullness_notes
from longext.compressor.writing.opening import Opened, check_memory_config, open_text
from longext.data.documents import Document, load_documents
from longext.errors import ConfigError
from longext.models.chat import check_asking, has_template, set_asking, user_text, uses_template

Tell = Callable[[str], object]


def check_build(config: BuildConfig) -> None:
    """Raise ConfigError for what can be told to be wrong before anything is loaded."""
    if config.action not in ("build", "inspect"):
        raise ConfigError(f"longext memory takes build or inspect, got '{config.action}'.")
    if config.action == "inspect":
        if len(config.sources) != 1:
            raise ConfigError(f"longext memory inspect takes one memory file, got {len(config.sources)}.")
        return
    if not config.sources:
        raise ConfigError("longext memory build takes documents: text files, folders of them, or sample.")
    if config.output is None:
        raise ConfigError("longext memory build writes a file: name it with -o, for example -o corpus.memory.")
    check_file("-o", config.output, config.force)
    check_memory_config(config)
    check_asking(config)
    if not config.memory and not is_compressor(config.model):
        raise ConfigError(
            "longext memory build keeps what a memory holds: give --memory, a trained compressor (OUT@8), thinned:8, "
            "or a KV policy (snapkv:512)."
        )


def documents_of(config: BuildConfig) -> list[Document]:
    """Return the documents of all sources, in order (DataError: one cannot be read)."""
    return [each for data in config.sources for each in load_documents(dataclasses.replace(config, data=data))]


class Builder:
    """Reads documents into a memory and writes it to a file.

    Attributes:
        num_unread: tokens of all documents, but for the few that stand around them.

    Raises:
        ConfigError, DataError, CheckpointError: as the message says.
    """

    def __init__(self, config: BuildConfig) -> None:
        check_build(config)
        self._config, self._documents = config, documents_of(config)
        self.opened: Opened = open_text(config)
        self.opened.check_saving()
        set_asking(self.opened.model, config)
        encode = self.opened.model.encode
        self.num_unread = sum(len(encode(document.text, add_bos=False)) for document in self._documents)
        if not self.opened.text.num_tokens:
            self._is_chat = uses_template(self.opened.model, config.chat_template)
        else:  # a file goes on as it began
            self._is_chat = bool(self.opened.turn) and has_template(self.opened.model)

    def build(self, advance: Advance = silent) -> dict[str, Any]:
        """Read everything, write the file, and return what it holds (`describe`).

        In the chat template of the model's tokenizer, where it has one, the documents are the beginning of a user's
        message, whose question comes later.

        Args:
            advance: told the number of tokens each time some have been read.
        """
        config, opened, text = self._config, self.opened, self.opened.text
        conversation = Conversation(opened, template=True) if self._is_chat else None
        for document in self._documents:
            if conversation is not None:
                conversation.read(document.text, document.id, advance)
            else:
                apart = "\n\n" if text.num_tokens else ""
                ids = opened.model.encode(user_text(opened.model, f"{apart}{document.text}"), add_bos=not apart)
                text.absorb(ids, advance)
                opened.documents = [*opened.documents, {"name": document.id, "num_tokens": len(ids)}]
        if conversation is not None:
            opened.turn = conversation.state
        assert config.output
        opened.save(Path(config.output).expanduser())
        return {**describe(config.output), **text.facts(), "notes": list(fullness_notes(text))}


def describe(name: str) -> dict[str, Any]:
    """Return what a memory file holds and what can read it; nothing is loaded.

    Raises:
        CheckpointError: no such file, or no memory of this version.
    """
    stored = describe_memory(Path(name).expanduser())
    said = stored.description
    num_slots, held = stored.num_slots, {}
    if said["kind"] == "compressor":
        held = {"ratios": said["ratios"], "held": said["held"]}
        spec = CompressorSpec.from_json(said["spec"])
        num_slots -= spec.sink if num_slots and spec.memory == "kv" else 0  # the sink is no slot of memory
    names = ("schema", "kind", "memory", "model", "revision", "base_weights", "segment", "method", "factor", "turn")
    return {
        "file": name,
        **{key: said[key] for key in names},
        "num_tokens": said["num_tokens"],
        "num_bytes": stored.num_bytes,
        "num_slots": num_slots,
        **held,
        "documents": said["documents"],
    }
