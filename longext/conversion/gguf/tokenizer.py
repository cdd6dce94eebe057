"""A checkpoint's tokenizer as the keys of a GGUF file: byte-level BPE whose cuts llama.cpp has under a name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.load import load_tokenizer
from longext.checkpoint.source import read_json
from longext.errors import CheckpointError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # ggml's types of tokens
CONVERTER = "python convert_hf_to_gguf.py DIR --outfile OUT.gguf (in llama.cpp)"
_CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# cuts of a text before its pairs are merged -> llama.cpp's name of them
_NAMES = {("gpt-2",): "gpt-2", ("digits", "gpt-2"): "smollm", (_QWEN2,): "qwen2", (_LLAMA3,): "llama-bpe"}
_MERGES_WHOLE_TOKENS = frozenset({"llama-bpe"})  # a cut that is a token is not merged out of its parts


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """What a GGUF file says of its tokenizer; `ids` are special tokens by the name of their key."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    ids: dict[str, int]
    adds_bos: bool
    template: str | None


def gguf_tokenizer(directory: Path, num_rows: int) -> GgufTokenizer:
    """Return the tokenizer in `directory` for a model of `num_rows` tokens.

    Raises:
        CheckpointError: llama.cpp would cut or merge a text in another way, as far as longext knows.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json. For its tokenizer run {CONVERTER}.")
    parsed = read_json(path, "a tokenizer")
    model = parsed.get("model") or {}
    pre = _NAMES.get(_cuts(parsed))
    plain = not any(model.get(key) for key in ("byte_fallback", "fuse_unk", "dropout", "continuing_subword_prefix"))
    normal = (parsed.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"  # llama.cpp leaves texts as they are
    merges_whole = bool(model.get("ignore_merges"))
    is_known = model.get("type") == "BPE" and pre is not None and plain and normal
    if not is_known or merges_whole != (pre in _MERGES_WHOLE_TOKENS):
        raise CheckpointError(
            f"{path} is no byte-level BPE that longext exports (GPT-2's, SmolLM's, Qwen2's and Llama 3's cuts). Run "
            f"{CONVERTER}."
        )
    assert pre is not None
    tokens, kinds = _tokens(parsed, num_rows, path)
    loaded = load_tokenizer(directory)
    return GgufTokenizer(
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=[" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        ids=_special_ids(loaded),
        adds_bos=_adds_bos(loaded, path),
        template=loaded.chat_template if isinstance(loaded.chat_template, str) else None,
    )


def _cuts(parsed: dict[str, Any]) -> tuple[str, ...]:
    """Return how a text is cut, step by step: names in `_NAMES`, else the JSON of a step."""
    given = parsed.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    found = []
    for step in steps:
        kind, pattern = step.get("type"), (step.get("pattern") or {}).get("Regex")
        if kind == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and pattern:
            found.append(pattern)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            found += ["gpt-2"] if step.get("use_regex", True) else []
        else:
            found.append(json.dumps(step))
    return tuple(found)


def _tokens(parsed: dict[str, Any], num_rows: int, path: Path) -> tuple[list[str], list[int]]:
    """Return the text and type of every token; rows without one are unused."""
    spelled = {place: (text, _NORMAL) for text, place in parsed["model"]["vocab"].items()}
    for each in parsed.get("added_tokens") or []:
        spelled[each["id"]] = (each["content"], _CONTROL if each["special"] else _USER_DEFINED)
    if max(spelled, default=-1) >= num_rows:
        raise CheckpointError(
            f"{path} has token {max(spelled)}, and the model {num_rows} rows. Resize the model to its tokenizer."
        )
    rows = [spelled.get(place, (f"[PAD{place}]", _UNUSED)) for place in range(num_rows)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _special_ids(tokenizer: Any) -> dict[str, int]:
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {key: getattr(tokenizer, f"{name}_token_id") for key, name in named.items()}
    return {key: int(value) for key, value in ids.items() if value is not None}


def _adds_bos(tokenizer: Any, path: Path) -> bool:
    """Return whether texts get a BOS (CheckpointError: they get something else)."""
    whole, bare = (list(tokenizer("a", add_special_tokens=adds).input_ids) for adds in (True, False))
    if whole not in (bare, [tokenizer.bos_token_id, *bare]):
        raise CheckpointError(f"{path} puts more than a BOS around a text. Run {CONVERTER}.")
    return whole != bare
