"""Hide a number in a long text and ask for it.

Example: longext passkey books-5m --method yarn --factor 8 --lengths 512,1024,2048
"""

from longext.cli.app import COMMANDS
from longext.cli.evaluation import evaluation_command

COMMANDS.register("passkey", evaluation_command("passkey"))
