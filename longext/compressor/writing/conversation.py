"""A conversation with a model: documents, questions and answers as turns of one text whose cache or memory is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longext.compressor.reading.continuing import Advance, Choice, silent
from longext.compressor.reading.window import WindowSession
from longext.compressor.writing.opening import Opened
from longext.compressor.writing.pieces import Generated, TextStream
from longext.errors import ConfigError
from longext.models.chat import has_template, plain_turns, stripped_marks, template_turns, user_text, uses_template
from longext.models.decode import check_sampling

_APART = "\n\n"  # between documents, and before the question
_LEAST = 4  # a question wants room for an answer of a quarter of the window, or of max_new_tokens
_STATES = ("", "user", "answer", "answered")  # nothing said; a message is open; an answer is, or has been ended


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        max_new_tokens: of an answer at most.
        temperature, top_p, seed: as `Sampler`; 0 is greedy.
        stop: texts that end an answer; they are left out of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def choice(self) -> Choice:
        """How tokens are chosen."""
        return Choice(self.temperature, self.top_p, self.seed)


class Conversation:
    """Turns of a user and a model, in the chat template of the model's tokenizer, or plainly where it has none.

    What was said stays read: a turn costs its own tokens. What a template makes of earlier turns (some drop thoughts)
    is not done again.

    Args:
        opened: model and text.
        template: go through the chat template; None: if the tokenizer has one.
        system: a system message.
        writing: how answers are written; calls may change it.
        when_full: in a plain window, when a question does not fit: "forget" drops the oldest turns and reads the rest
            again, "refuse" refuses it. A memory makes room by itself.

    Attributes:
        notes: what the user has to know; taken by `take_notes`.
        answer: the last one.
        messages: {"role", "content"} of what is in the text, as far as it was said here.

    Raises:
        ConfigError: a template that is asked for and is not there, or cannot write a conversation as it goes on.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        template: bool | None = None,
        system: str | None = None,
        writing: Writing | None = None,
        when_full: str | None = None,
    ) -> None:
        self.opened, self.model, self.text = opened, opened.model, opened.text
        self.text.eos = self.model.ending_tokens  # as the model is asked now
        self.writing = writing or Writing()
        is_window = isinstance(self.text, WindowSession)
        if is_window and when_full == "thin":
            raise ConfigError("--when-full thin: a plain window cannot be thinned; take forget or refuse.")
        self.forgets = is_window and when_full != "refuse"
        is_chat = uses_template(self.model, template)
        self.turns = template_turns(self.model, system) if is_chat else plain_turns(system)
        self._marks = stripped_marks(self.model) if is_chat else None
        self._notes: list[str] = []
        if not is_chat:
            why = "has no chat template" if not has_template(self.model) else "is asked without its chat template"
            self._notes.append(f"{self.model.name} {why}: {self.turns.name}.")
        elif not self.turns.is_exact:
            self._notes.append(
                "This chat template writes earlier turns differently later on; here they stay as they were."
            )
        raw = [str(self.model.tokenizer.decode([end], skip_special_tokens=False)) for end in sorted(self.text.eos)]
        self._closing = max((end for end in raw if end and self.turns.between.startswith(end)), key=len, default="")
        self.answer: Generated | None = None
        self._begin(opened.turn)
        if system and self.state:
            raise ConfigError("--system is for the beginning, and this memory's conversation has begun: leave it out.")

    def _begin(self, state: str) -> None:
        self.state = state if state in _STATES else ""
        self._exchanges: list[tuple[str, str | None]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, in order."""
        pairs = [(("user", asked), ("assistant", answered)) for asked, answered in self._exchanges]
        return [{"role": role, "content": text} for pair in pairs for role, text in pair if text is not None]

    def take_notes(self) -> list[str]:
        """Return what the user has to know since the last call."""
        notes, self._notes = self._notes, []
        return notes

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, text: str, name: str = "", advance: Advance = silent) -> int:
        """Add a document to the user's next message, and return its tokens.

        Args:
            name: of the document, for memory files.
            advance: told the number of tokens each time some have been read.

        Raises:
            ConfigError: it does not fit.
        """
        ids = self._user_ids(text, "")
        if self._make_room(len(ids), len(ids)):
            ids = self._user_ids(text, "")
        self.text.absorb(ids, advance)
        self._said_by_user(text)
        self.opened.documents = [*self.opened.documents, {"name": name or "text", "num_tokens": len(ids)}]
        return len(ids)

    def add(self, role: str, text: str) -> None:
        """Add a message that somebody has written already.

        Raises:
            ConfigError: it does not fit, or the role cannot speak now.
        """
        if role == "user":
            self.read(text)
            self.opened.documents = self.opened.documents[:-1]
        elif role == "assistant" and self.state == "user":
            self.text.absorb(self._encode(f"{self.turns.after}{text}"))
            self._answered(text, is_ended=False)
        else:
            raise ConfigError(
                f"A message of '{role}' cannot stand here: user and assistant take turns, the user first."
            )

    def head(self) -> str:
        """Return what stands in front of the next text of the user."""
        between = self.turns.between
        heads = {
            "": f"{_APART if self.text.num_tokens else ''}{self.turns.before}",
            "user": _APART,
            "answer": between,
            "answered": between[len(self._closing) :],
        }
        return heads[self.state]

    def _encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_bos=not self.text.num_tokens and not self.turns.begins)

    def _user_ids(self, text: str, behind: str) -> list[int]:
        return self._encode(f"{self.head()}{user_text(self.model, text)}{behind}")

    def _said_by_user(self, text: str) -> None:
        if self.state == "user" and self._exchanges:
            text = f"{self._exchanges.pop()[0]}{_APART}{text}"
        self._exchanges.append((text, None))
        self.state = "user"

    def _answered(self, text: str, is_ended: bool) -> None:
        asked = self._exchanges.pop()[0] if self._exchanges else ""
        self._exchanges.append((asked, text))
        self.state = "answered" if is_ended and self._closing else "answer"

    # --- answering --------------------------------------------------------------------------------------------------

    def stream(
        self,
        question: str,
        advance: Advance = silent,
        is_stopped: Callable[[], bool] = lambda: False,
        **changes: Any,
    ) -> Iterator[str]:
        """Ask, and yield the answer in pieces as it comes; together they are `answer.text`.

        Whoever stops listening ends the answer there. The text goes on from what was told.

        Args:
            advance: told of the question's tokens as they are read.
            is_stopped: asked after every token; True ends the answer.
            changes: of `writing`.

        Raises:
            ConfigError: there is no room, or a value that cannot be.
        """
        writing = self._writing(changes)
        ids, count = self._question(question, writing)
        self.text.absorb(ids, advance)
        self._said_by_user(question)
        num_read, pieces = self.text.num_tokens, list[str]()
        out = TextStream(self.model, pieces.append, self._marks, ids, writing.stop)
        mark = self.text.mark() if writing.stop else None
        try:
            for _ in self.text.steps([[]], count, writing.choice, is_over=lambda row, token: out.add(token)):
                told, pieces[:] = pieces[:], []
                yield from told
                if is_stopped():
                    break
        finally:
            out.end()
            self._finish(out, mark, num_read, count < writing.max_new_tokens)
        yield from pieces

    def ask(self, question: str, advance: Advance = silent, **changes: Any) -> Generated:
        """Return the whole answer of `stream`."""
        for _ in self.stream(question, advance, **changes):
            pass
        assert self.answer is not None
        return self.answer

    def ask_all(self, questions: Sequence[str], **changes: Any) -> list[Generated]:
        """Return the answers to several questions about what has been read; each as if it alone had been asked.

        They go through the model at once, on one memory. The conversation stays as it was.

        Raises:
            ConfigError: as `stream`.
        """
        if not questions:
            return []
        writing = self._writing(changes)
        prompts = [self._user_ids(question, self.turns.after) for question in questions]
        longest = max(map(len, prompts))
        self._check_room(longest)
        count = self._room_for(writing, longest)
        outs = [TextStream(self.model, marks=self._marks, prompt=ids, stop=writing.stop) for ids in prompts]
        num_read = self.text.num_tokens
        with self.text.snapshot(), self.text.rows(len(prompts)):
            for _ in self.text.steps(prompts, count, writing.choice, is_over=lambda row, token: outs[row].add(token)):
                pass
        facts = self.text.facts()
        for out in outs:
            out.end()
        return [out.result(num_read + len(ids), facts) for out, ids in zip(outs, prompts, strict=True)]

    def _writing(self, changes: dict[str, Any]) -> Writing:
        writing = replace(self.writing, **changes)
        check_sampling(writing.temperature, writing.top_p)
        stop = (writing.stop,) if isinstance(writing.stop, str) else tuple(writing.stop)
        return replace(writing, stop=(*stop, *self.turns.stop))

    def _question(self, question: str, writing: Writing) -> tuple[list[int], int]:
        """Return the tokens of a question, and how many its answer may have; there is room for both."""
        ids = self._user_ids(question, self.turns.after)
        limit = self.text.limit
        wanted = writing.max_new_tokens if limit is None else min(writing.max_new_tokens, limit // _LEAST)
        if self._make_room(len(ids), len(ids) + wanted):
            ids = self._user_ids(question, self.turns.after)
        return ids, self._room_for(writing, len(ids))

    def _room_for(self, writing: Writing, num_tokens: int) -> int:
        limit = self.text.limit
        most = writing.max_new_tokens
        return most if limit is None else min(most, limit - self.text.num_tokens - num_tokens)

    def _finish(self, out: TextStream, mark: Any, num_read: int, is_short: bool) -> None:
        """Keep the answer; what a stop string took off leaves the text too."""
        last = out.tokens[-1] if out.tokens else None
        if out.is_over:
            kept, rest = self._told_tokens(out)
            self.text.restore(mark)
            self.text.num_tokens = num_read
            self.text.absorb([*kept, *self.model.encode(rest, add_bos=False)])
        is_ended = last in self.text.eos and not out.is_over
        self._answered(out.text, is_ended)
        if is_short and not is_ended and not out.is_over and self.text.num_tokens == self.text.limit:
            self._notes.append("The window is full: the answer ends here.")
        self.answer = out.result(num_read, self.text.facts())

    def _told_tokens(self, out: TextStream) -> tuple[list[int], str]:
        """Return the first tokens of an answer whose text was told, and what was told besides."""
        for count in range(len(out.tokens), out.num_thought - 1, -1):
            text = self.model.decode(out.tokens[out.num_thought : count])
            if out.text.startswith(text):
                return out.tokens[:count], out.text[len(text) :]
        return [], out.text

    # --- room -------------------------------------------------------------------------------------------------------

    def _check_room(self, num_tokens: int) -> None:
        limit = self.text.limit
        if limit is not None and self.text.num_tokens + num_tokens >= limit:
            raise ConfigError(self.text.refusal(self.text.num_tokens + num_tokens))

    def _make_room(self, num_tokens: int, wanted: int) -> bool:
        """Let a window forget its oldest turns until `wanted` tokens fit; return whether it did.

        Raises:
            ConfigError: nothing can be forgotten, and not even `num_tokens` and one more fit.
        """
        limit, before = self.text.limit, self.text.num_tokens
        if limit is None or before + wanted <= limit:
            return False
        is_open = self.state == "user"
        old = self._exchanges[:-1] if is_open else self._exchanges
        if not (self.forgets and old) or wanted > limit:
            self._check_room(num_tokens)
            return False
        kept, size = self._exchanges, before
        while len(kept) > is_open and (size + wanted > limit or (size > limit // 2 and len(kept) > 1)):
            kept = kept[1:]
            size = len(self._rendered(kept))
        self.text.reset()
        ids = self._rendered(kept)
        if ids:
            self.text.absorb(ids)
        self._exchanges = kept
        self.state = ("user" if is_open else "answer") if kept else ""
        if not kept:
            self.opened.documents = ()
        again = f", and {len(ids):,} are read again" if ids else ""
        self._notes.append(f"The window is full: the first {before - len(ids):,} tokens are forgotten{again}.")
        self._check_room(num_tokens)
        return True

    def _rendered(self, exchanges: Sequence[tuple[str, str | None]]) -> list[int]:
        """Return the tokens of turns from the beginning of a conversation."""
        if not exchanges:
            return []
        turns = self.turns
        said = [
            user_text(self.model, asked) + ("" if answered is None else f"{turns.after}{answered}")
            for asked, answered in exchanges
        ]
        return self.model.encode(f"{turns.before}{turns.between.join(said)}", add_bos=not turns.begins)

    # --- keeping ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything that was said and read."""
        self.text.reset()
        self.opened.documents = ()
        self._begin("")

    def save(self, path: str | Path) -> None:
        """Write what was read and said to a memory file, from which `generate`, `chat` and `open_text` go on.

        Raises:
            ConfigError: a plain model's window, or another memory that no file could stand for.
        """
        self.opened.turn = self.state
        self.opened.save(Path(path))
