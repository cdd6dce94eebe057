"""How a model is asked: chat templates, what is put around a message, and what a record says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longext.errors import ConfigError
from longext.models.answer_file import hash_of
from longext.models.protocol import LanguageModel
from longext.models.turns import Asking, neutralised, parse_arguments, template_hash, think_marks
from longext.options import ChatConfig

_MESSAGE = "longext's message"  # takes the place of a message while a template is taken apart


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around a user's message.

    Attributes:
        before: the text in front, the tokenizer's prefix included if the template writes it.
        after: the text behind, up to where the assistant's answer begins.
        begins: the template writes the prefix itself.
        thinks: what is behind ends with the beginning of a thought.
    """

    before: str
    after: str
    begins: bool
    thinks: bool = False


def asking_of(config: ChatConfig) -> Asking:
    """Return how a config asks to put questions.

    Raises:
        ConfigError: a --template-arg that is none.
    """
    return Asking(parse_arguments(config.template_arg), config.strip_thinking, config.neutralise_control_tokens)


def check_asking(config: ChatConfig) -> None:
    """Raise ConfigError for a --template-arg that is none, or one that no template will take."""
    if asking_of(config).template_arguments and config.chat_template is False:
        raise ConfigError("--template-arg is for the chat template, and --no-chat-template leaves it out: drop one.")


def set_asking(model: LanguageModel, config: ChatConfig) -> None:
    """Let a model be asked as `config` says.

    Raises:
        ConfigError: as `stripped_marks`; or template variables for a tokenizer without a template.
    """
    asking = asking_of(config)
    if asking.template_arguments and not has_template(model):
        raise ConfigError(f"--template-arg is for a chat template, and the tokenizer of {model.name} has none.")
    model.asking = asking
    stripped_marks(model)


def has_template(model: LanguageModel) -> bool:
    """Return True if the model's tokenizer has a chat template."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def uses_template(model: LanguageModel, chosen: bool | None) -> bool:
    """Return True if prompts go through the chat template: as chosen, or (None) if the tokenizer has one.

    Raises:
        ConfigError: it is asked for, and there is none.
    """
    if chosen and not has_template(model):
        raise ConfigError(
            f"The tokenizer of {model.name} has no chat template: leave --chat-template out, or put the model's own "
            "with its tokenizer (chat_template.jinja)."
        )
    return has_template(model) if chosen is None else chosen


def render_chat(model: LanguageModel, messages: list[dict[str, str]], *, answer_begun: bool = False) -> str:
    """Return messages in the chat template, up to where the assistant's answer begins.

    Args:
        answer_begun: the last message is the beginning of the answer, and stays open.

    Raises:
        ConfigError: the template refuses the messages (a system message, two turns of one role).
    """
    from jinja2 import TemplateError

    try:
        text: str = model.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not answer_begun,
            continue_final_message=answer_begun,
            **model.asking.template_arguments,
        )
    except (TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The chat template of {model.name} refuses these messages ({reason}); --no-chat-template asks without it."
        ) from error
    return text


def user_text(model: LanguageModel, text: str) -> str:
    """Return a text as it goes into a prompt: its control tokens written as text if the model's settings say so."""
    return neutralised(model.tokenizer, text) if model.asking.neutralise else text


def chat_tokens(model: LanguageModel, text: str) -> list[int]:
    """Return the tokens of a user's message in the chat template of the model's tokenizer, its prefix there once."""
    return with_prefix(model, model.encode(render_chat(model, [{"role": "user", "content": text}]), add_bos=False))


def with_prefix(model: LanguageModel, ids: list[int]) -> list[int]:
    """Return tokens with the tokenizer's prefix in front, unless they begin with it."""
    prefix = list(model.prefix)
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def chat_frame(model: LanguageModel) -> ChatFrame:
    """Return what the chat template puts around a user's message.

    Raises:
        ConfigError: the template does not write the message once, as it is.
    """
    whole = render_chat(model, [{"role": "user", "content": _MESSAGE}])
    if whole.count(_MESSAGE) != 1:
        raise ConfigError(
            f"The chat template of {model.name} does not write a message once, as it is; --no-chat-template asks "
            "without it."
        )
    before, after = whole.split(_MESSAGE)
    ids, marks = model.encode(whole, add_bos=False), think_marks(model.tokenizer)
    return ChatFrame(
        before,
        after,
        begins=with_prefix(model, ids) == ids,
        thinks=marks is not None and after.rstrip().endswith(marks[0]),
    )


@dataclass(frozen=True)
class Turns:
    """What stands around the messages of a conversation, so that it can be written as it goes on.

    Attributes:
        before: in front of the first user's message, a system message and the tokenizer's prefix included.
        after: behind a user's message, up to where the answer begins.
        between: from the end of an answer to the next user's message.
        begins: the template writes the tokenizer's prefix itself.
        stop: texts that end an answer.
        name: what writes it, for people.
        is_exact: a conversation put together so is what the template makes of all its messages at once.
    """

    before: str
    after: str
    between: str
    begins: bool = False
    stop: tuple[str, ...] = ()
    name: str = "the chat template"
    is_exact: bool = True


def plain_turns(system: str | None = None) -> Turns:
    """Return plain turns, for models without a chat template: "User: ..." and "Assistant:", a line each."""
    before = f"{system}\n\nUser: " if system else "User: "
    return Turns(before, "\nAssistant:", "\nUser: ", stop=("\nUser:",), name="plain turns (User: ... Assistant: ...)")


def template_turns(model: LanguageModel, system: str | None = None) -> Turns:
    """Return what the chat template of the model's tokenizer puts around the messages of a conversation.

    Raises:
        ConfigError: the template refuses such messages, or does not write each once, as it is.
    """
    first = [{"role": "system", "content": system}] if system else []
    said = [f"longext's {name} message" for name in ("first", "second", "third", "fourth", "fifth")]
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    whole = render_chat(model, [*first, *messages])
    parts, rest = [], whole
    for text in said:
        part, found, rest = rest.partition(text)
        if not found or text in rest:
            raise ConfigError(
                f"The chat template of {model.name} does not write each message once, as it is; --no-chat-template "
                "asks without it."
            )
        parts.append(part)
    before, between = parts[0], parts[2]
    alone = render_chat(model, [*first, messages[0]])
    begins = with_prefix(model, ids := model.encode(whole, add_bos=False)) == ids
    after = alone.partition(said[0])[2]
    is_exact = parts == [before, after, between, after, between] and rest == after and alone == before + said[0] + after
    return Turns(before, after, between, begins, is_exact=is_exact)


def stripped_marks(model: LanguageModel) -> tuple[str, str] | None:
    """Return the marks of thoughts that are taken off answers, None if answers stay as they are.

    Raises:
        ConfigError: --strip-thinking, and the tokenizer knows no such marks.
    """
    strip, marks = model.asking.strip_thinking, think_marks(model.tokenizer)
    if strip and marks is None:
        raise ConfigError(
            f"The tokenizer of {model.name} has no marks of thoughts (<think>), neither as tokens nor in a chat "
            "template: leave --strip-thinking out."
        )
    return None if strip is False else marks


# --- what a record says -----------------------------------------------------------------------------------------------


def asked_facts(model: LanguageModel, is_chat: bool, prompt_hashes: Iterable[str]) -> dict[str, Any]:
    """Return what the protocol of a record holds of how a model was asked, and what of its answers was read."""
    marks = stripped_marks(model)
    return {
        **template_facts(model, is_chat),
        "strip_thinking": list(marks) if marks else None,
        "prompts_sha256": hash_of(prompt_hashes),
    }


def template_facts(model: LanguageModel, is_chat: bool) -> dict[str, Any]:
    """Return what the protocol of a record holds of the chat template.

    Its hash is over its text, its arguments and what it makes of a message: a template that writes the date has
    another one each day.
    """
    asking = model.asking
    rendered = render_chat(model, [{"role": "user", "content": _MESSAGE}]) if is_chat else ""
    return {
        "template_sha256": template_hash(model.tokenizer, asking.template_arguments, rendered) if is_chat else None,
        "template_arguments": dict(asking.template_arguments) if is_chat else None,
        "neutralise_control_tokens": asking.neutralise,
    }


def control_baseline(model: LanguageModel, is_chat: bool) -> Sequence[int]:
    """Return what of a prompt is the tokenizer's and the template's: the tokens of a question of one letter."""
    return chat_tokens(model, "a") if is_chat else model.prefix
