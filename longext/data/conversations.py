"""Supervised rows in the schemas people use, read into one form: a conversation with what is trained of it.

Every field is one of four kinds: it has a meaning here and is used; it changes the meaning in a way that cannot be
followed, and the row is refused by the field's name; it describes the row (an id, a source, any number) and is passed
over; or it is unknown, and is counted so that it can be said.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longext.data.documents import Row
from longext.errors import DataError
from longext.registry import did_you_mean
from longext.untrusted import parse_json

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_ON = ("weight", "train", "training", "trainable", "train_on_turn", "loss")  # of a message: false or 0 is not trained
_OFF = ("mask", "masked")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MEDIA = dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "only text can be trained on")
_REFUSED = {
    **dict.fromkeys(("chosen", "rejected"), "rows of preferences are no examples to imitate"),
    "kto_tag": "rows of preferences are no examples to imitate",
    "functions": "give them as 'tools'",
    "chat_template_kwargs": "a row cannot change the chat template",
    **_MEDIA,
}
_REFUSED_IN_MESSAGE = {
    "function_call": "give it as 'tool_calls'",
    "train_detail": "an answer is trained whole or not at all",
    **_MEDIA,
}
_DESCRIBES = (  # a row; its numbers, true and false do too
    *("id", "_id", "idx", "index", "uid", "uuid", "row_id", "prompt_id", "question_id", "__index_level_0__"),
    *("conversation_id", "conversation_hash", "source", "dataset", "data_source", "origin", "category", "task"),
    *("task_type", "task_name", "type", "topic", "difficulty", "domain", "language", "lang", "license", "url", "file"),
    *("filename", "path", "model", "model_name", "created", "timestamp", "date", "score", "quality", "length"),
    *("split", "tags", "meta", "metadata"),
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: its text.
        trained: of the assistant's, whether it is trained on.
        extra: what else the chat template is given: tool_calls, thoughts, the name and id of a tool's answer.
    """

    role: str
    content: str
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_answer(self) -> bool:
        """True if there is something to train on; white space alone is nothing."""
        return self.role == "assistant" and self.trained and bool(self.content.strip() or self.extra)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row: its messages, and the tools they may call.

    Attributes:
        turns: in order.
        tools: functions in OpenAI's form.
        is_raw: a prompt and its continuation as plain text, written without any chat format.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    is_raw: bool = False

    @property
    def has_answer(self) -> bool:
        """True if there is something to train on."""
        return any(turn.is_answer for turn in self.turns)


def read_conversation(row: Row, unused: Counter[str] | None = None) -> Conversation:
    """Return one row of a known schema as a conversation.

    The schemas, the first that a row fills: `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion`
    (TRL), `instruction` and `output` (Alpaca). What is used of them is in docs/longlora.md.

    Args:
        unused: counts fields that are not used and not known to be a mere description.

    Raises:
        DataError: the row is of no schema, or a field cannot be used as it is; names the place and the field.
    """
    if not isinstance(row.value, dict):
        raise _no_example(row)
    return _Reader(row, unused if unused is not None else Counter()).read()


class _Reader:
    """Reads one row; raises DataError with its place."""

    def __init__(self, row: Row, unused: Counter[str]) -> None:
        self.row, self.value, self.unused = row, row.value, unused

    def read(self) -> Conversation:
        """Return the conversation; see `read_conversation`."""
        value = self.value
        for name, why in _REFUSED.items():
            if _is_given(value.get(name)):
                raise self.error(f"'{name}' cannot be used: {why}.")
        known, turns, is_raw = self.schema()
        if _is_given(value.get("weight")) and value["weight"] != 1:
            raise self.error("'weight' of a whole row cannot be used; leave the row out, or give its messages weights.")
        self.count_unused(value, {*known, "system", "system_prompt", "tools", "weight"}, "")
        system = self.system(turns)
        if system and turns[:1] and turns[0].role == "system":
            turns = turns[1:]  # it is empty, and the row has its text beside the messages
        return Conversation(turns=(*system, *turns), tools=self.tools(), is_raw=is_raw)

    def schema(self) -> tuple[tuple[str, ...], tuple[Turn, ...], bool]:
        """Return the fields that hold the conversation, its turns, and whether they are plain text."""
        value = self.value
        readers = (
            (("messages",), self.chat),
            (("conversations",), self.chat),
            (("prompt", "completion"), self.completion),
            (("instruction", "output"), self.alpaca),
        )
        present = [(names, reader) for names, reader in readers if all(name in value for name in names)]
        filled = [case for case in present if any(_is_given(value[name]) for name in case[0])]
        for names, reader in filled or present:  # an empty column of another schema belongs to other rows
            return reader(*names)
        raise _no_example(self.row)

    def chat(self, name: str) -> tuple[tuple[str, ...], tuple[Turn, ...], bool]:
        """Return the turns of a list of messages."""
        return (name,), tuple(self.messages(self.value[name], name)), False

    def completion(self, *names: str) -> tuple[tuple[str, ...], tuple[Turn, ...], bool]:
        """Return the turns of TRL's rows: two texts, or two lists of messages of which the first is context."""
        prompt, completion = (self.value[name] for name in names)
        if isinstance(self.value.get("label"), bool):
            raise self.error("'label' cannot be used: rows of preferences are no examples to imitate.")
        if not isinstance(prompt, list) and not isinstance(completion, list):
            question, answer = self.text(prompt, "prompt"), self.text(completion, "completion", "")
            turns: tuple[Turn, ...] = (Turn(role="user", content=question), Turn(role="assistant", content=answer))
            return names, turns, True
        context = [
            Turn(role=turn.role, content=turn.content, trained=False, extra=turn.extra)
            for turn in self.messages(prompt, "prompt")
        ]
        return names, (*context, *self.messages(completion, "completion")), False

    def alpaca(self, *names: str) -> tuple[tuple[str, ...], tuple[Turn, ...], bool]:
        """Return the turns of an Alpaca row."""
        parts = [self.text(self.value.get(name), name, "") for name in ("instruction", "input")]
        question = "\n\n".join(part for part in parts if part.strip())
        answer = Turn(role="assistant", content=self.text(self.value["output"], "output", ""))
        turns = (*self.history(), Turn(role="user", content=question), answer)
        return (*names, "input", "history"), turns, False

    def history(self) -> Iterator[Turn]:
        """Yield the earlier rounds of an Alpaca row, pairs of question and answer."""
        rounds = self.value.get("history")
        if not _is_given(rounds):
            return
        if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
            raise self.error("'history' must be a list of pairs of question and answer.")
        for question, answer in rounds:
            yield Turn(role="user", content=self.text(question, "history"))
            yield Turn(role="assistant", content=self.text(answer, "history", ""))

    def system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return the row's own system message, unless the conversation begins with the same one."""
        fields = {name: self.text(self.value.get(name), name, "") for name in ("system", "system_prompt")}
        first = [turn.content for turn in turns[:1] if turn.role == "system" and turn.content.strip()]
        texts = {text for text in (*fields.values(), *first) if text.strip()}
        if len(texts) > 1:
            name = next(name for name, text in fields.items() if text.strip())
            raise self.error(f"'{name}' and another system message of the row differ; leave one of them out.")
        return [Turn(role="system", content=text) for text in texts if not first]

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """Return `tools` (a list or its JSON text) in OpenAI's form."""
        value = self.parsed(self.value.get("tools"), "'tools'")
        if not _is_given(value):
            return ()
        listed = value if isinstance(value, list) else [value]
        for tool in listed:
            inner = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                raise self.error("'tools' must be a list of functions, each with a name (or that list as JSON text).")
        return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in listed)

    # --- messages ---

    def messages(self, value: Any, name: str) -> Iterator[Turn]:
        """Yield the messages of a list, in OpenAI's or in ShareGPT's words."""
        if not isinstance(value, list):
            raise self.error(f"'{name}' must be a list of messages, found {type(value).__name__}.")
        for number, message in enumerate(value, 1):
            if not isinstance(message, dict):
                raise self.error(f"a message must hold role and content, found {type(message).__name__}.")
            yield self.message(message, f"message {number}: ")

    def message(self, message: Mapping[str, Any], at: str) -> Turn:
        """Return one message as a turn; `at` names it in errors."""
        role_key = "role" if message.get("role") is not None else "from"
        content_key = "content" if message.get("content") is not None or "value" not in message else "value"
        if message.get(role_key) is None:
            raise self.error(f"{at}no role (found: {', '.join(map(str, message)) or 'nothing'}).")
        spelled = str(message[role_key])
        role = ROLES.get(spelled.strip().lower().replace("-", "_"))
        if role is None:
            raise self.error(f"{at}unknown role '{spelled}'. {did_you_mean(spelled, ROLES)}")
        for name, why in _REFUSED_IN_MESSAGE.items():
            if _is_given(message.get(name)):
                raise self.error(f"{at}'{name}' cannot be used: {why}.")
        used = {role_key, content_key, *_ON, *_OFF}
        content, extra = message.get(content_key), {}
        if role == "call":
            role, content, extra = "assistant", "", {"tool_calls": self.calls(content, at + f"'{content_key}'")}
        elif role == "assistant":
            used |= {*THOUGHTS, "tool_calls"}
            extra = self.assistant_extra(message, at)
        elif role == "tool":
            used |= {"name", "tool_call_id"}
            extra = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
        self.count_unused(message, used, "of a message: ")
        text = self.text(_joined(content), content_key, "" if role == "assistant" else None, at)
        return Turn(role=role, content=text, trained=self.is_trained(message, at), extra=extra)

    def assistant_extra(self, message: Mapping[str, Any], at: str) -> dict[str, Any]:
        """Return the calls and thoughts of an assistant's message."""
        extra: dict[str, Any] = {}
        for name in THOUGHTS:
            if _is_given(message.get(name)):
                extra[name] = self.text(message[name], name, None, at)
        if _is_given(message.get("tool_calls")):
            extra["tool_calls"] = self.calls(message["tool_calls"], f"{at}'tool_calls'")
        return extra

    def calls(self, value: Any, name: str) -> list[dict[str, Any]]:
        """Return calls of tools in OpenAI's form, their arguments as an object."""
        parsed = self.parsed(value, name)
        calls = []
        for call in parsed if isinstance(parsed, list) and parsed else [parsed]:
            inner = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                raise self.error(f"{name} must hold the name and arguments of a function, as JSON.")
            arguments = self.parsed(inner.get("arguments", inner.get("parameters")) or {}, name)
            identity = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
            calls.append({**identity, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
        return calls

    def is_trained(self, message: Mapping[str, Any], at: str) -> bool:
        """Return whether a message's switches leave it trained."""
        switches: dict[str, bool] = {}
        for name in (*_ON, *_OFF):
            value = message.get(name)
            if value is None:
                continue
            if value not in (0, 1) or isinstance(value, str):
                raise self.error(f"{at}'{name}' can be 0 or 1 (false or true), found {json.dumps(value, default=str)}.")
            switches[name] = bool(value) == (name in _ON)
        if len(set(switches.values())) > 1:
            raise self.error(f"{at}{' and '.join(map(repr, switches))} contradict each other.")
        return all(switches.values())

    # --- values ---

    def text(self, value: Any, name: str, missing: str | None = None, at: str = "") -> str:
        """Return a text; a number or true or false as JSON writes it; `missing` for null."""
        if value is None and missing is not None:
            return missing
        if isinstance(value, str):
            return value
        if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return json.dumps(value)
        kind = "nothing" if value is None else type(value).__name__
        if isinstance(value, _OtherPart):
            raise self.error(f"{at}'{name}' has a part of type '{value.kind}': only text can be trained on.")
        raise self.error(f"{at}'{name}' must be text, found {kind}.")

    def parsed(self, value: Any, name: str) -> Any:
        """Return what a JSON text says, any other value as it is."""
        if not isinstance(value, str) or not value.strip():
            return value
        return parse_json(value, f"{self.row.where}: {name}")

    def count_unused(self, value: Mapping[str, Any], used: set[str], where: str) -> None:
        """Count the fields of `value` that hold something and are not used."""
        for name, item in value.items():
            if name not in used and name not in _DESCRIBES and _is_given(item) and isinstance(item, (str, list, dict)):
                self.unused[f"{where}'{name}'"] += 1

    def error(self, message: str) -> DataError:
        """Return the error that says `message` of this row."""
        return DataError(f"{self.row.where}: {message}")


@dataclass(frozen=True)
class _OtherPart:
    """A part of a message that is no text."""

    kind: str


def _joined(content: Any) -> Any:
    """Return the text of OpenAI's list of parts, joined as it is; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            return _OtherPart(str(part.get("type", "?")) if isinstance(part, dict) else type(part).__name__)
        texts.append(text)
    return "".join(texts)


def _is_given(value: Any) -> bool:
    """Return False for what a table writes for nothing."""
    if isinstance(value, str):
        return bool(value.strip()) and value.strip() not in ("[]", "{}", "null")
    return value is not None and value not in ([], {})


def _no_example(row: Row) -> DataError:
    value = row.value
    keys = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
    return DataError(
        f"{row.where}: no supervised example (found: {keys or 'nothing'}). Give instruction and output, messages "
        "(role, content), conversations (from, value) or prompt and completion, or train on plain text with "
        "--task pretrain."
    )
