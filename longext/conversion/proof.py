"""Prove that a merged checkpoint computes what base + adapter computes, through peft and transformers alone."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longext.checkpoint.load import is_out_of_memory, load_causal_lm, load_config, quiet_transformers
from longext.checkpoint.source import read_config, text_of
from longext.checkpoint.weights import TORCH_NAMES, read_shards, tensors_of
from longext.errors import CheckpointError, LongextError, VerificationError

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order stay well below, in models of any depth
KL_LIMIT = 0.01  # nats per token that rounding the merged weights may cost
WEIGHT_TOLERANCE = 1e-6  # of a tensor's largest value, in float32; rounded values must be equal
WEIGHT_SHARE = 1e-3  # of a tensor's values that may fall on the other side of a rounding boundary
_NUM_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the comparison of the adapter with the merged checkpoint found.

    The weights are held against peft's own merge, so that the proof is one however little the adapter changes.

    Attributes:
        num_tensors: weight tensors compared with peft's merge in float32, rounded to the written type.
        worst_tensor: the one with the largest share of different values.
        worst_share: that share; equal means within WEIGHT_TOLERANCE in float32, and exactly in shorter types.
        num_tokens: seeded random tokens compared, all logits of each.
        first_position: position of the first one; the trained length is inside the span.
        max_difference: largest |logit difference| between the adapter's model and the merged one, both in float32,
            the adapter's merged weights first rounded by peft and torch to the written type.
        limit: what was allowed: TOLERANCE of the largest logit.
        max_logit: that largest |logit|.
        effect: largest |logit difference| between the adapter's model and its base.
        rounding_kl: mean KL(adapter, merged) in nats: what the rounding costs; None if nothing was rounded.
        rounding_top1: share of tokens with the same most likely successor, or None.
    """

    num_tensors: int
    worst_tensor: str
    worst_share: float
    num_tokens: int
    first_position: int
    max_difference: float
    limit: float
    max_logit: float
    effect: float
    rounding_kl: float | None = None
    rounding_top1: float | None = None

    def describe(self) -> str:
        """Return the figures in one line."""
        text = (
            f"{self.num_tensors} tensors: at most {self.worst_share:.2g} of one differs from peft's merge (limit "
            f"{WEIGHT_SHARE:g}); {self.num_tokens} tokens from position {self.first_position:,}: max |d logit| "
            f"{self.max_difference:.2g} (limit {self.limit:.2g} = {TOLERANCE:g} of the largest logit); the adapter's "
            f"own effect {self.effect:.3g}"
        )
        if self.rounding_kl is None:
            return text
        rounding = f"rounding costs KL {self.rounding_kl:.2g} (limit {KL_LIMIT:g}), same top-1 {self.rounding_top1:.1%}"
        return f"{text}; {rounding}"


def prove_merge(
    base: Path,
    adapter: Path,
    merged: Path,
    adapter_config: Path,
    trained_length: int,
    locate: Callable[[str], str | None],
    trust_remote_code: bool = False,
) -> Proof:
    """Compare base + adapter with the merged checkpoint; the models are loaded in float32, one after the other.

    Weights: peft's merge, rounded to the written type, against every written tensor. Logits: of base + adapter (of
    peft's rounded merge, if something was rounded) against those of the merged checkpoint.

    Args:
        base: directory of the base's weights.
        adapter_config: directory whose config.json the adapter's side is built from.
        trained_length: L; the tokens are at positions around it, where length-dependent RoPE switches.
        locate: a parameter's name in the model -> its tensor in the merged files, or None.

    Raises:
        VerificationError: they differ by more than the tolerance, or the merged checkpoint lacks a tensor.
        LongextError: not enough memory.
    """
    quiet_transformers()
    with warnings.catch_warnings(), _enough_memory():
        warnings.simplefilter("ignore")  # what matters is compared, not logged
        tokens, positions = _probe(merged, trained_length)
        forward = _Forward(tokens, positions, trust_remote_code)
        theirs = forward.of_adapter(base, adapter, adapter_config, merged, locate)
        gc.collect()
        ours = forward.of_merged(merged)
    exact, rounded = theirs.exact, theirs.rounded
    worst = max(theirs.shares, key=lambda name: theirs.shares[name])
    proof = Proof(
        num_tensors=len(theirs.shares),
        worst_tensor=worst,
        worst_share=theirs.shares[worst],
        num_tokens=len(tokens),
        first_position=positions[0],
        max_difference=float((ours - (exact if rounded is None else rounded)).abs().max()),
        limit=TOLERANCE * float(exact.abs().max()),
        max_logit=float(exact.abs().max()),
        effect=float((exact - theirs.plain).abs().max()),
        rounding_kl=None if rounded is None else mean_kl(exact, ours),
        rounding_top1=None if rounded is None else float((exact.argmax(-1) == ours.argmax(-1)).float().mean()),
    )
    _check_proof(proof)
    return proof


def _check_proof(proof: Proof) -> None:
    """Raise VerificationError if a figure is beyond its limit (or not a number)."""
    if not proof.worst_share <= WEIGHT_SHARE:
        raise VerificationError(
            f"the merged model differs from base + adapter in '{proof.worst_tensor}': {proof.describe()}. Nothing was "
            "written; please report it with both configs."
        )
    if not proof.max_difference <= proof.limit:
        raise VerificationError(
            f"the merged model differs from base + adapter: {proof.describe()}. Nothing was written; "
            "please report it with both configs."
        )
    if proof.rounding_kl is not None and not proof.rounding_kl <= KL_LIMIT:
        raise VerificationError(
            f"rounding the merged weights costs too much: {proof.describe()}. Nothing was written; use --dtype float32."
        )


def probe_tokens(directory: Path, count: int) -> list[int]:
    """Return `count` seeded token ids of a model's vocabulary: any ids serve to compare two models."""
    config = read_config(directory)
    vocabulary = text_of(config).get("vocab_size") or config.get("vocab_size") or 1000
    return [int(i) for i in np.random.default_rng(0).integers(0, vocabulary, count)]


def mean_kl(exact: torch.Tensor, ours: torch.Tensor) -> float:
    """Return the mean KL divergence in nats per token of logits `ours` from `exact`, both [T, V], in float64."""
    import torch

    log_p, log_q = (logits.double().log_softmax(-1) for logits in (exact, ours))
    return float(torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean())


def _probe(merged: Path, trained_length: int) -> tuple[list[int], list[int]]:
    """Token ids and their positions, a span that crosses the trained length."""
    start = max(0, trained_length - _NUM_TOKENS // 2)
    return probe_tokens(merged, _NUM_TOKENS), list(range(start, start + _NUM_TOKENS))


class _Adapted(NamedTuple):
    """The adapter's side.

    Attributes:
        plain, exact: logits of the base and of base + adapter.
        rounded: logits of peft's merge, rounded as written; None if every tensor is written in float32.
        shares: written tensor -> share of its values that differ from peft's merge.
    """

    plain: torch.Tensor
    exact: torch.Tensor
    rounded: torch.Tensor | None
    shares: dict[str, float]


@dataclass(frozen=True)
class _Forward:
    """One forward pass over the probe tokens."""

    tokens: list[int]
    positions: list[int]
    trust_remote_code: bool

    def of_adapter(
        self, base: Path, adapter: Path, config: Path, merged: Path, locate: Callable[[str], str | None]
    ) -> _Adapted:
        """Load base + adapter, compute, merge with peft, round as written, compute again."""
        import torch
        from peft import PeftModel

        model = self._load(base, config)
        entry, exit_ = model.get_input_embeddings(), model.get_output_embeddings()
        wrapped = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").eval()
        exact = self._logits(wrapped)
        with wrapped.disable_adapter():
            plain = self._logits(wrapped)
        if exit_ is not None and exit_.weight is entry.weight:
            # peft adds both LoRA updates to a shared weight
            exit_.weight = torch.nn.Parameter(entry.weight.detach().clone(), requires_grad=False)
        theirs = wrapped.merge_and_unload()
        rounds, shares = _compare_weights(theirs, merged, locate)
        return _Adapted(plain, exact, self._logits(theirs) if rounds else None, shares)

    def of_merged(self, directory: Path) -> torch.Tensor:
        """Logits of the merged checkpoint, loaded as anybody would."""
        try:
            return self._logits(self._load(directory, directory))
        except CheckpointError as error:
            raise VerificationError(f"the merged checkpoint does not load cleanly: {error}") from error

    def _load(self, directory: Path, config: Path) -> Any:
        import torch

        built, trusted = load_config(config, self.trust_remote_code), self.trust_remote_code
        return load_causal_lm(directory, config=built, dtype=torch.float32, trust_remote_code=trusted).eval()

    def _logits(self, model: Any) -> torch.Tensor:
        import torch

        ids, places = torch.tensor([self.tokens]), torch.tensor([self.positions])
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, position_ids=places, use_cache=False).logits[0].float()
        return logits


def _compare_weights(model: Any, directory: Path, locate: Callable[[str], str | None]) -> tuple[bool, dict[str, float]]:
    """Round `model` in place as the files in `directory` are.

    Returns:
        (whether that changed types, the share of different values by written tensor)
    """
    import torch

    files = tensors_of(read_shards(directory))
    dtypes = [stored.dtype for stored in files.values()]
    usual = max(dtypes, key=dtypes.count)
    rounds, shares = False, {}
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            stored = files.get(locate(name) or "")
            dtype = getattr(torch, TORCH_NAMES[stored.dtype if stored else usual])
            is_short = torch.finfo(dtype).bits < 32
            if is_short:
                parameter.copy_(parameter.to(dtype).float())
                rounds = True
            if stored and stored.shape == tuple(parameter.shape):
                allowed = 0.0 if is_short else WEIGHT_TOLERANCE * float(parameter.abs().max())
                differs = (stored.read().float() - parameter).abs() > allowed
                shares[stored.name] = float(differs.double().mean())
    return rounds, shares


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise LongextError(
            "not enough memory to prove the merge: it loads the model in float32 (4 bytes a parameter), twice, "
            "one after the other. Use a larger machine, or --no-check and `longext verify` elsewhere."
        ) from error
