"""What a loaded model must be before anything is computed with it: complete, finite, with a row for every token."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.families import HEAD_NAMES
from longext.checkpoint.weights import TORCH_NAMES, Shard, is_float, tensors_of
from longext.errors import CheckpointError, DataError, LongextError, LongextWarning

if TYPE_CHECKING:
    import torch

_PIECE = 2**24  # numbers checked at a time
_MARGIN = 64  # how far a config.json may be above its files: quantised weights are packed, layers may share theirs
_SUMMED = 2**18  # numbers in a sum: a CPU widens them first

# Names that a wrapper leaves in a state dict, and what it is called.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "a PEFT model",
    "base_layer.": "a PEFT model whose adapter was not merged",
    "module.": "DistributedDataParallel",
}

# Stored tensors that a text model has no use for, by design: buffers that are computed (rotary frequencies, causal
# masks), states of FP8 scaling, heads that predict several tokens, and the towers of other modalities.
_UNUSED = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|\.position_ids|_extra_state)$"
    r"|(^|\.)mtp(_layers)?\."
    r"|^(model\.)?(vision_\w+|visual|audio_\w+|multi_modal_projector|mm_projector|image_newline)\b"
)
_LANGUAGE = re.compile(r"^(model\.)?(layers|norm|embed_tokens)\b|(^|\.)(language_model|text_model|lm_head)\b")

# Tokens that no text and no chat of text holds: fillers of batches, stand-ins for pictures and sound.
_NEVER_IN_TEXT = re.compile(
    r"(?<![a-z])(pad|padding|image|img|video|vision|audio|speech|[be]o[ia])(?![a-z])", re.IGNORECASE
)


# --- sizes ------------------------------------------------------------------------------------------------------------


def check_sizes(config: Any, shards: Collection[Shard], directory: Path) -> None:
    """Raise CheckpointError if config.json describes a far larger model than the files hold.

    transformers would build it, and give what is missing random numbers, before anybody could say so.
    """
    text = config.get_text_config()
    tensors = tensors_of(shards)
    num_values = sum(math.prod(tensor.shape) for tensor in tensors.values())
    count = len(tensors)
    hidden = _number(text, "hidden_size")
    limits = {
        "num_hidden_layers": _MARGIN * count,  # each stores a tensor of its own
        "vocab_size": _MARGIN * num_values / max(1, hidden),
        "intermediate_size": _MARGIN * num_values / max(1, hidden),
        **dict.fromkeys(
            ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), _MARGIN * num_values
        ),
    }
    for key, most in limits.items():
        if _number(text, key) > most:
            raise CheckpointError(
                f"{directory / 'config.json'}: `{key}` {_number(text, key):,} does not belong to these files, which "
                f"hold {count:,} tensors of {num_values:,} numbers. Restore the config.json that was saved with them."
            )


def _number(text: Any, key: str) -> int:
    value = getattr(text, key, None)
    return value if isinstance(value, int) else 0


# --- complete ---------------------------------------------------------------------------------------------------------


def check_complete(model: Any, info: dict[str, Any], directory: Path, config: Any) -> None:
    """Raise CheckpointError unless every weight of `model` came from a file, and every weight in the files is in it.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returned.
        config: the config the model was asked for by; that of a multimodal model may give its text model alone.
    """
    missing = sorted(map(str, info["missing_keys"]))
    is_part = config.get_text_config() is not config and model.config.get_text_config() is model.config
    unexpected = left_over(info["unexpected_keys"], config.get_text_config().to_dict(), is_part)
    mismatched = sorted(info["mismatched_keys"], key=str)
    if missing:
        raise CheckpointError(
            f"{directory} lacks '{missing[0]}' ({len(missing)} weight(s) missing): {_why_missing(missing, unexpected)}"
        )
    if mismatched:
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"{directory}: '{name}' is {_shape(stored)} in the files and {_shape(expected)} by config.json "
            f"({len(mismatched)} such weight(s)): restore the config.json that was saved with these weights."
        )
    if unexpected:
        raise CheckpointError(
            f"{directory} holds '{unexpected[0]}', which the model of its config.json has no place for "
            f"({len(unexpected)} weight(s) left over{_beyond(unexpected, config)}): restore the config.json that was "
            "saved with these weights. To leave them out on purpose, load the model with transformers and "
            "save_pretrained() it."
        )


def _shape(size: Any) -> str:
    return "x".join(map(str, size)) or "a single number"


def left_over(keys: Iterable[str], text: Mapping[str, Any], is_part: bool) -> list[str]:
    """Return the stored tensors, of those that a model has no place for, that it should have a place for.

    Args:
        text: the (text) config as a dict.
        is_part: the model is the text model of a multimodal checkpoint.
    """
    depth, extra = text.get("num_hidden_layers"), text.get("num_nextn_predict_layers")
    # layers behind the last that predict several tokens at once (DeepSeek-V3, GLM-4.5)
    more = range(depth, depth + extra) if isinstance(depth, int) and isinstance(extra, int) else range(0)

    def is_unused(key: str) -> bool:
        is_extra = _layer(key) in more
        return bool(_UNUSED.search(key)) or is_extra or (is_part and not _LANGUAGE.search(key))

    return [key for key in sorted(map(str, keys)) if not is_unused(key)]


def _layer(key: str) -> int | None:
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", key)
    return int(match[1]) if match else None


def _beyond(keys: Iterable[str], config: Any) -> str:
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = {layer for layer in map(_layer, keys) if layer is not None}
    return f"; num_hidden_layers is {depth}" if depth is not None and layers and min(layers) >= depth else ""


def _why_missing(missing: list[str], unexpected: list[str]) -> str:
    """Return the likely reason, and what to do."""
    expected = set(missing)
    for mark, wrapper in _WRAPPERS.items():
        if any(mark in key and key.replace(mark, "") in expected for key in unexpected):
            return (
                f"the files call it with '{mark}' in its name, as {wrapper} does. Save the model without that wrapper, "
                f"or rename the tensors without '{mark}'."
            )
    if all(key.removesuffix(".weight").endswith(HEAD_NAMES) for key in missing):
        return (
            "the model's output matrix. Download the model again, or set `tie_word_embeddings` to true in config.json "
            "if it shares that of its embedding."
        )
    if unexpected:
        return f"the files hold '{unexpected[0]}' instead. Restore the config.json that was saved with these weights."
    layers = sorted({layer for layer in map(_layer, missing) if layer is not None})
    where = f"layer(s) {', '.join(map(str, layers[:8]))}{', ...' if layers[8:] else ''}; " if layers else ""
    return f"{where}it would be random. Download or save the model again, or restore its own config.json."


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_float_weights(model: Any, shards: Iterable[Shard]) -> None:
    """Raise CheckpointError at a weight that is stored as integers and would be taken for numbers of the model."""
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in tensors_of(shards).items():
        if not is_float(tensor.dtype) and (name in floats or name.endswith(".bias")):
            raise CheckpointError(
                f"{tensor.path}: '{name}' holds integers ({tensor.dtype}), not weights: a quantised model without its "
                "`quantization_config`, or a damaged file. Give the model in float32, bfloat16 or float16."
            )


def check_finite(model: Any, directory: Path) -> None:
    """Raise CheckpointError at a parameter that holds NaN or infinity; what is not in memory is passed over."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not _is_finite(parameter):
            raise CheckpointError(f"{directory}: '{name}' {_not_finite(parameter)}")


def check_stored(shards: Iterable[Shard]) -> None:
    """Raise CheckpointError at a stored tensor that holds NaN or infinity; reads every file once."""
    from safetensors import safe_open

    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            for name, (dtype, *_) in shard.tensors.items():
                if dtype in TORCH_NAMES and not _is_finite(tensor := file.get_tensor(name)):
                    raise CheckpointError(f"{shard.path}: '{name}' {_not_finite(tensor)}")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return True
    # one pass without a temporary: both ends are NaN if one value is, and infinite if one is
    ends = [end for piece in tensor.detach().reshape(-1).split(_PIECE) for end in piece.aminmax()]
    return all(bool(end.isfinite()) for end in ends)


def _not_finite(tensor: torch.Tensor) -> str:
    count = int((~tensor.detach().isfinite()).sum())
    kind = str(tensor.dtype).removeprefix("torch.")
    hint = " (float16 ends at 65,504: try --dtype bfloat16)" if kind == "float16" else ""
    return (
        f"holds {count:,} of {tensor.numel():,} values that are NaN or infinite in {kind}{hint}: the file is damaged, "
        "or the training that made it failed. Download it again, or take an earlier checkpoint."
    )


def check_scores(nll: torch.Tensor, first: int) -> None:
    """Raise LongextError if a token's score [B, n] is NaN or infinite.

    Args:
        first: place in its window of the first token scored.
    """
    if not bool(nll.isfinite().all()):
        column = int((~nll.isfinite()).any(0).nonzero()[0])
        raise not_numbers(f"for token {first + column:,} of a window of {first + nll.shape[1]:,}")


def not_numbers(where: str) -> LongextError:
    """Return the error of a model whose logits are NaN or infinite."""
    return LongextError(
        f"The model's logits {where} are not finite numbers. In float16 use --dtype bfloat16 or float32 instead; "
        "otherwise its weights or its RoPE are broken (check it with `longext verify`)."
    )


def weights_checksum(model: Any) -> str:
    """Return a hash of every parameter in memory: sums of bit patterns, so exact, on whatever device it is.

    Reads the weights once (about 2 GB/s on a CPU core). Parameters that are offloaded count by name and shape alone.
    """
    import torch

    patterns = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1).view(patterns[parameter.element_size()])
            sums = [piece.sum(dtype=torch.int64) for piece in flat.split(_SUMMED)]
            digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


# --- tokens -----------------------------------------------------------------------------------------------------------


def embedding_rows(model: Any) -> int:
    """Return how many token ids a model has an input vector and, if it has an output matrix, a logit for."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    counts = [int(end.weight.shape[0]) for end in ends if end is not None]
    return min(count for count in counts if count) if any(counts) else int(ends[0].num_embeddings)  # ZeRO-3: on others


def check_tokens(tokenizer: Any, model: Any, directory: Path) -> None:
    """Raise CheckpointError if text can become a token that the model has no row for (chat tokens, never resized).

    Rows that no token uses are common (padded vocabularies) and fine. Fillers and stand-ins for pictures without a row
    are let through, since texts do not hold them; `check_ids` refuses a text that spells one.
    """
    rows = embedding_rows(model)
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= rows}
    added = set(tokenizer.get_added_vocab())
    if any(token not in added for token in beyond):
        raise CheckpointError(
            f"The tokenizer in {directory} has {len(tokenizer):,} tokens, the model {rows:,} rows in its embedding: it "
            "belongs to another model. Copy the model's own tokenizer files there."
        )
    lacking = sorted((place, token) for token, place in beyond.items() if not _NEVER_IN_TEXT.search(token))
    if lacking:
        names = ", ".join(f"'{token}' ({place})" for place, token in lacking[:4])
        raise CheckpointError(
            f"{directory}: {len(lacking)} token(s) of its tokenizer have no row among the {rows:,} of the embedding: "
            f"{names}{', ...' if lacking[4:] else ''}. They were added and the model was not resized: "
            f"model.resize_token_embeddings({lacking[-1][0] + 1}) and save_pretrained(), or use the tokenizer without "
            "them."
        )
    _tell_named_ids(model, rows, directory)


def _tell_named_ids(model: Any, rows: int, directory: Path) -> None:
    """Warn of begin, end and filling tokens in the configs that do not exist."""
    for settings in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            named = getattr(settings, key, None)
            for place in named if isinstance(named, (list, tuple)) else [named]:
                if not isinstance(place, int | None) or (place or 0) >= 2**31:
                    raise CheckpointError(f"{directory} names {key} {str(place)[:40]!r}, which is no token id.")
                if place is not None and place >= rows:
                    warnings.warn(
                        f"{directory} names {key} {place}, and the model has {rows:,} tokens: it is never met.",
                        LongextWarning,
                        stacklevel=3,
                    )


def check_ids(ids: Collection[int], rows: int, tokenizer: Any, what: str) -> None:
    """Raise DataError if `ids` hold a token that the model has no row for.

    Args:
        rows: of the embedding (`embedding_rows`).
        what: what was tokenised, for the message.
    """
    if ids and max(ids) >= rows:
        place = max(ids)
        raise DataError(
            f"{what} holds the token '{tokenizer.convert_ids_to_tokens(place)}' ({place}), and the model has "
            f"{rows:,} rows in its embedding. Take it out of the text, or resize the model to its tokenizer."
        )


def check_token_cache(cache: Any, rows: int | None, tokenizer: Any, what: str) -> None:
    """Raise DataError if a `TokenCache` holds a token that the model has no row for, once instead of at every batch.

    Args:
        rows: of the embedding; None if it is not known.
    """
    if rows is not None:
        check_ids([cache.largest_id], rows, tokenizer, what)
