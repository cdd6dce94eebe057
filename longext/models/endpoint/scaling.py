"""Which RoPE a server applies: its log-probabilities of a text beside those of the checkpoint under each likely RoPE.

Servers take a scaling from flags, from their own files or from config.json, and some take none or two. That changes
every log-probability, far beyond noise: of two candidates a and b the server's are compared with the line from a to b,
s = a + t (b - a) + noise. Independent noise (other kernels, quantised weights) leaves t where it is: 0 at a, 1 at b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.checkpoint.rope_config import read_model_rope
from longext.conversion.extend import extended_config, plan_extension
from longext.conversion.verify import Check, Verification
from longext.errors import ConfigError
from longext.models.endpoint.model import EndpointModel, open_endpoint
from longext.models.hf import HFLanguageModel, load_language_model
from longext.models.methods import described, method_request
from longext.options import RuntimeConfig
from longext.rope.spec import RopeSpec

_BEYOND = 1.25  # probe / trained length
_SAME = 1e-3  # nats: candidates that differ by less are one on this text
_APART = 0.25  # a candidate is told apart from one that the server is three times nearer to
_FITS = 0.5  # the noise may be half of what tells the nearest two apart
_Scores = NDArray[np.float64]
NUM_TRIED = 10  # RoPEs: the checkpoint's, and `candidates`
OWN = "what the checkpoint says"


@dataclass(frozen=True)
class Verdict:
    """What a server was found to apply.

    Attributes:
        name: the nearest candidate.
        is_sure: it is near, and the server is clearly nearer to it than to every other one.
        rivals: candidates that it cannot be told apart from.
        distances: root mean square difference to each candidate in nats a token, the nearest first.
    """

    name: str
    is_sure: bool
    rivals: tuple[str, ...]
    distances: Mapping[str, float]


def candidates(spec: RopeSpec, factor: float) -> dict[str, str]:
    """Return name -> method, as commands spell it, of what a server may apply to a model of this RoPE.

    Args:
        factor: of the scaling, against the trained length.
    """
    trained, twice = spec.original_max_position_embeddings, factor * factor
    wide = f"original_length={round(trained * factor)}"
    settings = {
        "no scaling": "linear:factor=1",
        f"linear {factor:g}x": f"linear:factor={factor:g}",
        f"ntk {factor:g}x": f"ntk:factor={factor:g}",
        f"dynamic {factor:g}x": f"dynamic:factor={factor:g}",
        f"yarn {factor:g}x": f"yarn:factor={factor:g}",
        f"yarn {factor:g}x without its temperature": f"yarn:factor={factor:g}:attention_factor=1",
        f"yarn {factor:g}x from the long length": f"yarn:factor={factor:g}:{wide}",
        f"linear {factor:g}x, twice": f"linear:factor={twice:g}",
        f"yarn {factor:g}x, twice": f"yarn:factor={twice:g}",
    }
    known = {name: text if wide in text else f"{text}:original_length={trained}" for name, text in settings.items()}
    return {name: f"{text}:replace=true" for name, text in known.items()}


def nearest(server: _Scores, known: Mapping[str, _Scores]) -> Verdict:
    """Return which candidate's log-probabilities, float64 [n] each, the server's are.

    Candidates that do not differ on the text count as the first of them.
    """
    kept: dict[str, _Scores] = {}
    for name, scores in known.items():
        if all(_rms(scores - other) > _SAME for other in kept.values()):
            kept[name] = scores
    distances = {name: _rms(server - scores) for name, scores in kept.items()}
    order = sorted(distances, key=lambda name: distances[name])
    own = kept[order[0]]
    rivals = []
    for name in order[1:]:
        line = kept[name] - own
        if float((server - own) @ line / (line @ line)) > _APART:
            rivals.append(name)
    gap = min((_rms(kept[name] - own) for name in order[1:]), default=0.0)
    is_near = distances[order[0]] <= max(_FITS * gap, _SAME)
    return Verdict(order[0], is_near and not rivals, tuple(rivals), {name: distances[name] for name in order})


def _rms(values: _Scores) -> float:
    return float(np.sqrt(np.mean(values * values)))


def verify_endpoint(config: Any, advance: Callable[[int], object] = lambda count: None) -> Verification:
    """Return whether the server at `config.endpoint` applies the RoPE of the checkpoint `config.model`, which is here.

    Args:
        config: model, endpoint and its settings, factor and length (None: by the checkpoint and the server).
        advance: called with 1 after each RoPE that was tried.

    Raises:
        ConfigError: a length that the server does not have, or no factor to try.
        LongextError: the server gives no log-probabilities, or does not answer.
    """
    served = open_endpoint(config)
    model = load_language_model(RuntimeConfig(model=config.model))
    spec = read_model_rope(model.directory).spec
    factor = config.factor or (spec.factor if spec.factor > 1 else served.context_length / served.trained_length)
    if factor <= 1:
        raise ConfigError(
            f"{config.model} is not extended and the server has no more than its {served.trained_length:,} positions: "
            "give the --factor that the server may apply."
        )
    ids = torch.tensor([_probe(served, _length(config.length, spec, served))])
    told = -served.score(ids, 1).nll[0].double().numpy()
    known = {OWN: _scores(model, ids)}
    advance(1)
    for name, method in candidates(spec, factor).items():
        request = method_request(method, config.model, config.revision)
        model.set_rope(extended_config(plan_extension(request)))
        known[name] = _scores(model, ids)
        advance(1)
    return _verification(config, nearest(told, known), described(spec), ids.shape[1])


def _length(asked: int | None, spec: RopeSpec, served: EndpointModel) -> int:
    trained, room = spec.original_max_position_embeddings, served.context_length - 1
    if asked is not None and asked > room:
        raise ConfigError(f"--length must be at most {room:,} for this server, got {asked:,}.")
    return asked or min(round(_BEYOND * trained), room)


def _probe(model: EndpointModel, length: int) -> list[int]:
    """Return the beginning of the bundled story, repeated if it is too short."""
    text = SAMPLE_DOCUMENT.read_text(encoding="utf-8")
    ids = model.encode(text)
    while len(ids) < length:
        text += text
        ids = model.encode(text)
    return ids[:length]


def _scores(model: HFLanguageModel, ids: torch.Tensor) -> _Scores:
    scores: _Scores = -model.score(ids, 1).nll[0].cpu().double().numpy()
    return scores


def _verification(config: Any, found: Verdict, formula: str, length: int) -> Verification:
    distance = found.distances[found.name]
    near = f"{distance:.2g} nats a token from it, on {length:,} tokens"
    if not found.is_sure:
        others = f", not told apart from {' and '.join(found.rivals)}" if found.rivals else ""
        status, told = "fail", f"none of the RoPEs tried for certain; nearest: {found.name}{others} ({near})"
    elif found.name == OWN:
        status, told = "pass", f"{OWN} ({near}): {formula}"
    else:
        status, told = "fail", f"{found.name}, not {OWN} ({near}); the checkpoint: {formula}"
    rows = [Check(name, "info", f"{value:.3g} nats a token from the server") for name, value in found.distances.items()]
    return Verification(config.model, None, (Check("the server applies", status, told), *rows))
