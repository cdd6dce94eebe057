"""Which RoPE a server applies: its next-token log-probabilities beside those of the model under every candidate.

The server speaks OpenAI's completions API: it is given the beginnings of one text, and says the log-probabilities of
the likeliest tokens behind each. The model is here too, and gives the same under each candidate RoPE in one pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.checkpoint.rope_config import read_model_rope, write_rope
from longext.checkpoint.source import read_config
from longext.conversion.extend import bare_spec, exportable_parameters, trained_rope, written_rope
from longext.errors import ConfigError, LongextError
from longext.models.engines.client import Client
from longext.models.engines.endpoint import find_served
from longext.models.hf import HFLanguageModel, load_language_model
from longext.options import EndpointConfig, RuntimeConfig
from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq
from longext.untrusted import read_text

FACTORS = (2.0, 4.0, 8.0)  # that are tried besides the model's own
_METHODS = ("linear", "ntk", "ntk-by-parts", "yarn")
_LARGEST_FACTOR = 256.0
_NUM_PLACES, _TOP, _LONGEST = 12, 5, 512
_MARGIN = 2.0  # the nearest candidate is told if the next one is this many times as far


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One RoPE that a server may apply.

    Attributes:
        name: in words, "yarn, factor 8".
        distance: mean |difference| of log-probabilities in nats, weighted by the server's probabilities.
    """

    name: str
    spec: RopeSpec
    distance: float = math.inf


@dataclass(frozen=True, kw_only=True)
class EndpointAnswer:
    """What was found.

    Attributes:
        expected: the RoPE that the model's config says.
        candidates: nearest first.
        num_places: beginnings of the text that the server was asked for.
    """

    url: str
    model: str
    expected: Candidate
    candidates: tuple[Candidate, ...]
    num_places: int

    @property
    def found(self) -> Candidate | None:
        """Return the candidate that the server applies, None if two are about as near."""
        first, second = self.candidates[:2]
        return first if second.distance > _MARGIN * first.distance else None

    @property
    def ok(self) -> bool:
        """True if the server applies what the config says."""
        return self.found is not None and self.found.name == self.expected.name


def candidates_for(origin: RopeSpec, expected: RopeSpec) -> list[Candidate]:
    """Return the RoPEs to tell apart: none, every method at several factors, and what is expected, once and twice."""
    plain, own = bare_spec(origin), expected.factor
    found = [Candidate(name=_named(expected), spec=expected), Candidate(name="none", spec=plain)]
    if own > 1 and expected.method != "longrope":
        twice = dataclasses.replace(expected, factor=min(own * own, _LARGEST_FACTOR))
        found.append(Candidate(name=f"{_named(expected)} twice", spec=twice))
    for factor in sorted({own, min(own * own, _LARGEST_FACTOR), *FACTORS} - {1.0}):
        found += [_candidate(plain, method, factor) for method in _METHODS]
        found.append(_candidate(plain, "yarn", factor, attention_factor=1.0))
    return _different(found, origin.original_max_position_embeddings)


def _candidate(plain: RopeSpec, method: str, factor: float, **fields: Any) -> Candidate:
    spec = dataclasses.replace(plain, method=method, factor=factor, **fields)
    return Candidate(name=_named(spec), spec=spec)


def _named(spec: RopeSpec) -> str:
    if spec.method == "none":
        return "none"
    temperature = "" if spec.attention_factor is None else f", attention_factor {spec.attention_factor:g}"
    return f"{spec.method}, factor {spec.factor:g}{temperature}"


def _different(candidates: Sequence[Candidate], length: int) -> list[Candidate]:
    """Return the first of those that compute the same."""
    kept: list[tuple[Candidate, Any, float]] = []
    for each in candidates:
        inv_freq, temperature = compute_inv_freq(each.spec, length)
        if not any(abs(inv_freq / other - 1).max() < 1e-6 and temperature == cool for _, other, cool in kept):
            kept.append((each, inv_freq, temperature))
    return [each for each, _, _ in kept]


# --- the server -------------------------------------------------------------------------------------------------------


def ask(client: Client, model: str, prompt: str) -> dict[str, float]:
    """Return the likeliest next tokens of a prompt with their log-probabilities, by their text.

    Raises:
        LongextError: no server there, or one that does not give log-probabilities.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": _TOP}
    answer = client.post("/completions", body)
    try:
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {str(token): float(value) for token, value in top.items()}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise LongextError(
            f"{client.url} gives no log-probabilities (`logprobs` of the completions API). Start the server with them "
            "(llama-cpp-python: --logits_all true)."
        ) from error


# --- the model --------------------------------------------------------------------------------------------------------


def verify_endpoint(config: RuntimeConfig, server: EndpointConfig) -> EndpointAnswer:
    """Tell which RoPE a server applies to the model `config.model`, which is here as well.

    Args:
        server: its address, and what it calls the model.

    Raises:
        ConfigError: the model's RoPE depends on the length of the text, or the server has no such model.
        LongextError: the server cannot be asked, or has another tokenizer.
    """
    client, card = find_served(server)
    model = load_language_model(config)
    rope = read_model_rope(model.directory)
    expected, origin = written_rope(model.directory, rope), trained_rope(model.directory, rope)[0]
    if ROPE_METHODS[expected.method].follows_length:
        raise ConfigError(f"--endpoint tells static RoPEs apart, and `{expected.method}` follows the length of a text.")
    prompts = _prompts(model)
    asked = [ask(client, str(card["id"]), prompt) for prompt, _ in prompts]
    spelled = _spellings(model)
    _check_tokens(asked, spelled, client.url)
    places = torch.tensor([place - 1 for _, place in prompts])
    ids = torch.tensor([_text(model)[: int(places[-1]) + 1]])
    raw, measured = read_config(model.directory), []
    for each in candidates_for(origin, expected):
        length = round(each.spec.original_max_position_embeddings * each.spec.factor)
        parameters = exportable_parameters(rope, each.spec)
        model.set_rope(write_rope(raw, rope, each.spec, parameters, length))
        scores = _log_probabilities(model, ids, places)
        near = sum(_distance(top, row, spelled) for top, row in zip(asked, scores, strict=True)) / len(asked)
        measured.append(dataclasses.replace(each, distance=near))
    ordered = tuple(sorted(measured, key=lambda each: each.distance))
    return EndpointAnswer(
        url=client.url, model=config.model, expected=measured[0], candidates=ordered, num_places=len(asked)
    )


def _text(model: HFLanguageModel) -> list[int]:
    return model.encode(read_text(SAMPLE_DOCUMENT)[: 16 * _LONGEST])[:_LONGEST]


def _prompts(model: HFLanguageModel) -> list[tuple[str, int]]:
    """Return beginnings of the bundled story that are cut into the same tokens alone, each with its tokens."""
    ids, begun = _text(model), len(model.prefix)
    longest = min(len(ids), model.trained_length - 8)  # room for the new token
    wanted = [longest * (i + _NUM_PLACES // 3) // (_NUM_PLACES * 4 // 3) for i in range(1, _NUM_PLACES + 1)]
    found = {}
    for place in wanted:
        for end in range(place, begun + 1, -1):
            text = model.decode(ids[begun:end])
            if model.encode(text) == ids[:end]:
                found[end] = text
                break
    return [(text, end) for end, text in sorted(found.items())]


def _spellings(model: HFLanguageModel) -> dict[str, list[int]]:
    """Return the tokens by their text."""
    count = model.model.get_input_embeddings().weight.shape[0]
    texts = model.tokenizer.batch_decode([[token] for token in range(count)])
    found: dict[str, list[int]] = {}
    for token, text in enumerate(texts):
        found.setdefault(text, []).append(token)
    return found


def _check_tokens(asked: Sequence[dict[str, float]], spelled: dict[str, list[int]], url: str) -> None:
    texts = [text for top in asked for text in top]
    known = sum(text in spelled for text in texts)
    if known < 0.8 * len(texts):
        raise LongextError(
            f"Of {len(texts)} tokens that {url} named, {known} are the model's: it serves another model or tokenizer."
        )


@torch.no_grad()
def _log_probabilities(model: HFLanguageModel, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return float32 log-probabilities [n, V] behind the tokens at `places`, in one pass."""
    device = model.device
    answer = model.model(input_ids=ids.to(device), use_cache=False, logits_to_keep=places.to(device))
    scores: torch.Tensor = answer.logits[0].float().log_softmax(-1).cpu()
    return scores


def _distance(top: dict[str, float], scores: torch.Tensor, spelled: dict[str, list[int]]) -> float:
    """Return the mean |difference| of log-probabilities in nats, weighted by the server's probabilities."""
    total = weights = 0.0
    for text, value in top.items():
        if text in spelled and "\ufffd" not in text:
            own = float(scores[spelled[text]].logsumexp(0))
            total += math.exp(value) * abs(value - own)
            weights += math.exp(value)
    return total / weights if weights else 0.0
