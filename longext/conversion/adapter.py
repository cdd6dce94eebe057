"""Read a PEFT LoRA adapter: which base tensor each of its tensors changes, strictly.

What an adapter must hold is not worked out here; peft says it. The base model is built without data on the meta
device, peft puts the adapter's modules in, and names, shapes and scalings are read off (rank and alpha patterns,
rsLoRA, regular expressions and tied heads included).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longext.checkpoint.families import HEAD_NAMES
from longext.checkpoint.load import build_model, load_config
from longext.checkpoint.source import HUB_ID, read_json, resolve_model
from longext.checkpoint.tying import is_tied, stored_difference
from longext.checkpoint.weights import TORCH_NAMES, Shard, StoredTensor, read_shard
from longext.errors import CheckpointError
from longext.untrusted import check_patterns, fields, is_a

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# suffix of a stored key -> (its half of the pair, True for an embedding's)
_HALVES = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
# Settings of a LoraConfig that peft's own modules carry out in `_expected_layout`, that act in training alone, or that
# describe. Whatever else has another value than peft's default, or is no setting of this peft, could change the result.
_UNDERSTOOD = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "ensure_weight_tying", "fan_in_fan_out"),
    *("lora_dropout", "init_lora_weights", "eva_config", "lora_ga_config", "loftq_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
)
# Files that an adapter's directory may have and that hold nothing of it.
_NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "pytorch_model_fsdp*")
PICKLED_WEIGHTS = "adapter_model.bin"
TRAINED_BESIDE = "trainable_params.bin"  # embeddings and norms of LongLoRA's own code
# Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, ...) subtract from them.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_FIELDS = {
    **dict.fromkeys(("peft_type", "base_model_name_or_path", "revision", "bias", "task_type"), (str, None)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"), (str, list, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, None)),
    **{"r": (int, None), "lora_alpha": (float, None), "lora_dropout": (float, None), "use_rslora": (bool, None)},
    **{
        "layers_to_transform": (int, list, None),
        "fan_in_fan_out": (bool, None),
        "init_lora_weights": (bool, str, None),
    },
}
_SUPPORTED = "longext merges plain LoRA (patterns and rsLoRA included) with modules_to_save"


class LoraPair(NamedTuple):
    """The two factors that change one base tensor: W + scaling * B A, transposed for an embedding.

    Attributes:
        a: A, [r, in].
        b: B, [out, r].
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        is_embedding: True if W is [in, out], as embeddings are.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    is_embedding: bool


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter read against its base: what it changes, by the base's own tensor names.

    Attributes:
        path: its weight file.
        lora: base tensor -> its LoRA factors.
        full: base tensor -> the tensor that replaces it.
        embedding: name of the input embedding in the base's files.
        head: name of the output matrix; a tied one is usually not in the files.
        is_tied: True if the base's output matrix is its input embedding, by what its files hold.
        difference: how far a stored output matrix is from the embedding that the base's config ties it to, else 0.
        locate: a parameter's name in the model -> its name in the base's files, or None.
    """

    path: Path
    lora: dict[str, LoraPair]
    full: dict[str, StoredTensor]
    embedding: str
    head: str
    is_tied: bool
    difference: float
    locate: Callable[[str], str | None]

    @property
    def touched(self) -> frozenset[str]:
        """Every tensor that the adapter changes."""
        return frozenset(self.lora) | frozenset(self.full)


def find_adapter(adapter: str) -> Path:
    """Return the directory of an adapter: a directory or a Hub id.

    Raises:
        CheckpointError: nothing there, no adapter_config.json, weights in a format other than safetensors, or in files
            that peft does not read.
    """
    if not Path(adapter).expanduser().exists() and not HUB_ID.match(adapter):
        raise CheckpointError(f"No adapter at '{adapter}': give the directory with {ADAPTER_CONFIG}, or a Hub id.")
    directory = resolve_model(adapter, pickles=True)  # named in the refusal, never opened
    if not (directory / ADAPTER_CONFIG).is_file():
        what = "a whole model, nothing is to be merged" if (directory / "config.json").is_file() else "not an adapter"
        raise CheckpointError(f"No {ADAPTER_CONFIG} in {directory}: {what}. Give the directory that PEFT saved.")
    _check_files(directory)
    return directory


def _check_files(directory: Path) -> None:
    """Raise CheckpointError for pickled weights, and for weight files whose tensors nobody would put in."""
    convert = f"Turn its pickle files into safetensors first: longext convert {directory} -o NEW"
    known = {ADAPTER_WEIGHTS, *(file.name for pattern in _NO_WEIGHTS for file in directory.glob(pattern))}
    if (directory / ADAPTER_WEIGHTS).is_file():
        known.add(PICKLED_WEIGHTS)  # the same once more: peft reads the other one
    elif (directory / PICKLED_WEIGHTS).is_file():
        raise CheckpointError(f"No {ADAPTER_WEIGHTS} in {directory}, only {PICKLED_WEIGHTS}. {convert}")
    else:
        raise CheckpointError(f"No {ADAPTER_WEIGHTS} in {directory}: save the adapter again with PEFT.")
    pickled = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in sorted(directory.glob(kind))]
    unread = [name for name in pickled if name not in known]
    if unread:
        raise CheckpointError(f"{directory} has trained weights in {unread[0]}, which is not read. {convert}")
    others = [file.name for file in sorted(directory.glob("*.safetensors"))]
    unread = [name for name in others if name not in known and not name.startswith("model")]
    if unread:
        raise CheckpointError(
            f"{directory} has weights in {unread[0]}, which PEFT does not read: put them into {ADAPTER_WEIGHTS}, or "
            "take the file away if it is not of this adapter."
        )


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        CheckpointError: broken, or an adapter of a kind that is not plain LoRA; names the setting.
    """
    config = read_json(directory / ADAPTER_CONFIG, "an adapter directory")
    fields(config, str(directory / ADAPTER_CONFIG), _FIELDS, CheckpointError, "Restore the file it was saved with.")
    for key in ("rank_pattern", "alpha_pattern"):
        numbers = config.get(key) or {}
        if not all(is_a(value, float) and 0 < value < 2**31 for value in numbers.values()):
            raise CheckpointError(f"{directory / ADAPTER_CONFIG}: `{key}` must map patterns to numbers above 0.")
    for key, least in (("r", 1), ("lora_alpha", 0)):
        if config.get(key) is not None and not least <= config[key] < 2**31:
            raise CheckpointError(
                f"{directory / ADAPTER_CONFIG}: `{key}` must be {least} or more, found {config[key]}."
            )
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{directory} is a {kind} adapter: {_SUPPORTED}. Merge it with PEFT itself.")
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    changes = {key: value for key, value in config.items() if key not in _UNDERSTOOD and value != usual.get(key)}
    refused = {key: value for key, value in changes.items() if value not in (None, False, [], {})}
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        refused["init_lora_weights"] = config["init_lora_weights"]
    for key, value in refused.items():
        raise CheckpointError(f"{directory} has {key} = {value!r}: {_SUPPORTED}. Merge it with PEFT itself.")
    return config


def read_adapter(
    directory: Path, base: Path, tensors: Mapping[str, StoredTensor], trust_remote_code: bool = False
) -> Adapter:
    """Read the adapter in `directory` against the base model whose files hold `tensors`.

    Raises:
        CheckpointError: a tensor missing, unknown, or of another shape than the base asks for; a quantised base.
    """
    shard = read_shard(directory / ADAPTER_WEIGHTS)
    locate = locate_in(set(tensors))
    layout = _expected_layout(directory, base, trust_remote_code)
    embedding, head, difference = layout.ends.in_files(tensors, base)
    if difference:  # the config ties two matrices that its files tell apart
        layout = _expected_layout(directory, base, trust_remote_code, untied=True)
    _compare_with_expected(shard, layout.shapes)
    pairs: dict[str, dict[str, Any]] = {}
    full: dict[str, StoredTensor] = {}
    for key, stored in shard.tensors.items():
        name, half, is_embedding = _parse(key)
        target = locate(name) or (head if layout.ends.is_tied and name == layout.ends.head else None)
        if target is None:
            raise CheckpointError(f"{shard.path}: '{key}' would change '{name}', which {base} does not have.")
        changed = tensors.get(target, tensors[embedding])
        if changed.dtype not in TORCH_NAMES:
            raise CheckpointError(
                f"'{target}' of {base} is stored as {changed.dtype}: a quantised base cannot take an adapter exactly. "
                "Give the unquantised model with `longext merge --base`."
            )
        if stored.dtype not in TORCH_NAMES:
            raise CheckpointError(f"{shard.path}: '{key}' is stored as {stored.dtype}, not as floating-point numbers.")
        if half is None:
            _check_shape(stored, changed.shape)
            full[target] = stored
        else:
            pair = pairs.setdefault(target, {"scaling": layout.scalings[name], "is_embedding": is_embedding})
            pair[half] = stored
    return Adapter(
        path=shard.path,
        lora={name: LoraPair(**pair) for name, pair in pairs.items()},
        full=full,
        embedding=embedding,
        head=head,
        is_tied=layout.ends.is_tied,
        difference=difference,
        locate=locate,
    )


class Ends(NamedTuple):
    """The parameter names of a model's input embedding and output matrix, and whether its config makes them one."""

    embedding: str
    head: str
    is_tied: bool

    @classmethod
    def of(cls, model: Any) -> Ends:
        """Return those of a transformers model."""
        entry, exit_ = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False)}
        return cls(names[id(entry)], names.get(id(exit_), "lm_head.weight"), is_tied(model))

    def in_files(self, tensors: Mapping[str, StoredTensor], base: Path) -> tuple[str, str, float]:
        """Return their names in the base's files, and how far the two are from the one that the config says."""
        locate = locate_in(set(tensors))
        embedding, head = (locate(name) or name for name in (self.embedding, self.head))
        return embedding, head, stored_difference(tensors, embedding, head, self.is_tied, base) or 0.0


class _Layout(NamedTuple):
    """What peft expects of the adapter: shapes by stored key, scalings by parameter; the ends of the base."""

    shapes: dict[str, tuple[int, ...]]
    scalings: dict[str, float]
    ends: Ends


def _expected_layout(directory: Path, base: Path, trust_remote_code: bool, untied: bool = False) -> _Layout:
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    model = _meta_model(base, trust_remote_code, untied)
    ends = Ends.of(model)
    _check_patterns(directory, [name for name, _ in model.named_modules()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(model, PeftConfig.from_pretrained(str(directory)), low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"The adapter {directory} does not fit {base}: {reason}") from error
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    scalings = {
        f"{name.removeprefix(PREFIX)}.weight": float(module.scaling["default"])
        for name, module in wrapped.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }
    return _Layout({key: tuple(value.shape) for key, value in state.items()}, scalings, ends)


def _check_patterns(directory: Path, names: list[str]) -> None:
    """Refuse expressions in the adapter's config that are none, or on which peft would hang."""
    config = read_json(directory / ADAPTER_CONFIG, "an adapter directory")
    expressions = [
        (key, config[key]) for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        expressions += [(key, rf"(.*\.)?({pattern})$") for pattern in config.get(key) or {}]
    layers = config.get("layers_pattern") or []
    expressions += [
        ("layers_pattern", rf".*\.[^.]*{pattern}\.(\d+)\.")
        for pattern in ([layers] if isinstance(layers, str) else layers)
    ]
    check_patterns(expressions, names, str(directory / ADAPTER_CONFIG))


def _meta_model(base: Path, trust_remote_code: bool, untied: bool = False) -> Any:
    """The base model without data."""
    import torch

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = load_config(base, trust_remote_code)
        if untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        return build_model(config, trust_remote_code=trust_remote_code)


def read_ends(base: Path, tensors: Mapping[str, StoredTensor]) -> Ends:
    """Return the ends of a base model, one if its files say so too."""
    ends = Ends.of(_meta_model(base, trust_remote_code=False))
    return ends._replace(is_tied=ends.is_tied and not ends.in_files(tensors, base)[2])


def _compare_with_expected(shard: Shard, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError at the first tensor that has another shape, an unknown LoRA module, or is missing."""
    for key, expected in shapes.items():
        if key in shard.tensors:
            _check_shape(shard.tensors[key], expected)
    unknown = sorted(key for key in shard.tensors if key not in shapes and is_lora_key(key))
    if unknown:
        raise CheckpointError(
            f"{shard.path}: '{unknown[0]}' has no place in the base ({len(unknown)} such tensors): an adapter for "
            "another base (more layers, other modules). Give its own with `longext merge --base`."
        )
    missing = sorted(set(shapes) - set(shard.tensors))
    if missing:
        raise CheckpointError(
            f"{shard.path} lacks '{missing[0]}' ({len(missing)} missing), which its {ADAPTER_CONFIG} promises for this "
            "base: saved incompletely, or for another base (fewer layers). Save it again, or give its own with "
            "`longext merge --base`."
        )


def _check_shape(stored: StoredTensor, expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        raise CheckpointError(
            f"{stored.path}: '{stored.name}' has shape {list(stored.shape)}, the base asks for {list(expected)}: "
            f"{_cause(stored, expected)}."
        )


def _cause(stored: StoredTensor, expected: tuple[int, ...]) -> str:
    """The likely reason of a shape that does not fit."""
    shape = stored.shape
    if 0 in shape or len(shape) < len(expected):
        return "saved by ZeRO-3 or FSDP without gathering its shards; gather them and save it again"
    half = _parse(stored.name)[1]
    rank = {"a": 0, "b": 1}.get(half or "")
    if rank is not None and shape[rank] != expected[rank]:
        return f"the rank in {ADAPTER_CONFIG} is not the stored one; restore the config it was saved with"
    if half is None and len(shape) == 2 and shape[1:] == expected[1:]:
        return (
            "trained with another vocabulary; resize the base first "
            f"(model.resize_token_embeddings({shape[0]}), save_pretrained) and give it with `longext merge --base`"
        )
    return "an adapter for another base (other sizes); give its own with `longext merge --base`"


def is_lora_key(key: str) -> bool:
    """True for a stored key that is one half of a LoRA pair."""
    return _parse(key)[1] is not None


def _parse(key: str) -> tuple[str, str | None, bool]:
    """(parameter of the model, "a" or "b" or None for a whole tensor, True for an embedding's pair) of a stored key."""
    name = key.removeprefix(PREFIX)
    for suffix, (half, is_embedding) in _HALVES.items():
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.weight", half, is_embedding
    return name.replace(".base_layer.", "."), None, False


def locate_in(files: set[str]) -> Callable[[str], str | None]:
    """Return the map from a model's parameter names to the names of its files' tensors.

    They are the same but for what transformers renames while it loads: wrapping prefixes (Gemma 3:
    `model.language_model.layers` in memory, `language_model.model.layers` on disk) and GPT-NeoX's output matrix.
    """
    plain: dict[str, list[str]] = {}
    for name in files:
        plain.setdefault(_without_wrappers(name), []).append(name)

    def locate(name: str) -> str | None:
        if name in files:
            return name
        candidates = plain.get(_without_wrappers(name), [])
        return candidates[0] if len(candidates) == 1 else None

    return locate


def _without_wrappers(name: str) -> str:
    parts = (part for part in name.split(".") if part not in ("model", "language_model"))
    return ".".join(HEAD_NAMES[0] if part in HEAD_NAMES else part for part in parts)


def merged_tensor(adapter: Adapter, name: str, base: torch.Tensor) -> torch.Tensor:
    """Return what the adapter makes of the base tensor `name`, computed in float32.

    Raises:
        CheckpointError: the result has NaN or infinite values.
    """
    weight = adapter.full[name].read().float() if name in adapter.full else base.float()
    if name in adapter.lora:
        pair = adapter.lora[name]
        delta = pair.b.read().float() @ pair.a.read().float()
        weight = weight + (delta.T if pair.is_embedding else delta) * pair.scaling
    if not weight.isfinite().all():
        raise CheckpointError(f"'{name}' has NaN or infinite values after merging: {adapter.path} is broken.")
    return weight


def changes_something(adapter: Adapter, base: Mapping[str, StoredTensor]) -> bool:
    """False for an adapter that is empty in effect: every LoRA B is zero and every saved tensor is the base's own."""
    if any(pair.b.read().any() for pair in adapter.lora.values()):
        return True
    pairs = ((stored.read(), base[name].read()) for name, stored in adapter.full.items())
    return any(not (ours.float() == theirs.float()).all() for ours, theirs in pairs)
