"""Supervised examples: rows of a source become token ids with a mask of the answers.

An example is rendered to one text with the character spans of its answers and tokenised once; offsets carry the spans
to tokens, so no token is lost or doubled where a prompt and an answer meet.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from longext.config import FinetuneConfig
from longext.data.documents import Row
from longext.data.packing import TokenizedText
from longext.errors import ConfigError, DataError
from longext.registry import did_you_mean

Span = tuple[int, int]
_KEEP = 32  # tokens of a shortened text that stay at either end: where the task and the question stand
_BATCH = 32  # examples tokenised at a time
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {
    **{role: "user" for role in ("user", "human", "prompter")},
    **{role: "assistant" for role in ("assistant", "gpt", "model", "bot", "chatgpt")},
    **{role: role for role in ("system", "tool")},
}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of an example: `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class RenderedExample:
    """An example as the model reads it.

    Attributes:
        text: all of it, special tokens spelled out.
        answers: character spans [start, end) that are trained on, rising.
        material: character spans of user messages, which a too long example is shortened in.
    """

    text: str
    answers: tuple[Span, ...]
    material: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class SftReport:
    """How many examples there are to train on, how many of them were shortened, and how many were left out.

    Attributes:
        num_dropped_long: the answers and the least prompt do not fit the length.
        num_dropped_empty: nothing to train on.
    """

    num_examples: int = 0
    num_truncated: int = 0
    num_dropped_long: int = 0
    num_dropped_empty: int = 0


# --- from a row to turns ----------------------------------------------------------------------------------------------


def read_turns(row: Row) -> list[Turn]:
    """Return the messages of one row: `messages`, `conversations` (ShareGPT), or `instruction`, `input`, `output`.

    Raises:
        DataError: the row is none of these, a role is unknown, or a text is not text; names the place.
    """
    value = row.value
    if isinstance(value, dict):
        for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
            if isinstance(value.get(key), list):
                return [_turn(message, role, content, row.where) for message in value[key]]
        if "instruction" in value and "output" in value:
            return _alpaca_turns(value, row.where)
    keys = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
    raise DataError(
        f"{row.where}: no supervised example (found: {keys or 'nothing'}). Give instruction and output, "
        "messages (role, content) or conversations (from, value), or train on plain text with --task pretrain."
    )


def _alpaca_turns(value: Mapping[str, Any], where: str) -> list[Turn]:
    parts = [_text(value.get(key) or "", key, where) for key in ("instruction", "input")]
    question = "\n\n".join(part for part in parts if part.strip())
    answer = _text(value["output"] or "", "output", where)
    return [Turn(role="user", content=question), Turn(role="assistant", content=answer)]


def _turn(message: Any, role_key: str, content_key: str, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message must hold {role_key} and {content_key}, found {type(message).__name__}.")
    role = str(message.get(role_key, message.get("role")))
    if role not in _ROLES:
        raise DataError(f"{where}: unknown role '{role}'. {did_you_mean(role, _ROLES)}")
    return Turn(role=_ROLES[role], content=_text(message.get(content_key, message.get("content")), content_key, where))


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be text, found {type(value).__name__}.")
    return value


# --- from turns to a text ---------------------------------------------------------------------------------------------


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

    def finish(self) -> RenderedExample:
        """Return what has been written."""
        answers, material = tuple(self.spans["answers"]), tuple(self.spans["material"])
        return RenderedExample(text="".join(self.parts), answers=answers, material=material)


def render_plain(turns: Sequence[Turn], tokenizer: Any) -> RenderedExample:
    """Return BOS, then every message on lines of its own; an answer ends with EOS, which is trained on."""
    writer = _Writer()
    writer.add(tokenizer.bos_token or "")
    for turn in turns:
        if turn.role == "assistant":
            _add_answer(writer, turn.content, tokenizer.eos_token or "\n")
        else:
            writer.add(turn.content, "material" if turn.role != "system" else None)
            writer.add("\n")
    return writer.finish()


def render_llama2(turns: Sequence[Turn], tokenizer: Any) -> RenderedExample:
    """Return Llama 2's chat format: BOS [INST] question [/INST] answer EOS, once for each question."""
    writer = _Writer()
    system = ""
    asking = False
    for turn in turns:
        if turn.role == "assistant":
            writer.add(" [/INST]" if asking else "")
            _add_answer(writer, f" {turn.content}" if turn.content.strip() else "", f" {tokenizer.eos_token or ''}")
            asking = False
        elif turn.role == "system":
            system += f"<<SYS>>\n{turn.content}\n<</SYS>>\n\n"
        else:
            writer.add("\n\n" if asking else f"{tokenizer.bos_token or ''}[INST] {system}")
            writer.add(turn.content, "material")
            system, asking = "", True
    return writer.finish()


def _add_answer(writer: _Writer, content: str, end: str) -> None:
    writer.add(content + end, "answers" if content.strip() else None)


def render_chat(turns: Sequence[Turn], tokenizer: Any) -> RenderedExample:
    """Return the tokenizer's own chat template; answers are its generation blocks, or what each answer adds to it.

    Without generation blocks the text up to each answer must be a prefix of the whole. An answer is then all that
    stands between the generation prompt and the end of its turn, marker included, white space after that not.

    Raises:
        DataError: the template refuses the messages, or rewrites earlier turns.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = _apply(tokenizer, messages)
        if _GENERATION.search(tokenizer.get_chat_template()):
            answers = _generation_spans(tokenizer, messages)
        else:
            answers = _prefix_spans(tokenizer, messages, text)
    except TemplateError as error:
        raise DataError(f"the chat template of this tokenizer refuses the messages ({error}).") from error
    return RenderedExample(text=text, answers=tuple(answers), material=tuple(_material_spans(turns, text)))


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, str]], **keys: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **keys)) if messages else ""


def _generation_spans(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[Span]:
    """Return the spans of generation blocks: those of the tokens that transformers marks."""
    marked = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    offsets = _whole_offsets(marked["offset_mapping"])
    edges = np.flatnonzero(np.diff(np.asarray(marked["assistant_masks"], dtype=np.int8), prepend=0, append=0))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [(int(offsets[first, 0]), int(offsets[end - 1, 1])) for first, end in runs]


def _whole_offsets(offsets: Sequence[Span]) -> NDArray[np.int64]:
    """Return token offsets, int64 [T, 2], in which white space counts.

    Some tokenizers trim it, so that a token of nothing else is empty and stands at its own end; it starts where the
    token before it ends.
    """
    whole = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    empty = np.flatnonzero(whole[1:, 0] == whole[1:, 1]) + 1
    whole[empty, 0] = whole[empty - 1, 1]
    return whole


def _prefix_spans(tokenizer: Any, messages: Sequence[Mapping[str, str]], text: str) -> list[Span]:
    spans: list[Span] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = _apply(tokenizer, messages[:number])
        prompt = _apply(tokenizer, messages[:number], add_generation_prompt=True)
        after = _apply(tokenizer, messages[: number + 1])
        content = message["content"] if message["content"] in after[len(before) :] else message["content"].strip()
        found = after.find(content, len(before))
        if not (text.startswith(after) and after.startswith(before)) or found < 0:
            raise DataError(
                "the chat template of this tokenizer rewrites earlier turns, so answers cannot be told from prompts. "
                "Give the template {% generation %} blocks, or choose --prompt plain."
            )
        start = len(prompt) if len(before) < len(prompt) <= found and after.startswith(prompt) else found
        ending = after[found + len(content) :]
        spans.append((start, len(after) - (len(ending) - len(ending.rstrip()) if ending.strip() else 0)))
    return spans


def _material_spans(turns: Sequence[Turn], text: str) -> list[Span]:
    """Return where user messages stand in a rendered text: the first place after the message before."""
    spans: list[Span] = []
    at = 0
    for turn in turns:
        content = turn.content if turn.content in text[at:] else turn.content.strip()
        start = text.find(content, at)
        if start < 0:
            continue
        at = start + len(content)
        if turn.role in ("user", "tool"):
            spans.append((start, at))
    return spans


Render = Callable[[Sequence[Turn], Any], RenderedExample]
PROMPTS: dict[str, Render] = {"chat": render_chat, "plain": render_plain, "llama2": render_llama2}


def resolve_prompt(name: str, tokenizer: Any) -> str:
    """Return the format meant by `prompt`: "auto" is the chat template where the tokenizer has one, else "plain".

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


# --- from a text to tokens --------------------------------------------------------------------------------------------


def shorten(trained: NDArray[np.bool_], material: Sequence[Span], length: int, keep: int) -> NDArray[np.intp] | None:
    """Return which tokens stay so that at most `length` do, int [<= length] rising, or None where that cannot be.

    Tokens go from the middle of the longest material (token spans), then of the next longest, `keep` tokens of each
    staying at either end; trained tokens and those outside the material never go.
    """
    excess = len(trained) - length
    kept = np.ones(len(trained), dtype=bool)
    for start, end in sorted(material, key=lambda span: span[0] - span[1]):
        number = min(excess, end - start - 2 * keep)
        if number > 0:
            first = start + (end - start - number + 1) // 2
            kept[first : first + number] = False
            excess -= number
    if excess > 0 or (trained & ~kept).any():
        return None
    return np.flatnonzero(kept)


class ExampleEncoder:
    """Turns rows into token ids with a mask, and counts what it shortens and leaves out.

    Args:
        tokenizer: a fast tokenizer (offsets are needed).
        length: the most tokens of an example; `config.max_tokens` where that is less.
        config: `prompt` and `max_tokens` are read.

    Raises:
        ConfigError: unknown prompt, or a tokenizer without offsets.
    """

    def __init__(self, tokenizer: Any, length: int, config: FinetuneConfig) -> None:
        if not tokenizer.is_fast:
            raise ConfigError("Task sft needs a fast tokenizer (a tokenizer.json); this one gives no offsets.")
        self.tokenizer = tokenizer
        self.length = min(length, config.max_tokens or length)
        self.prompt = resolve_prompt(config.prompt, tokenizer)
        self.data = config.data
        self.counts = {"num_examples": 0, "num_truncated": 0, "num_dropped_long": 0, "num_dropped_empty": 0}
        self._digest = hashlib.sha256()

    @property
    def settings(self) -> dict[str, Any]:
        """What the tokens depend on besides data and tokenizer."""
        return {"prompt": self.prompt, "length": self.length}

    @property
    def report(self) -> SftReport:
        """The counts so far."""
        return SftReport(**self.counts)

    def meta(self) -> dict[str, Any]:
        """Return what a token cache notes of the examples: counts, hash of the rows and the token rows end with."""
        return {**self.counts, "data_sha256": self._digest.hexdigest(), "pad_token_id": padding_token(self.tokenizer)}

    def encode(self, rows: Iterable[Row]) -> Iterator[TokenizedText]:
        """Yield the examples of `rows` that can be trained on, in order, each of at most `length` tokens.

        Raises:
            DataError: a row is no example (names it), or none is left.
        """
        rows = iter(rows)
        while batch := list(itertools.islice(rows, _BATCH)):
            rendered = [self._render(row) for row in batch]
            encoded = self.tokenizer(
                [example.text for example in rendered],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            parts = zip(batch, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for row, example, ids, offsets in parts:
                text = self._mask(row.id, example, np.asarray(ids), _whole_offsets(offsets))
                if text is not None:
                    yield text
        if not self.counts["num_examples"]:
            raise DataError(self._nothing_left())

    def _render(self, row: Row) -> RenderedExample:
        self._digest.update(json.dumps(row.value, sort_keys=True, default=str).encode() + b"\0")
        turns = read_turns(row)
        if not any(turn.content.strip() for turn in turns):
            return RenderedExample(text="", answers=(), material=())
        try:
            return PROMPTS[self.prompt](turns, self.tokenizer)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error

    def _mask(
        self, name: str, example: RenderedExample, ids: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> TokenizedText | None:
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in example.answers:
            trained |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        trained[:1] = False  # nothing comes before the first token to predict it from
        if not trained.any():
            self.counts["num_dropped_empty"] += 1
            return None
        kept = shorten(trained, _token_spans(example.material, offsets), self.length, min(_KEEP, self.length // 8))
        if kept is None:
            self.counts["num_dropped_long"] += 1
            return None
        self.counts["num_examples"] += 1
        self.counts["num_truncated"] += len(kept) < len(ids)
        return TokenizedText(id=name, input_ids=ids[kept].tolist(), trained=trained[kept].tolist())

    def _nothing_left(self) -> str:
        long, empty = self.counts["num_dropped_long"], self.counts["num_dropped_empty"]
        advice = f" Train at more than {self.length:,} tokens, or shorten the answers." if long else ""
        return f"No answer tokens left in {self.data}: {long:,} examples too long, {empty:,} without an answer.{advice}"


def _token_spans(spans: Sequence[Span], offsets: NDArray[np.int64]) -> list[Span]:
    """Return the runs of tokens that lie wholly inside each character span."""
    found = []
    for start, end in spans:
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0]))
        if len(inside):
            found.append((int(inside[0]), int(inside[-1]) + 1))
    return found


def padding_token(tokenizer: Any) -> int:
    """Return the token that fills rows: the padding token if it is in the base vocabulary, else EOS, else 0.

    A padding token added on top may have no row in the embedding, which longext never resizes.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad < tokenizer.vocab_size:
        return int(pad)
    return int(eos) if eos is not None else 0
