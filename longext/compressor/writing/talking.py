"""A conversation as `longext chat` and `longext.chat` open it, and what it says of itself."""

from __future__ import annotations

from longext.compressor.config import ConversationConfig
from longext.compressor.reading.window import WindowSession
from longext.compressor.writing.conversation import Conversation, Writing
from longext.compressor.writing.generation import read_context
from longext.compressor.writing.opening import open_text
from longext.errors import ConfigError
from longext.models.chat import check_asking, set_asking
from longext.models.decode import check_sampling


def open_conversation(config: ConversationConfig) -> Conversation:
    """Load what `config` names; its documents (`context`) are not read yet.

    Raises:
        ConfigError, CheckpointError, DataError: as the message says.
    """
    check_sampling(config.temperature, config.top_p)
    check_asking(config)
    if config.output is not None:
        raise ConfigError("`output` is not for chat: it prints the answers; /save keeps the memory.")
    if (config.memory or "").partition(":")[0].endswith("-aware"):
        raise ConfigError(
            f"--memory {config.memory} chooses by the question, which comes after the text here: leave -aware out."
        )
    for name in config.context:
        read_context(name)  # before anything is loaded
    opened = open_text(config)
    set_asking(opened.model, config)
    writing = Writing(config.max_new_tokens, config.temperature, config.top_p, config.seed, config.stop)
    return Conversation(
        opened,
        template=config.chat_template,
        system=config.system,
        writing=writing,
        when_full=config.when_full if isinstance(opened.text, WindowSession) else None,
    )


def state_of(conversation: Conversation) -> str:
    """Return one line: how much has been read, how full the window is, what the keys and values take."""
    text = conversation.text
    used, window = text.positions()
    whole, size = text.num_tokens, text.facts().get("num_bytes")
    parts = [f"{used:,} of {window:,} positions ({used / window:.0%})"]
    if used != whole:
        parts.insert(0, f"{whole:,} tokens read")
    if size is not None:
        parts.append(f"{size / 2**20:,.1f} MiB of KV")
    return ", ".join(parts)


def room_of(conversation: Conversation) -> list[str]:
    """Return lines on what is kept, how, and what happens when there is no more room."""
    text, facts = conversation.text, conversation.text.facts()
    kept = conversation.opened.spec or (f"a compressor at {facts['ratio']}x" if "ratio" in facts else "")
    lines = [f"memory: {kept}, {facts['num_slots']:,} slots" if "num_slots" in facts else f"memory: {kept or 'none'}"]
    if kept and "num_slots" not in facts:
        lines = [f"memory: {kept}"]
    lost = [
        f"the first {facts[f'num_{what}']:,} tokens are {what}"
        for what in ("forgotten", "thinned")
        if facts.get(f"num_{what}")
    ]
    policy = {
        "forget": "the oldest turns are forgotten and the rest is read again",
        "refuse": "what does not fit is refused",
        "": "nothing: it keeps so much and no more",
    }
    if isinstance(text, WindowSession):
        full = policy["forget" if conversation.forgets else "refuse"]
    else:
        full = {"thin": "far text is thinned", "forget": "the oldest text is forgotten"}.get(
            text.when_full, policy.get(text.when_full, "")
        )
    lines += [f"when full: {full}", *lost]
    if conversation.opened.documents:
        names = ", ".join(f"{one['name']} ({one['num_tokens']:,} tokens)" for one in conversation.opened.documents)
        lines.append(f"documents: {names}")
    lines.append(f"computed: {text.num_computed:,} tokens have gone through the model")
    return lines
