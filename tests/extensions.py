"""The config.json that `longext extend books-5m` would write, for tests that give it to a loaded model."""

from __future__ import annotations

from longext.conversion.extend import extended_config, plan_extension
from longext.models.methods import method_request


def books_config(method, factor):
    return extended_config(plan_extension(method_request(method, "books-5m", factor=factor)))
