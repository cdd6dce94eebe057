"""Conversations as the text that a model reads, with the character spans of their answers.

No answer is found by searching for its text: an answer of one letter is in every header. What comes in front of
it and behind it comes from rendering the messages before it, with and without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from longext.data.conversations import THOUGHTS, Conversation, Turn
from longext.errors import ConfigError, DataError
from longext.registry import did_you_mean

Span = tuple[int, int]
Message = Mapping[str, Any]
_MARK = "Longext0mark"  # in place of a message while a template is taken apart: letters, which no template touches
_STOP = "Answers end with '{}', which is trained: the chat template has no end marker of its own."
_NO_STOP = "Answers have no end marker: neither the chat template nor the tokenizer has one, so none is learned."
_UNOPENED = "The chat template asks for answers with '{}' but does not write it: answers are trained without it."
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)  # of a template's own program


@dataclass(frozen=True, kw_only=True)
class RenderedExample:
    """An example as the model reads it.

    Attributes:
        text: all of it, special tokens spelled out.
        answers: character spans [start, end) that are trained on, rising.
        material: returns the character spans of user messages, which a too long example is shortened in.
        notes: what a user should know of the format, each said once for all examples.
    """

    text: str
    answers: tuple[Span, ...]
    material: Callable[[], tuple[Span, ...]] = tuple
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ControlTokens:
    """The tokens of a tokenizer that are not made of text.

    Attributes:
        special: matches those that are special, spelled out.
        added: matches these and other added ones (`<think>`, a role's marker).
        ids: of the added ones.
        eos: the end of a text, "" if there is none.
    """

    special: re.Pattern[str]
    added: re.Pattern[str]
    ids: frozenset[int]
    eos: str

    @classmethod
    def of(cls, tokenizer: Any) -> ControlTokens:
        """Return those of `tokenizer`."""
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        every = special | {token.content for token in added.values()}
        return cls(_any_of(special), _any_of(every), frozenset(added), tokenizer.eos_token or "")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


# --- without a template -----------------------------------------------------------------------------------------------


class _Writer:
    """Builds a text and notes the spans in it."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.spans: dict[str, list[Span]] = {"answers": [], "material": []}
        self._length = 0

    def add(self, text: str, kind: str | None = None) -> None:
        """Append `text`; `kind` notes it as "answers" or "material"."""
        if kind is not None and text:
            self.spans[kind].append((self._length, self._length + len(text)))
        self.parts.append(text)
        self._length += len(text)

    def finish(self) -> list[RenderedExample]:
        """Return what has been written."""
        answers, material = tuple(self.spans["answers"]), tuple(self.spans["material"])
        return [RenderedExample(text="".join(self.parts), answers=answers, material=lambda: material)]


def render_plain(conversation: Conversation, tokenizer: Any) -> list[RenderedExample]:
    """Return BOS, then every message on lines of its own; an answer ends with EOS, which is trained on."""
    _check_plain(conversation, "plain")
    writer = _Writer()
    writer.add(tokenizer.bos_token or "")
    for turn in conversation.turns:
        if turn.role == "assistant":
            _add_answer(writer, turn, turn.content + (tokenizer.eos_token or "\n"))
        else:
            writer.add(turn.content, "material" if turn.role != "system" else None)
            writer.add("" if conversation.is_raw else "\n")
    return writer.finish()


def render_llama2(conversation: Conversation, tokenizer: Any) -> list[RenderedExample]:
    """Return Llama 2's chat format: BOS [INST] question [/INST] answer EOS, once for each question."""
    _check_plain(conversation, "llama2")
    writer = _Writer()
    system = ""
    asking = False
    for turn in conversation.turns:
        if turn.role == "assistant":
            if system:
                raise DataError("the llama2 prompt has no place for a system message between question and answer.")
            writer.add(" [/INST]" if asking else "")
            answer = f" {turn.content}" if turn.content.strip() else ""
            _add_answer(writer, turn, f"{answer} {tokenizer.eos_token or ''}")
            asking = False
        elif turn.role == "system":
            system += f"<<SYS>>\n{turn.content}\n<</SYS>>\n\n"
        else:
            writer.add("\n\n" if asking else f"{tokenizer.bos_token or ''}[INST] {system}")
            writer.add(turn.content, "material")
            system, asking = "", True
    return writer.finish()


def _add_answer(writer: _Writer, turn: Turn, text: str) -> None:
    writer.add(text, "answers" if turn.is_answer else None)


def _check_plain(conversation: Conversation, prompt: str) -> None:
    """Raise DataError if the conversation holds what only a chat template can write."""
    names = [name for turn in conversation.turns if turn.role == "assistant" for name in turn.extra]
    for name in ["tools"] * bool(conversation.tools) + names:
        raise DataError(f"the {prompt} prompt cannot write '{name}': that takes a tokenizer with a chat template.")


# --- the tokenizer's template -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """One answer in the conversation up to it, as the model writes it in use.

    Attributes:
        number: of its message.
        text: the conversation up to the answer, its end included.
        spans: what is trained on of the text.
        notes: as in `RenderedExample`.
    """

    number: int
    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """Where the last span ends."""
        return self.spans[-1][1]


class _Chat:
    """One conversation under the tokenizer's own chat template, as one example if that is what the model sees.

    An answer is what the model has to write in use: all that follows the generation prompt, up to the token that ends
    the turn. If the template writes an earlier turn otherwise than when that turn was the last (Qwen3 drops its
    thoughts), the answer becomes an example of its own behind the messages before it.
    """

    def __init__(self, conversation: Conversation, tokenizer: Any, controls: ControlTokens) -> None:
        self.tokenizer, self.controls = tokenizer, controls
        self.turns = conversation.turns
        self.tools = [dict(tool) for tool in conversation.tools] or None
        self.messages: list[Message] = [
            {"role": turn.role, "content": turn.content, **turn.extra} for turn in self.turns
        ]
        self.marks_answers = bool(_GENERATION.search(tokenizer.get_chat_template(tools=self.tools)))
        contents = json.dumps(self.messages, ensure_ascii=False, default=str)
        self.mark = _MARK
        while self.mark in contents:
            self.mark += "x"

    def render(self) -> list[RenderedExample]:
        """Return the examples.

        Raises:
            DataError: the template refuses the messages, or leaves a part of them out.
        """
        text = self.apply(self.messages)
        self.check_written()
        answers = [self.answer(number) for number, turn in enumerate(self.turns) if turn.is_answer]
        if answers and answers[-1].number == len(self.turns) - 1:
            text = answers[-1].text  # may hold a stop token that the template leaves to the next turn
        shared, examples = [], []
        for answer in answers:
            if text.startswith(answer.text[: answer.end]):
                shared.append(answer)
            else:
                examples.append(self.example(answer.text, [answer]))
        return [*examples, self.example(text, shared)] if shared else examples

    def example(self, text: str, answers: Sequence[_Answer]) -> RenderedExample:
        """Return `text` as an example that trains on `answers`."""
        return RenderedExample(
            text=text,
            answers=tuple(span for answer in answers for span in answer.spans),
            material=lambda: self.material(text, answers[-1].number),
            notes=tuple(note for answer in answers for note in answer.notes),
        )

    # --- the template as a function ---

    def apply(self, messages: Sequence[Message], **keys: Any) -> str:
        """Return the template over `messages`, "" for none.

        Arguments of calls are given as objects, as most templates take them, or else as JSON text.
        """
        if not messages:
            return ""
        try:
            return str(self.applied(messages, tokenize=False, **keys))
        except DataError as error:
            if not isinstance(error.__cause__, TypeError) or not any("tool_calls" in item for item in messages):
                raise
        return str(self.applied([_with_text_arguments(item) for item in messages], tokenize=False, **keys))

    def applied(self, messages: Sequence[Message], **keys: Any) -> Any:
        """Return what transformers makes of `messages`; a template is a program and can fail in many ways."""
        try:
            return self.tokenizer.apply_chat_template(messages, **{"tools": self.tools, **keys})
        except _FAILURES as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the chat template of this tokenizer refuses the messages ({reason}).") from error

    def without(self, number: int, **changed: Any) -> list[Message]:
        """Return the messages with `changed` in message `number`; None takes a key away."""
        message = {key: value for key, value in {**self.messages[number], **changed}.items() if value is not None}
        return [*self.messages[:number], message, *self.messages[number + 1 :]]

    # --- where an answer begins and ends ---

    def answer(self, number: int) -> _Answer:
        """Return the answer of message `number` as the last of its conversation."""
        text = self.apply(self.messages[: number + 1])
        if self.marks_answers:
            return _Answer(number=number, text=text, spans=self.generation_spans(number))
        before = self.apply(self.messages[:number])
        prompt = self.apply(self.messages[:number], add_generation_prompt=True)
        head, tail = self.frame(number)
        opened = self.behind_opened_thought(number, prompt, head, tail) if not text.startswith(prompt) else None
        text = opened or text
        start = self.start(text, before, prompt, head)
        notes = [_UNOPENED.format(prompt[len(head) :])] if prompt.startswith(head) and start < len(prompt) else []
        end = len(text) - len(tail) + self.end_marker(tail) if text.endswith(tail) else len(text.rstrip())
        self.check_whole(number, text[min(start, len(head)) : end])
        stop = ""
        if not tail.strip():
            stop, text = self.stop(number, tail), text[:end]
            notes.append(_STOP.format(stop.strip()) if stop else _NO_STOP)
        return _Answer(number=number, text=text + stop, spans=((start, end + len(stop)),), notes=tuple(notes))

    def frame(self, number: int) -> tuple[str, str]:
        """Return what the template writes before and behind the content of a last message."""
        probe = [*self.messages[:number], {"role": "assistant", "content": self.mark}]
        head, mark, tail = self.apply(probe).partition(self.mark)
        if not mark:
            raise self.left_out(number)
        return head, tail

    def start(self, text: str, before: str, prompt: str, head: str) -> int:
        """Return where the model begins to write.

        Without a generation prompt in the template, white space in front of an answer is the model's, a header not.
        """
        if prompt != before and text.startswith(prompt):
            return len(prompt)
        if prompt == before and head.startswith(before) and not head[len(before) :].strip() and text.startswith(before):
            return len(before)
        if text.startswith(head):
            return len(head)
        raise DataError(
            "this tokenizer's chat template does not write answers as it asks for them, so they cannot be told from "
            "prompts. Give the template {% generation %} blocks, or choose --prompt plain."
        )

    def behind_opened_thought(self, number: int, prompt: str, head: str, tail: str) -> str | None:
        """Return the text of an answer whose first words are the generation prompt's last, or None if they are not.

        DeepSeek-R1's prompt opens a thought, and its template cuts the thought from an answer that it writes.
        """
        begins, content = prompt[len(head) :], self.turns[number].content.lstrip()
        if not prompt.startswith(head) or not begins.strip() or not content.startswith(begins.strip()):
            return None
        rest = content.removeprefix(begins) if content.startswith(begins) else content[len(begins.strip()) :].lstrip()
        return prompt + rest + tail

    def end_marker(self, tail: str) -> int:
        """Return how much of `tail` the model writes: up to its first special token, else all but white space."""
        match = self.controls.special.search(tail)
        return match.end() if match else len(tail.rstrip()) or len(tail)

    def stop(self, number: int, tail: str) -> str:
        """Return what ends an answer that the template puts nothing behind: the marker of the next turn (GLM), or EOS.

        A call of a tool is followed by the tool's answer, all else by the user.
        """
        role = "tool" if "tool_calls" in self.messages[number] else "user"
        following = self.messages[number + 1 : number + 2]
        if not following or following[0]["role"] not in ("user", "tool"):
            following = [{"role": role, "content": "0"}]
        probe = [*self.messages[:number], {"role": "assistant", "content": self.mark}, *following]
        try:
            rest = self.apply(probe).partition(self.mark)[2].removeprefix(tail)
        except DataError:
            rest = ""
        blank = len(rest) - len(rest.lstrip())
        match = self.controls.added.match(rest, blank)
        return rest[: match.end()] if match else self.controls.eos

    def generation_spans(self, number: int) -> tuple[Span, ...]:
        """Return the spans of the generation blocks that message `number` adds: those of the tokens marked by them."""
        spans = self.marked_spans(self.messages[: number + 1])[len(self.marked_spans(self.messages[:number])) :]
        if not spans:
            raise DataError(f"the chat template has no {{% generation %}} block for message {number + 1} (assistant).")
        return tuple(spans)

    def marked_spans(self, messages: Sequence[Message]) -> list[Span]:
        """Return the spans of all generation blocks, as transformers marks them."""
        if not messages:
            return []
        marked = self.applied(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        offsets = whole_offsets(marked["offset_mapping"])
        edges = np.flatnonzero(np.diff(np.asarray(marked["assistant_masks"], dtype=np.int8), prepend=0, append=0))
        runs = zip(edges[::2], edges[1::2], strict=True)
        return [(int(offsets[first, 0]), int(offsets[end - 1, 1])) for first, end in runs]

    # --- whether all of a row is there ---

    def check_written(self) -> None:
        """Raise DataError naming the first message, or field of one, that the template leaves out."""
        if self.tools and self.apply(self.messages, tools=None) == self.apply(self.messages):
            raise DataError("this tokenizer's chat template does not write 'tools'.")
        for number, message in enumerate(self.messages):
            for name in ("tool_calls", *THOUGHTS):
                until = slice(number + 1)
                if name in message and self.has_no_effect(number, until, **{name: None}):
                    raise DataError(f"message {number + 1}: this tokenizer's chat template does not write '{name}'.")
        marks = {n: f"{self.mark}{n}m" for n, turn in enumerate(self.turns) if turn.content.strip()}
        probe = [{**message, "content": marks.get(n, "")} for n, message in enumerate(self.messages)]
        try:
            written = self.apply(probe).lower()  # a template may change the case
        except DataError:
            return  # a template that reads the contents
        for number, mark in marks.items():
            if mark.lower() not in written:
                raise self.left_out(number)

    def has_no_effect(self, number: int, until: slice, **changed: Any) -> bool:
        """Return True if the conversation up to a message is the same with `changed` in that message."""
        try:
            return self.apply(self.without(number, **changed)[until]) == self.apply(self.messages[until])
        except DataError:
            return False  # the template asks for it

    def check_whole(self, number: int, written: str) -> None:
        """Raise DataError if the template leaves out more of an answer than white space."""
        if "".join(self.turns[number].content.split()) not in "".join(written.split()):
            raise DataError(
                f"this tokenizer's chat template changes the answer of message {number + 1} (it cuts thoughts, maybe). "
                "Give the tokenizer a template that writes all of it, or choose --prompt plain."
            )

    def left_out(self, number: int) -> DataError:
        """Return the error for a message that the template does not write."""
        role = self.turns[number].role
        return DataError(f"this tokenizer's chat template does not write the content of message {number + 1} ({role}).")

    # --- what can be shortened ---

    def material(self, text: str, last: int) -> tuple[Span, ...]:
        """Return where messages of the user and of tools are in `text`, whose last answer is message `last`."""
        base = self.apply(self.messages[:last], add_generation_prompt=True)
        spans = []
        for number, turn in enumerate(self.turns[:last]):
            if turn.role not in ("user", "tool"):
                continue
            probe = self.apply(self.without(number, content=self.mark)[:last], add_generation_prompt=True)
            head, mark, tail = probe.partition(self.mark)
            end = len(base) - len(tail)
            if mark and base.startswith(head) and base.endswith(tail) and text.startswith(base[:end]):
                spans.append((len(head), end))
        return tuple(spans)


def _with_text_arguments(message: Message) -> Message:
    """Return a message whose calls hold their arguments as JSON text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def whole_offsets(offsets: Sequence[Span]) -> NDArray[np.int64]:
    """Return token offsets, int64 [T, 2], in which white space counts.

    Some tokenizers trim it, so that a token of nothing else is empty and is at its own end; it starts where the
    token before it ends.
    """
    whole = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    empty = np.flatnonzero(whole[1:, 0] == whole[1:, 1]) + 1
    whole[empty, 0] = whole[empty - 1, 1]
    return whole


# --- by name ----------------------------------------------------------------------------------------------------------

Render = Callable[[Conversation], list[RenderedExample]]
PROMPTS = ("chat", "plain", "llama2")


def make_prompt(name: str, tokenizer: Any, controls: ControlTokens) -> Render:
    """Return the function that writes conversations in the format `name` of `PROMPTS`."""
    if name == "chat":
        return lambda conversation: _Chat(conversation, tokenizer, controls).render()
    render = {"plain": render_plain, "llama2": render_llama2}[name]
    return lambda conversation: render(conversation, tokenizer)


def resolve_prompt(name: str, tokenizer: Any) -> str:
    """Return the format meant by `prompt`: "auto" is the chat template if the tokenizer has one, else "plain".

    Raises:
        ConfigError: unknown name, or "chat" without a template.
    """
    if name == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if name not in PROMPTS:
        raise ConfigError(f"Unknown prompt '{name}'. {did_you_mean(name, [*PROMPTS, 'auto'])}")
    if name == "chat" and not tokenizer.chat_template:
        raise ConfigError("This tokenizer has no chat template. Choose --prompt plain or llama2.")
    return name
