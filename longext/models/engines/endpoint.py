"""A model that a server runs, as a `LanguageModel`: greedy answers and, where it gives them, log-probabilities.

What servers differ in is tried, not configured: prompts as token ids or as text, settings beyond OpenAI's, and the two
spellings for log-probabilities of a prompt (vLLM's `prompt_logprobs`, OpenAI's `echo` with `logprobs`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from longext.checkpoint.checks import check_scores
from longext.checkpoint.load import load_config, load_tokenizer
from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import read_json, resolve_model
from longext.checksums import sha256_of
from longext.errors import ConfigError, LongextError
from longext.models.engines.client import Client, Refused
from longext.models.protocol import TokenScores
from longext.models.tokens import encode_text
from longext.models.turns import Asking, ending_tokens, prefix_of
from longext.options import EndpointConfig
from longext.registry import did_you_mean
from longext.untrusted import is_a, note

_PROBE = "The quick brown fox jumps over the lazy dog."
_MISREAD = (400, 404, 415, 422, 500, 501)  # what servers say to a prompt or a setting that they do not know
_PLAIN = {"temperature": 0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
# what some servers take from generation_config.json unless it is set, and what vLLM gives if asked
_BEYOND = {"repetition_penalty": 1.0, "repeat_penalty": 1.0, "return_token_ids": True, "skip_special_tokens": False}
_TOLD: tuple[str, ...] = ("owned_by", "root", "max_model_len")  # of what a server says of a model
_ECHOED = ("token_logprobs", "top_logprobs")
_Scores = tuple[list[float], list[bool]]


@dataclass(frozen=True)
class Spelling:
    """How a server wants to be asked.

    Attributes:
        takes_ids: prompts are token ids; else text, which the server splits itself.
        takes_more: settings beyond OpenAI's are no error.
    """

    takes_ids: bool
    takes_more: bool


class EndpointModel:
    """A model behind a server.

    Args:
        client: the server.
        card: what it says of the model, `id` among it.
        tokenizer: of the model, as it is here.
        directory: where that was loaded from; a config.json there says what was trained.
        concurrency: requests at once.

    Attributes:
        asking: how questions are put to it.
        workers: requests at once.
    """

    device = torch.device("cpu")
    follows_length = False  # the server's matter

    def __init__(self, client: Client, card: dict[str, Any], tokenizer: Any, directory: Path, concurrency: int) -> None:
        self.client, self.card, self.tokenizer, self.directory = client, card, tokenizer, directory
        self.name = str(card["id"])
        self.asking = Asking()
        self.workers = concurrency
        self.prefix = prefix_of(tokenizer)
        self._named = _named(directory)
        self.spelling = self._find_spelling()
        self._read: Callable[[Sequence[int], int], _Scores | None] | None = None

    # --- tokens -------------------------------------------------------------------------------------------------

    @property
    def ending_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: by the files beside the tokenizer, its EOS, the template's end of a turn."""
        return ending_tokens(self._named, self.tokenizer, self.asking.template_arguments)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return token ids; with `add_bos` the tokenizer's own prefix in front."""
        ids = encode_text(self.tokenizer, text)
        return [*self.prefix, *ids] if add_bos else ids

    def decode(self, input_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(input_ids), skip_special_tokens=True))

    @property
    def context_length(self) -> int:
        """How many positions the server says that it has, else the config.json beside the tokenizer.

        Raises:
            ConfigError: neither says.
        """
        meta = self.card.get("meta")
        told = self.card.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
        if is_a(told, int) and told:
            return int(told)
        return int(self._rope().max_position_embeddings)

    @property
    def trained_length(self) -> int:
        """The pre-training length by the config.json beside the tokenizer (ConfigError: there is none)."""
        return int(self._rope().spec.original_max_position_embeddings)

    def _rope(self) -> Any:
        if not (self.directory / "config.json").is_file():
            raise ConfigError(
                f"{self.directory} has a tokenizer and no config.json, and the server does not say how long a context "
                "it has: give the directory of the model, weights are not needed."
            )
        return read_model_rope(self.directory)

    # --- asking -------------------------------------------------------------------------------------------------

    def _find_spelling(self) -> Spelling:
        """Return how the server wants to be asked, by the first of four ways that it understands.

        A server that counts the prompt's tokens otherwise has not read it as ids.
        """
        ids = self.encode(_PROBE)
        refused: Refused | None = None
        for spelling in (Spelling(True, True), Spelling(True, False), Spelling(False, True), Spelling(False, False)):
            try:
                answer = self._complete(ids, 1, spelling, is_trial=True)
            except Refused as error:
                if error.status not in _MISREAD:
                    raise
                refused = error
                continue
            counted = _used(answer, "prompt_tokens")
            if counted in (None, len(ids)):
                return spelling
            if not spelling.takes_ids:
                note(
                    f"{self.client.url} makes {counted} tokens of a text that the tokenizer of {self.directory} makes "
                    f"{len(ids)} of: is it that model's tokenizer?"
                )
                return spelling
        assert refused is not None, "the last way was refused too"
        raise refused

    def _complete(
        self, input_ids: Sequence[int], max_tokens: int, spelling: Spelling, is_trial: bool = False, **more: Any
    ) -> dict[str, Any]:
        """Return the answer to one prompt.

        Args:
            is_trial: nothing is known of the spelling yet: an error inside the server is a refusal of it.
            more: further settings.
        """
        settings: dict[str, Any] = dict(_PLAIN)
        if spelling.takes_more:
            settings |= _BEYOND | {"stop_token_ids": sorted(self.ending_tokens)}
        prompt: Any = list(input_ids) if spelling.takes_ids else self._text(input_ids)
        body = {"model": self.name, "prompt": prompt, "max_tokens": max_tokens, **settings, **more}
        return self.client.post("/completions", body, refusals=_MISREAD if is_trial else ())

    def _text(self, input_ids: Sequence[int]) -> str:
        """Return a prompt as text, without the prefix, which the server puts in front itself."""
        begun = len(self.prefix) if tuple(input_ids[: len(self.prefix)]) == self.prefix else 0
        return str(self.tokenizer.decode(list(input_ids[begun:]), skip_special_tokens=False))

    def _choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise LongextError(f"{self.client.url}/completions gave no completion: 'choices' must hold one.")
        choice: dict[str, Any] = choices[0]
        return choice

    def greedy(self, input_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt, up to and with an ending token.

        A server that gives text alone has its text split by the tokenizer here.
        """
        choice = self._choice(self._complete(input_ids, max_new_tokens, self.spelling))
        ids, text, ends = choice.get("token_ids"), choice.get("text"), self.ending_tokens
        if not isinstance(ids, list) or not all(is_a(each, int) for each in ids):
            if not isinstance(text, str):
                raise LongextError(f"{self.client.url}/completions gave no text.")
            ids = self.encode(text, add_bos=False)
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        if end is not None:
            return ids[: end + 1]
        return [*ids, min(ends)] if choice.get("finish_reason") == "stop" and ends else ids

    # --- scoring ------------------------------------------------------------------------------------------------

    def score(self, input_ids: torch.Tensor, first: int) -> TokenScores:
        """Score tokens first .. T-1 of int64 [B, T], a request for each row.

        Raises:
            LongextError: the server gives no log-probabilities of a prompt, or of other tokens, or no finite ones.
        """
        assert first >= 1, "the first token of a window has nothing to be predicted from"
        rows = [self._score(row, first) for row in input_ids.tolist()]
        nll = torch.tensor([[-value for value in values] for values, _ in rows], dtype=torch.float32)
        check_scores(nll, first)
        return TokenScores(nll, torch.tensor([is_top1 for _, is_top1 in rows], dtype=torch.bool))

    def _score(self, ids: list[int], first: int) -> _Scores:
        for read in (self._prompt_logprobs, self._echoed) if self._read is None else (self._read,):
            try:
                found = read(ids, first)
            except Refused as error:
                if error.status not in _MISREAD or self._read is not None or read == self._echoed:
                    raise
                continue
            if found is not None:
                self._read = read
                return found
        raise LongextError(
            f"{self.client.url} gives no log-probabilities of a prompt, by prompt_logprobs or by echo with logprobs: "
            "answers can be generated there, but not scored."
        )

    def _prompt_logprobs(self, ids: Sequence[int], first: int) -> _Scores | None:
        """Read vLLM's spelling: an object for each token, from id to log-probability and rank."""
        if not (self.spelling.takes_ids and self.spelling.takes_more):
            return None
        choice = self._choice(self._complete(ids, 1, self.spelling, self._read is None, prompt_logprobs=1))
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids):
            return None
        values, is_top1 = [], []
        for row, token in zip(rows[first:], ids[first:], strict=True):
            own = row.get(str(token)) if isinstance(row, dict) else None
            if not isinstance(own, dict) or not isinstance(own.get("logprob"), (int, float)):
                raise self._other_tokens(len(ids), len(rows))
            values.append(float(own["logprob"]))
            best = max(float(each["logprob"]) for each in row.values())
            is_top1.append(own["rank"] == 1 if is_a(own.get("rank"), int) else own["logprob"] >= best)
        return values, is_top1

    def _echoed(self, ids: Sequence[int], first: int) -> _Scores | None:
        """Read OpenAI's spelling: the prompt comes back, then one token more, with lists of log-probabilities."""
        if not self.spelling.takes_ids and self.encode(self._text(ids)) != list(ids):
            raise LongextError(
                f"{self.client.url} takes prompts as text alone and splits them itself, and these tokens are not what "
                "comes of their text (a window in the middle of a text, without the first token that a text has): "
                "serve the model where prompts may be token ids (vLLM), or use a protocol that begins with a text "
                "(ppl: --protocol yarn-truncated)."
            )
        answer = self._complete(ids, 1, self.spelling, self._read is None, echo=True, logprobs=1)
        told = self._choice(answer).get("logprobs")
        values, tops = ([] if not isinstance(told, dict) else told.get(key) or [] for key in _ECHOED)
        count = len(ids) - first
        made = _used(answer, "completion_tokens")
        end = len(values) - (1 if made is None else made)
        if end < count or len(tops) != len(values):
            return None
        if end not in (len(ids), len(ids) - len(self.prefix)):
            raise self._other_tokens(len(ids), end)
        own = values[end - count : end]
        best = [max(top.values()) if isinstance(top, dict) and top else None for top in tops[end - count : end]]
        if not all(isinstance(value, (int, float)) for value in (*own, *best)):
            return None
        return [float(value) for value in own], [value >= top for value, top in zip(own, best, strict=True)]

    def _other_tokens(self, here: int, there: int) -> LongextError:
        return LongextError(
            f"{self.client.url} has scored {there} tokens of a text that has {here} by the tokenizer of "
            f"{self.directory}: give the tokenizer of the model that it serves."
        )

    # --- what a record says -------------------------------------------------------------------------------------

    def weights_checksum(self) -> str:
        """Return a hash of what the server says of the model; its weights are not seen."""
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()

    def _facts(self) -> dict[str, Any]:
        told = {key: self.card[key] for key in _TOLD if key in self.card}
        return {"url": self.client.url, **told}

    def describe(self) -> dict[str, Any]:
        """Return the model part of a result record; what the server does not say is None."""
        files = (self.directory / name for name in ("tokenizer.json", "tokenizer.model"))
        prompts = "token ids" if self.spelling.takes_ids else "text"
        return {
            "id": self.name,
            "endpoint": {**self._facts(), "prompts": prompts},
            "config_sha256": None,
            "tokenizer_sha256": next((sha256_of(file) for file in files if file.is_file()), None),
            "rope_parameters": None,
            "max_position_embeddings": self.card.get("max_model_len"),
            "attention": None,
            "dtype": None,
            "device": "server",
            "num_threads": None,
            "num_parameters": None,
            "prefix": list(self.prefix),
            "ending_tokens": sorted(self.ending_tokens),
        }


def _used(answer: dict[str, Any], name: str) -> int | None:
    """Return a number of tokens that an answer tells, None for none."""
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if is_a(count, int) else None


def _named(directory: Path) -> Any:
    """Return what names ending tokens beside a tokenizer: generation_config.json and config.json, if they are there."""
    settings, nothing = directory / "generation_config.json", SimpleNamespace(eos_token_id=None)
    generation = SimpleNamespace(eos_token_id=None)
    if settings.is_file():
        generation.eos_token_id = read_json(settings, "settings of generation").get("eos_token_id")
    is_whole = (directory / "config.json").is_file()
    config = load_config(directory) if is_whole else SimpleNamespace(get_text_config=lambda: nothing)
    return SimpleNamespace(generation_config=generation, config=config)


def open_endpoint(config: Any) -> EndpointModel:
    """Return the model that the settings `endpoint`, `endpoint_model` and `model` (its tokenizer) name.

    Raises:
        ConfigError: no such model there, or settings that a server cannot follow.
        LongextError: the server does not answer.
    """
    given = [f"--{name}" for name in ("method", "factor", "memory") if getattr(config, name, None)]
    if given:
        raise ConfigError(f"{', '.join(given)}: the server at --endpoint runs its own model as it is. Leave it out.")
    directory = resolve_model(config.model, config.revision, weights=False)
    tokenizer = load_tokenizer(directory, config.trust_remote_code)
    client, card = find_served(config)
    return EndpointModel(client, card, tokenizer, directory, config.concurrency)


def find_served(config: EndpointConfig) -> tuple[Client, dict[str, Any]]:
    """Return the server of a config and what it says of the model, `id` among it.

    Raises:
        ConfigError: an address that is none, a key that is refused, or no such model there.
        LongextError: the server does not answer.
    """
    client = Client(str(config.endpoint), os.environ.get(config.endpoint_key, ""), config.endpoint_timeout)
    return client, _card(client, config.endpoint_model, config.endpoint_key)


def _card(client: Client, name: str | None, key: str) -> dict[str, Any]:
    """Return what the server says of a model, of the only one if none is named."""
    try:
        listed = client.get("/models").get("data")
    except Refused as error:
        if error.status in (401, 403):
            raise ConfigError(
                f"{error} The key is read from the environment variable {key} (--endpoint-key)."
            ) from None
        if name is None:
            raise ConfigError(f"{error} Name the model: --endpoint-model NAME.") from None
        return {"id": name}
    cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
    found = {str(card.get("id")): card for card in cards}
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None or (found and name not in found):
        asked = "Give --endpoint-model" if name is None else f"No model '{name}' at {client.url}"
        raise ConfigError(f"{asked}. {did_you_mean(name or '', found) if found else 'The server lists no model.'}")
    return found.get(name, {"id": name})
