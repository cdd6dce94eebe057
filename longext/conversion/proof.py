"""Prove that a merged checkpoint computes what base + adapter computes, through peft and transformers alone."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longext.checkpoint.load import load_causal_lm, load_config
from longext.checkpoint.source import read_config, read_shards
from longext.checkpoint.writing import TORCH_NAMES, read_tensor
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
        first_position: position of the first one; the trained length lies inside the span.
        max_difference: largest |logit difference| between the adapter's model and the merged one, both in float32,
            the adapter's merged weights first rounded by peft and torch to the written type.
        limit: what was allowed: TOLERANCE of the largest logit.
        max_logit: that largest |logit|.
        effect: largest |logit difference| between the adapter's model and its base.
        rounding_kl: mean KL(adapter, merged) in nats: what the rounding costs; None where nothing was rounded.
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
    peft's rounded merge, where something was rounded) against those of the merged checkpoint.

    Args:
        base: directory of the base's weights.
        adapter_config: directory whose config.json the adapter's side is built from.
        trained_length: L; the tokens stand at positions around it, where length-dependent RoPE switches.
        locate: a parameter's name in the model -> its tensor in the merged files, or None.

    Raises:
        VerificationError: they differ by more than the tolerance, or the merged checkpoint lacks a tensor.
        LongextError: not enough memory.
    """
    with _quiet(), _enough_memory():
        tokens, positions = _probe(merged, trained_length)
        forward = _Forward(tokens, positions, trust_remote_code)
        theirs = forward.of_adapter(base, adapter, adapter_config, _Written(merged, locate))
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
        rounding_kl=None if rounded is None else _kl(exact, ours),
        rounding_top1=None if rounded is None else float((exact.argmax(-1) == ours.argmax(-1)).float().mean()),
    )
    check_proof(proof)
    return proof


def check_proof(proof: Proof) -> None:
    """Raise VerificationError where a figure is beyond its limit (or not a number)."""
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


def _probe(merged: Path, trained_length: int) -> tuple[list[int], list[int]]:
    """Seeded token ids and their positions, a span that crosses the trained length."""
    config = read_config(merged)
    vocabulary = (config.get("text_config") or config).get("vocab_size") or config.get("vocab_size") or 1000
    ids = np.random.default_rng(0).integers(0, vocabulary, _NUM_TOKENS)
    start = max(0, trained_length - _NUM_TOKENS // 2)
    return [int(i) for i in ids], list(range(start, start + _NUM_TOKENS))


@dataclass(frozen=True)
class _Adapted:
    """The adapter's side: logits of the base, of base + adapter, of peft's rounded merge; weights by tensor.

    Attributes:
        rounded: None where every tensor is written in float32.
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

    def of_adapter(self, base: Path, adapter: Path, config: Path, written: _Written) -> _Adapted:
        """Load base + adapter, compute, merge with peft, round as written, compute again."""
        from peft import PeftModel

        model = self._load(base, config)
        entry, exit_ = model.get_input_embeddings(), model.get_output_embeddings()
        wrapped = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").eval()
        exact = self._logits(wrapped)
        with wrapped.disable_adapter():
            plain = self._logits(wrapped)
        _untie(entry, exit_)
        merged = wrapped.merge_and_unload()
        rounds, shares = written.compare(merged)
        return _Adapted(plain, exact, self._logits(merged) if rounds else None, shares)

    def of_merged(self, directory: Path) -> torch.Tensor:
        """Logits of the merged checkpoint, loaded as anybody would."""
        try:
            return self._logits(self._load(directory, directory))
        except CheckpointError as error:
            raise VerificationError(f"the merged checkpoint does not load cleanly: {error}") from error

    def _load(self, directory: Path, config: Path) -> Any:
        import torch

        built = load_config(config, self.trust_remote_code)
        return load_causal_lm(
            directory, config=built, dtype=torch.float32, trust_remote_code=self.trust_remote_code
        ).eval()

    def _logits(self, model: Any) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([self.tokens]), position_ids=torch.tensor([self.positions]), use_cache=False
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits


def _untie(entry: Any, exit_: Any) -> None:
    """Give the output matrix a weight of its own: peft adds both LoRA updates to a shared one."""
    import torch

    if exit_ is not None and exit_.weight is entry.weight:
        exit_.weight = torch.nn.Parameter(entry.weight.detach().clone(), requires_grad=False)


class _Written:
    """The tensors of a merged checkpoint, by the names of the model's parameters."""

    def __init__(self, directory: Path, locate: Callable[[str], str | None]) -> None:
        self.homes = {name: shard for shard in read_shards(directory) for name in shard.tensors}
        self.locate = locate
        stored = [shard.tensors[name][0] for name, shard in self.homes.items()]
        self.usual = max(stored, key=stored.count)

    def compare(self, model: Any) -> tuple[bool, dict[str, float]]:
        """Round `model` in place as the files are; return (whether that changed types, different share by tensor)."""
        import torch

        rounds, shares = False, {}
        with torch.inference_mode():
            for name, parameter in model.named_parameters():
                tensor = self.locate(name)
                home = self.homes.get(tensor or "")
                dtype = getattr(torch, TORCH_NAMES[home.tensors[tensor][0] if home and tensor else self.usual])
                if torch.finfo(dtype).bits < 32:
                    parameter.copy_(parameter.to(dtype).float())
                    rounds = True
                if home and tensor and home.tensors[tensor][1] == tuple(parameter.shape):
                    allowed = 0.0 if torch.finfo(dtype).bits < 32 else WEIGHT_TOLERANCE * float(parameter.abs().max())
                    differs = (read_tensor(home, tensor).float() - parameter).abs() > allowed
                    shares[tensor] = float(differs.double().mean())
        return rounds, shares


def _kl(exact: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL divergence in nats per token of `ours` from `exact`, in float64."""
    import torch

    log_p, log_q = (logits.double().log_softmax(-1) for logits in (exact, ours))
    return float(torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean())


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading chatter off; what matters is compared, not logged."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise LongextError(
                "not enough memory to prove the merge: it loads the model in float32 (4 bytes a parameter), twice, "
                "one after the other. Use a larger machine, or --no-check and `longext verify` elsewhere."
            ) from error
        raise
