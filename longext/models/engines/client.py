"""Requests to a server of OpenAI's completions API: tried again while it is busy, and one line if it cannot answer."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from typing import Any

from longext.errors import ConfigError, LongextError
from longext.untrusted import decode, parse_json

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # what another try may get past
_TRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds; doubled after each try
_LARGEST = 2**30  # bytes of an answer
_LONGEST_REASON = 300  # characters of what a server says


class Refused(LongextError):
    """The server answered that it will not do this.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named, and no other."""

    def redirect_request(self, *args: Any, **keys: Any) -> None:
        """Follow nothing: the answer is then an error that names the status."""
        return


def base_url(url: str) -> str:
    """Return the address that paths of the API are put behind, which ends with /v1.

    Raises:
        ConfigError: no http or https address, or one that holds a secret.
    """
    parts = urllib.parse.SplitResult("", "", "", "", "")
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_whole = False
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "--endpoint is written into results: give an address without user, password and ?query, and the key in "
            "the environment variable that --endpoint-key names."
        )
    if not is_whole:
        raise ConfigError(f"--endpoint must be an address like http://localhost:8000/v1, got '{url}'.")
    path = parts.path.rstrip("/").removesuffix("/completions")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}"


class Client:
    """A server and how to reach it; several threads may ask at once.

    Args:
        url: as the user gave it.
        key: sent as a bearer token; "" for none. It is in no message.
        timeout: seconds to wait for an answer.

    Raises:
        ConfigError: an address that is none, or a key that no header can hold.

    Attributes:
        url: of the API, which ends with /v1.
    """

    def __init__(self, url: str, key: str = "", timeout: float = 600.0) -> None:
        self.url = base_url(url)
        self._key, self._timeout = key.strip(), timeout  # files of keys end with a line break
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("The key of --endpoint-key has characters that no key has: a line break or no ASCII.")
        self._opener = urllib.request.build_opener(_NoRedirects)

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path, tried once.

        Raises:
            Refused: the server says no.
            LongextError: it cannot be reached, or says something else than JSON.
        """
        return self._ask(path, None, tries=1)

    def post(self, path: str, body: dict[str, Any], refusals: Collection[int] = ()) -> dict[str, Any]:
        """Return the answer to a JSON object, tried again while the server is busy or away.

        Args:
            refusals: statuses that mean no, though other servers are busy when they say so.

        Raises:
            Refused, LongextError: as `get`.
        """
        return self._ask(path, json.dumps(body).encode(), _TRIES, refusals)

    def _ask(self, path: str, body: bytes | None, tries: int, refusals: Collection[int] = ()) -> dict[str, Any]:
        where = f"{self.url}{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        for attempt in itertools.count(1):
            asked, wait = urllib.request.Request(where, body, headers), 0.0
            try:
                with self._opener.open(asked, timeout=self._timeout) as response:
                    content: bytes = response.read(_LARGEST)
                answer: dict[str, Any] = parse_json(
                    decode(content, where, LongextError), where, LongextError, want=dict, constant=float
                )
                return answer
            except urllib.error.HTTPError as error:
                reason, wait = self._told(error), _retry_after(error)
                if error.code not in _AGAIN or error.code in refusals:
                    raise Refused(f"{where}: {reason}", error.code) from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error) or type(error).__name__)
            if attempt >= tries:
                times = f" after {tries} tries" if tries > 1 else ""
                raise LongextError(f"No answer from {where}{times}: {reason}. Is the server up?") from None
            pause = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1))
            time.sleep(max(wait, pause * random.uniform(0.5, 1.0)))
        raise AssertionError

    def _told(self, error: urllib.error.HTTPError) -> str:
        """Return status and message of an answer that is an error, the key taken out of it."""
        try:
            text = error.read(2**16).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            value = json.loads(text)
            inner = value.get("error", value)
            text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
        except (ValueError, AttributeError, RecursionError):
            pass
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        short = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
        return f"HTTP {error.code}{f' ({short})' if short else f' {error.reason}'}"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Return the seconds that the server asks to wait, 0 if it does not say."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(error.headers.get("Retry-After", 0))))
    except (TypeError, ValueError):
        return 0.0
