"""Talk with a model in the terminal.

MODEL is a checkpoint as it is or extended, one under --method, or a compressor; --memory reads any length, or goes on
from a file of `longext memory build`. What was said stays in the KV cache, so a turn costs its own tokens. /help lists
what can be typed. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does. Without a terminal, standard input
is a script: each line is one turn.

Example: longext chat out/llama2-32k --context report.txt
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.compressor.config import ConversationConfig


def run(config: ConversationConfig) -> None:
    """Load, read the documents, and talk until the user leaves."""
    from longext.compressor.writing.talking import open_conversation
    from longext.report.commands.chat import Terminal

    Terminal(open_conversation(config)).talk(config.context)


COMMANDS.register("chat", Command(config=ConversationConfig, run=run, extras=("eval",), has_json=False))
