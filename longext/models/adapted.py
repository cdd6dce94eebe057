"""A LoRA adapter directory as something to measure: its base with the adapter merged in, in memory.

Weights, RoPE and rounding are those of `longext merge`, so that both give the same numbers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from longext.checksums import sha256_of
from longext.conversion.config import MergeConfig
from longext.conversion.merge import Merge, read_merge, written_tensors
from longext.errors import ConfigError
from longext.options import RuntimeConfig


def plan_adapter(config: RuntimeConfig, method: str | None) -> Merge:
    """Return the merge of the adapter that `config.model` names into the base that it names itself.

    Raises:
        ConfigError: an extension method is given as well.
        CheckpointError: no base, or an adapter that does not fit it.
    """
    if method is not None:
        raise ConfigError(
            f"--method {method} would change the RoPE that the adapter {config.model} was trained with: merge it first "
            "(longext merge), then extend that."
        )
    merge = read_merge(MergeConfig(adapter=config.model, trust_remote_code=config.trust_remote_code))
    for note in merge.notes:
        warnings.warn(note, stacklevel=2)
    return merge


@torch.no_grad()
def put_in(model: Any, merge: Merge) -> None:
    """Give a loaded base the weights that the merged checkpoint has.

    Raises:
        ConfigError: a weight is not in memory.
    """
    names = {merge.adapter.locate(name) or name: name for name, _ in model.named_parameters()}
    for stored, tensor in written_tensors(merge):
        # the output matrix that stays tied is the embedding, and has no parameter of its own
        if stored in names or not merge.stays_tied:
            parameter = model.get_parameter(names[stored])
            if parameter.is_meta:  # offloaded by --device map: what is written to it would be lost
                raise ConfigError(
                    f"{merge.config.adapter} does not fit the GPUs: merge it (longext merge) and give the result."
                )
            parameter.copy_(tensor)


def adapter_facts(merge: Merge) -> dict[str, Any]:
    """Return what a result says of an adapter: its base and the hash of its weights."""
    return {"base": merge.record["base_model"], "weights_sha256": sha256_of(merge.adapter.path)}
