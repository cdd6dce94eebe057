"""Chat templates: whether prompts go through the tokenizer's, and what it puts around a message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longext.errors import ConfigError
from longext.evaluation.protocol import LanguageModel

_MESSAGE = "longext's message"  # stands for a message while a template is taken apart


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around a user's message.

    Attributes:
        before: the text in front, BOS included where the template writes it.
        after: the text behind, up to where the assistant's answer begins.
        begins: the template writes BOS itself.
    """

    before: str
    after: str
    begins: bool


def tokenizer_of(model: LanguageModel) -> Any:
    """Return the tokenizer of a plain model, or of the model that a reader reads with."""
    plain: Any = getattr(model, "plain", model)
    return plain.tokenizer


def has_template(model: LanguageModel) -> bool:
    """Return True where the model's tokenizer has a chat template."""
    return bool(getattr(tokenizer_of(model), "chat_template", None))


def uses_template(model: LanguageModel, asked: bool | None) -> bool:
    """Return True where prompts go through the chat template: as asked, or (None) where the tokenizer has one.

    Raises:
        ConfigError: it is asked for, and there is none.
    """
    if asked and not has_template(model):
        raise ConfigError(
            f"The tokenizer of {model.name} has no chat template: leave --chat-template out, or put the model's own "
            "beside its tokenizer (chat_template.jinja)."
        )
    return has_template(model) if asked is None else asked


def render_chat(model: LanguageModel, messages: list[dict[str, str]], *, answer_begun: bool = False) -> str:
    """Return messages in the chat template, up to where the assistant's answer begins.

    Args:
        answer_begun: the last message is the beginning of the answer, and stays open.

    Raises:
        ConfigError: the template refuses the messages (a system message, two turns of one role).
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer_of(model).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answer_begun, continue_final_message=answer_begun
        )
    except (TemplateError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The chat template of {model.name} refuses these messages ({reason}); --no-chat-template asks without it."
        ) from error
    return text


def chat_tokens(model: LanguageModel, text: str) -> list[int]:
    """Return the tokens of a user's message in the chat template of the model's tokenizer; BOS stands there once."""
    whole = render_chat(model, [{"role": "user", "content": text}])
    return model.encode(whole, add_bos=not _begins(model, whole))


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
    return ChatFrame(before, after, _begins(model, whole))


def _begins(model: LanguageModel, whole: str) -> bool:
    """Return True where a rendered prompt begins with BOS."""
    bos = tokenizer_of(model).bos_token
    return bool(bos) and whole.startswith(bos)
