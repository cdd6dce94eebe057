"""The command line."""

from longext.cli.app import app

__all__ = ["app"]
