"""A Hugging Face causal model as a `LanguageModel`: logits only where they are scored, a fresh RoPE for every call."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longext.checkpoint.checks import (
    check_finite,
    check_ids,
    check_scores,
    check_tokens,
    embedding_rows,
    weights_checksum,
)
from longext.checkpoint.load import (
    MAPPED,
    build_model_config,
    load_causal_lm,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from longext.checkpoint.rope_config import length_of, model_rope, read_model_rope
from longext.checkpoint.source import is_adapter, read_config, resolve_model
from longext.checkpoint.weights import read_shards
from longext.checksums import sha256_of
from longext.conversion.extend import ExtensionPlan, extended_config, plan_extension
from longext.conversion.merge import merged_config
from longext.errors import ConfigError
from longext.models.adapted import adapter_facts, plan_adapter, put_in
from longext.models.head import decoder_of, head_is_plain, scale_logits
from longext.models.methods import RemapRequest, method_request, remap_request
from longext.models.protocol import TokenScores
from longext.models.remap import Remapping, attach
from longext.models.rotary import LENGTH_DEPENDENT, hold_rope, rebuild_rope, reset_rotary, rope_type_of, rotary_modules
from longext.models.throughput.rows import write_rows
from longext.models.tokens import encode_text
from longext.models.turns import Asking, ending_tokens, prefix_of
from longext.options import RuntimeConfig

if TYPE_CHECKING:
    from longext.models.throughput.pace import Pace

_HEAD_BYTES = 8 * 2**20  # float32 logits alive at a time on a CPU: they stay in its cache
_HEAD_BYTES_ACCELERATOR = 256 * 2**20


class HFLanguageModel:
    """A transformers model, its tokenizer and the config it was built from.

    Args:
        name: what the user called it.
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        config: config.json as a dict; `set_rope` swaps it.
        directory: where it (of an adapter: its tokenizer) was loaded from.
        adapter: what a result says of the adapter that was merged into it; None for a model as it is.
        extended_length: the length that an extension applied in memory is for, 0 without one.

    Attributes:
        asking: how questions are put to it: template variables, thoughts, control tokens.
        remapping: the position remapping it is under, or None.
        pace: how fast it was measured to be here; None before.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        config: dict[str, Any],
        directory: Path,
        adapter: dict[str, Any] | None = None,
        extended_length: int = 0,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.directory = directory
        self.adapter = adapter
        self.extended_length = extended_length
        self.asking = Asking()
        self.remapping: Remapping | None = None
        self.pace: Pace | None = None
        self._head_is_plain: bool | None = None
        self._rows = embedding_rows(model)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def trained_length(self) -> int:
        """The pre-training length the loaded RoPE refers to."""
        return model_rope(self.config, self.directory).spec.original_max_position_embeddings

    @property
    def context_length(self) -> int:
        """How many positions the model has, with an extension in memory; dynamic NTK keeps L in its config."""
        return max(length_of(self.model.config.get_text_config()), self.extended_length)

    # --- tokens -------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens the tokenizer puts before a text: mostly a BOS or nothing."""
        return prefix_of(self.tokenizer)

    @property
    def ending_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: the model's, the tokenizer's EOS, the chat template's end of a turn."""
        return ending_tokens(self.model, self.tokenizer, self.asking.template_arguments)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return token ids; with `add_bos` the tokenizer's own prefix in front, whatever tokens it is.

        Raises:
            DataError: the text spells a token that the model has no row for.
        """
        ids = encode_text(self.tokenizer, text)
        check_ids(ids, self._rows, self.tokenizer, "The text")
        if add_bos:
            ids[:0] = self.prefix
        return ids

    def decode(self, input_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(input_ids), skip_special_tokens=True)
        return text

    # --- scoring ------------------------------------------------------------------------------------------------

    # not inference_mode: RoPE buffers that are updated in here may be updated in training afterwards
    @torch.no_grad()
    def score(self, input_ids: torch.Tensor, first: int) -> TokenScores:
        """Score tokens first .. T-1 of int64 [B, T]; logits exist for those positions only, a slice at a time.

        Equals log_softmax of the full float32 logits at those positions.

        Raises:
            LongextError: a score is not a finite number.
        """
        assert first >= 1, "the first token of a window has nothing to be predicted from"
        self.reset_rope()
        input_ids = input_ids.to(self.device)
        targets = input_ids[:, first:]
        if self._head_is_plain is None:
            self._head_is_plain = head_is_plain(self.model)
        if self._head_is_plain:
            hidden = decoder_of(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state[:, first - 1 : -1]
            return score_hidden(self.model, hidden, targets, first)
        keep = torch.arange(first - 1, input_ids.shape[1] - 1, device=self.device)
        scores = score_logits(self.model(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits, targets)
        check_scores(scores.nll, first)
        return scores

    # --- generation ---------------------------------------------------------------------------------------------

    def greedy(self, input_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt."""
        return write_rows(self, [input_ids], max_new_tokens, self.ending_tokens)[0]

    def pad_token(self) -> int | None:
        """Return the token that fills prompts: the tokenizer's, else (or if the model has no row for it) its EOS."""
        pad: int | None = self.tokenizer.pad_token_id
        eos: int | None = self.tokenizer.eos_token_id
        return eos if pad is None or pad >= self._rows else pad

    # --- RoPE ---------------------------------------------------------------------------------------------------

    @property
    def rope_type(self) -> str:
        """`rope_type` of the layers an extension changes: one that follows the length, if any layer's does."""
        return rope_type_of(self.model)

    @property
    def follows_length(self) -> bool:
        """True if the RoPE depends on the length of the sequence."""
        return self.rope_type in LENGTH_DEPENDENT

    def reset_rope(self) -> None:
        """Put every length-dependent rotary module back to its state after loading.

        transformers' dynamic NTK keeps the longest sequence it has seen, so without this a score would depend on what
        was scored before.
        """
        if self.follows_length:
            for module in rotary_modules(self.model):
                reset_rotary(module)

    @contextlib.contextmanager
    def frozen_rope(self, length: int) -> Iterator[None]:
        """Hold a length-dependent RoPE at what it is for a sequence of `length` tokens; undone on leaving."""
        self.reset_rope()
        modules = rotary_modules(self.model) if self.follows_length else []
        kinds = [module.rope_type for module in modules]
        try:
            if modules:
                hold_rope(self.model, length)
            yield
        finally:
            for module, kind in zip(modules, kinds, strict=True):
                module.rope_type = kind
            self.reset_rope()

    def set_rope(self, config: dict[str, Any]) -> None:
        """Give the loaded model the RoPE of another config.json (as `extended_config` makes it); weights stay.

        Equals loading a checkpoint with that config: what a constructor computes from it is computed again.
        """
        self.remap(None)
        rebuild_rope(self.model, build_model_config(config))
        self.config, self.extended_length = config, 0

    def remap(self, request: RemapRequest | None) -> None:
        """Put the model under a position remapping, in the place of the one before; None ends it.

        Its trained length is that of the config: a model whose RoPE was extended in training reads all of it.
        """
        self.pace = None
        if self.remapping is not None:
            self.remapping.detach()
            self.remapping, self.extended_length = None, 0
        if request is None:
            return
        trained = request.original_length or self.context_length
        self.extended_length = request.target(trained)
        self.remapping = attach(
            self.model, request.name, self.extended_length, original_length=trained, **request.parameters
        )

    def weights_checksum(self) -> str:
        """Return a hash of every parameter in memory."""
        return weights_checksum(self.model)

    def describe(self) -> dict[str, Any]:
        """Return the model part of a result record."""
        text = self.model.config.get_text_config()
        return {
            "id": self.name,
            "config_sha256": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            "tokenizer_sha256": _tokenizer_hash(self.directory),
            "rope_parameters": text.rope_parameters,
            "max_position_embeddings": text.max_position_embeddings,
            "attention": f"full ({text._attn_implementation})",
            **({"remapping": self.remapping.describe()} if self.remapping else {}),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "num_threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "prefix": list(self.prefix),
            "ending_tokens": sorted(self.ending_tokens),
            **({"adapter": self.adapter} if self.adapter else {}),
        }


def score_hidden(model: Any, hidden: torch.Tensor, targets: torch.Tensor, first: int = 1) -> TokenScores:
    """Score int64 [B, n] given the last hidden states [B, n, D] before each, a few MB of float32 logits at a time.

    Args:
        first: place of the first target in its window, for messages.

    Raises:
        LongextError: a score is not a finite number.
    """
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    head = model.get_output_embeddings()
    budget = _HEAD_BYTES if hidden.device.type == "cpu" else _HEAD_BYTES_ACCELERATOR
    rows = max(1, budget // (4 * head.weight.shape[0]))
    parts = [
        score_logits(scale_logits(model, head(states)), tokens)
        for states, tokens in zip(flat.split(rows), flat_targets.split(rows), strict=True)
    ]
    shape = targets.shape
    nll = torch.cat([part.nll for part in parts]).view(shape)
    check_scores(nll, first)
    return TokenScores(nll, torch.cat([part.is_top1 for part in parts]).view(shape))


def score_logits(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Score [..., V] logits; overwrites them, so that no second tensor of their size exists."""
    logits = logits.float()
    targets = targets.to(logits.device)  # a mapped model may end on another device than it starts
    best = logits.amax(-1)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    is_top1 = chosen == best
    # half-precision logits tie often; greedy decoding then takes the first index
    is_top1[is_top1.clone()] = logits[is_top1].argmax(-1) == targets[is_top1]
    nll = logits.sub_(best[..., None]).exp_().sum(-1).log_() + (best - chosen)
    return TokenScores(nll, is_top1)


def load_language_model(
    config: RuntimeConfig, method: str | None = None, factor: float | None = None
) -> HFLanguageModel:
    """Load `config.model` for evaluation, optionally with an extension method applied in memory.

    An adapter directory is its base with the adapter merged in, as `longext merge` would write it.

    Args:
        method: a name in `ROPE_METHODS`, with parameters as "dynamic:alpha=4", exactly as `longext extend` would write
            it; one in `REMAPS`, which changes attention; None or "none" for the model as it is.
        factor: the method's factor.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: unknown device, dtype or method, or a method for an adapter.
    """
    directory = resolve_model(config.model, config.revision)
    remap = remap_request(method, factor) if method else None
    method = None if method == "none" or remap else method
    merge = plan_adapter(config, method) if is_adapter(directory) else None
    weights = merge.base if merge else directory
    read_shards(weights)  # before minutes of loading
    read_model_rope(weights, config.trust_remote_code)
    plan = _extension_plan(config, method, factor) if method else None
    raw = merged_config(merge) if merge else extended_config(plan) if plan else read_config(weights)
    is_mapped = config.device == MAPPED
    device = resolve_device("auto" if is_mapped else config.device)
    if merge and not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        directory = weights
    tokenizer = load_tokenizer(directory, config.trust_remote_code)
    model = load_causal_lm(
        weights,
        config=build_model_config(raw) if method or merge else None,
        dtype=resolve_dtype(config.dtype, device),
        device=device,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        device_map="auto" if is_mapped else None,
        filled_later=() if merge is None or merge.stays_tied else (merge.adapter.head,),
    )
    check_tokens(tokenizer, model, directory)
    if merge:
        put_in(model, merge)
        check_finite(model, directory)
    facts = adapter_facts(merge) if merge else None
    length = plan.new_length if plan else 0
    loaded = HFLanguageModel(config.model, model.eval(), tokenizer, raw, directory, facts, length)
    loaded.remap(remap)
    return loaded


def _extension_plan(config: RuntimeConfig, method: str, factor: float | None) -> ExtensionPlan:
    """The extension that `longext extend MODEL --method METHOD --factor FACTOR` would write."""
    request = method_request(method, config.model, config.revision, factor)
    if request.factor is None and request.target_length is None and request.factors is None:
        told = f"--method {method} needs --factor (target length / trained length, for example 8)."
        raise ConfigError(told).about("factor")
    return plan_extension(request)


def _tokenizer_hash(directory: Path) -> str | None:
    files = (directory / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((sha256_of(file) for file in files if file.is_file()), None)
