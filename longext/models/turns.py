"""What a tokenizer says of texts and turns: what comes before a text, what ends an answer, what is a thought.

One rule for everything that generates. Pure functions of a tokenizer; the model's own ending tokens are given.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longext.errors import ConfigError

_USER, _ANSWER, _NEXT = "longext's question", "longext's answer", "longext's next message"
_NEXT_ROLES = ("user", "tool", "system")  # some templates (GLM) end a turn with the next one's role
_MARKER = re.compile(r"(<.+>|\[.+\]|◁.+▷)")
_CHANNELS = "<|channel|>"  # several messages in one answer (gpt-oss): the end of a message does not end it
_THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("◁think▷", "◁/think▷"),
)
# `apply_chat_template` has these for itself
_OWN_ARGUMENTS = frozenset(
    {"conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"}
    | {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "messages"}
)


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes:
        template_arguments: variables of the chat template.
        strip_thinking: take the thought off an answer; None: if the tokenizer knows marks of thoughts.
        neutralise: write control tokens that a text spells so that they are text.
    """

    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    strip_thinking: bool | None = None
    neutralise: bool = False


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return the template variables of `--template-arg key=value`: JSON values (false, 3), anything else as text.

    Raises:
        ConfigError: no key, a key given twice, or one that is not the template's to take.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--template-arg takes key=value, for example enable_thinking=false, got '{text}'.")
        if key in arguments:
            raise ConfigError(f"--template-arg names {key} twice.")
        if key in _OWN_ARGUMENTS:
            raise ConfigError(f"--template-arg {key}: longext sets this itself; give variables of the template.")
        try:
            arguments[key] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[key] = value
    return arguments


def prefix_of(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts before a text: a BOS, several tokens (GLM), or none.

    What it puts behind a text (an EOS) is left out: a prompt goes on.
    """
    whole: list[int] = list(tokenizer("a", add_special_tokens=True).input_ids)
    bare: list[int] = list(tokenizer("a", add_special_tokens=False).input_ids)
    places = range(len(whole) - len(bare) + 1)
    start = next((i for i in places if bare and whole[i : i + len(bare)] == bare), None)
    if start is None:
        return tuple(whole[:1]) if whole[:1] == [tokenizer.bos_token_id] else ()
    return tuple(whole[:start])


# --- what ends an answer ----------------------------------------------------------------------------------------------


def eos_of(settings: Any) -> tuple[int, ...]:
    """Return the ending tokens that a config, or generation settings, name, in their order."""
    named = settings.eos_token_id
    return (named,) if isinstance(named, int) else tuple(named or ())


def named_ends(model: Any) -> frozenset[int]:
    """Return the ending tokens that a model's generation settings name, else its config's."""
    settings = getattr(model, "generation_config", None)
    is_named = settings is not None and settings.eos_token_id is not None
    return frozenset(eos_of(settings if is_named else model.config.get_text_config()))


def ending_tokens(model: Any, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> frozenset[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's EOS, the chat template's end of a turn.

    Without a tokenizer (None) they are those that the model names.
    """
    if tokenizer is None:
        return named_ends(model)
    eos = tokenizer.eos_token_id
    return named_ends(model) | frozenset([] if eos is None else [eos]) | turn_ends(tokenizer, arguments or {})


def turn_ends(tokenizer: Any, arguments: Mapping[str, Any]) -> frozenset[int]:
    """Return the control tokens that follow an assistant's message in a rendered conversation.

    That is `<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, or the next role's marker if a template closes nothing.
    Plain text that a template writes there is no token, and ends nothing.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template or _CHANNELS in str(template):
        return frozenset()
    ends: set[int] = set()
    for role in _NEXT_ROLES:
        behind = _behind_answer(tokenizer, role, arguments).lstrip()
        first = tokenizer(behind, add_special_tokens=False).input_ids[:1] if behind else []
        ends.update(token for token in first if _is_control(tokenizer, token))
    return frozenset(ends)


def _behind_answer(tokenizer: Any, role: str, arguments: Mapping[str, Any]) -> str:
    messages = [("user", _USER), ("assistant", _ANSWER), (role, _NEXT)]
    conversation = [{"role": speaker, "content": text} for speaker, text in messages]
    try:
        whole = str(tokenizer.apply_chat_template(conversation, tokenize=False, **arguments))
    except Exception:  # whatever a template's own code raises for roles that it does not have
        return ""
    return whole.rpartition(_ANSWER)[2].partition(_NEXT)[0] if _ANSWER in whole else ""


def _is_control(tokenizer: Any, token: int) -> bool:
    text = tokenizer.convert_ids_to_tokens(token)
    return token in tokenizer.all_special_ids or bool(text and _MARKER.fullmatch(text))


# --- thoughts ---------------------------------------------------------------------------------------------------------


def think_marks(tokenizer: Any) -> tuple[str, str] | None:
    """Return the texts that begin and end a thought, None for a tokenizer whose template and tokens have none."""
    template, added = str(getattr(tokenizer, "chat_template", None) or ""), tokenizer.get_added_vocab()
    return next((marks for marks in _THOUGHTS if marks[1] in template or marks[1] in added), None)


def split_thought(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], marks: tuple[str, str], is_begun: bool
) -> tuple[int, bool]:
    """Return how many of an answer's first tokens are a thought, and whether it has no end.

    Args:
        decode: tokens -> text, control tokens kept.
        is_begun: the prompt ends with the beginning of a thought.
    """
    begin, end = marks
    text = decode(ids)
    head, closing, _ = text.partition(end)
    is_leading = is_begun or head.lstrip().startswith(begin)
    if not closing:
        return (len(ids), True) if is_leading else (0, False)
    if begin in head and not is_leading:
        return 0, False
    return bisect_left(range(len(ids)), True, key=lambda count: end in decode(ids[:count])), False


# --- control tokens ---------------------------------------------------------------------------------------------------


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that steer a model, by their spelling: special ones, and added ones like <think>."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    return {text: token for text, token in added.items() if text in special or _MARKER.fullmatch(text)}


def neutralised(tokenizer: Any, text: str) -> str:
    """Return `text` with a space behind the first character of every control token that it spells."""
    for control in sorted(control_tokens(tokenizer), key=len, reverse=True):
        if len(control) > 1 and control in text:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def template_hash(tokenizer: Any, arguments: Mapping[str, Any], rendered: str) -> str:
    """Return a SHA-256 over a chat template, its arguments and what it makes of a message (it may hold a date)."""
    facts = [getattr(tokenizer, "chat_template", None), dict(arguments), rendered]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
