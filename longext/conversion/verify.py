"""Prove that a checkpoint is what it says: reload it with plain transformers in a fresh process and compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longext.checkpoint.checks import left_over
from longext.checkpoint.load import is_known_type
from longext.checkpoint.rope_config import ModelRope, one_spelling, read_model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.checkpoint.weights import Shard, StoredTensor, read_shards, tensors_of
from longext.checksums import sha256_of
from longext.conversion.computed import compare, computed_from, formula_problem
from longext.conversion.files import find_change
from longext.conversion.proof import mean_kl, probe_tokens
from longext.errors import CheckpointError, LongextError
from longext.extras import has, install_line
from longext.manifest import read_manifest
from longext.rope.reading import spec_from_json
from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq

_NUM_TOKENS = 256
_FLOAT32_LIMIT = 8 * 2**30  # larger checkpoints are compared in their own dtype
_RELOAD = Path(__file__).with_name("_reload.py")


@dataclass(frozen=True)
class Check:
    """One line of a verification: `status` is "pass", "fail", "info" or "skip"."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint."""

    model: str
    base: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return all(check.status != "fail" for check in self.checks)


def verify_checkpoint(
    model: str,
    base: str | None = None,
    *,
    logits: bool = True,
    hashes: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Verification:
    """Check a checkpoint against its formula, its base model and its own two layouts.

    Without torch and transformers its files are checked, and what the model computes is not.

    Args:
        base: the model it was made from; by default the one its run.json names.
        logits: load the weights and compare logits inside the trained window with the base's.
        hashes: compare every weight file with the base's (skipped per file if both are one file on disk).
        on_progress: called with the bytes just compared.

    Raises:
        CheckpointError: the checkpoint or the base cannot be read at all.
        LongextError: plain transformers cannot load it; carries its last line.
    """
    directory = resolve_model(model)
    shards = read_shards(directory)
    rope = read_model_rope(directory)
    manifest = read_manifest(directory)
    extension, merge = manifest.get("extension"), manifest.get("merge")
    is_trained = "finetune" in manifest
    base_name, base_directory = _find_base(base, extension)
    checks = [
        _check_config(rope, extension),
        *_check_layouts(read_config(directory), rope, extension),
        _check_adapter_free(directory),
    ]
    if has("torch", "transformers"):
        spec = spec_from_json(extension.get("spec")) if extension else rope.spec
        loaded = _Loaded(directory, base_directory, rope, spec, was_trained=is_trained or merge is not None)
        checks += _check_computed(loaded, sum(shard.size for shard in shards), logits)
    else:
        why = f"what the model computes needs torch and transformers: {install_line(['eval'])}"
        checks.append(Check("frequencies, logits", "skip", why))
    if merge and hashes:
        checks.append(_check_merge(shards, merge))
    if base_directory is None:
        why = f"the base model {base_name} is not here any more" if base_name else "no base model given or recorded"
        checks.append(Check("weights", "skip", f"{why}: pass --base MODEL"))
    elif is_trained:
        tensors = tensors_of(shards), tensors_of(read_shards(base_directory))
        checks.append(_check_trained(*tensors, manifest["finetune"].get("tuning") or {}))
    elif hashes:
        touched = set(merge["touched"]) if merge else set()
        checks.append(_check_weights(shards, tensors_of(read_shards(base_directory)), touched, on_progress))
    if extension and "files" in extension:
        checks.append(_check_in_place(shards, extension["files"]))
    return Verification(model, base_name, tuple(checks))


class _Loaded(NamedTuple):
    """A checkpoint that is to be loaded, and what it is to be held to."""

    directory: Path
    base: Path | None
    rope: ModelRope
    spec: RopeSpec
    was_trained: bool


def _check_computed(loaded: _Loaded, size: int, logits: bool) -> list[Check]:
    """Reload the checkpoint, weights of `size` bytes, in a fresh process and check what the model computes."""
    rope, spec, checks = loaded.rope, loaded.spec, []
    trained = spec.original_max_position_embeddings
    lengths = sorted({trained, round(trained * max(spec.factor, 1)) + 1})
    base_rope = read_model_rope(loaded.base) if loaded.base is not None else None
    with tempfile.TemporaryDirectory(prefix="longext-verify-") as scratch:
        ids = probe_tokens(loaded.directory, min(trained, _NUM_TOKENS)) if logits else None
        dtype = "float32" if size < _FLOAT32_LIMIT else "auto"
        answer = _reload(loaded.directory, loaded.base, rope, lengths, Path(scratch), ids, dtype)
        checks += _check_frequencies(answer, rope, spec, lengths, base_rope)
        if logits:
            checks.append(_check_loading(answer, rope.text_of(read_config(loaded.directory))))
        if logits and base_rope is not None:
            checks.append(_check_logits(Path(scratch), spec, base_rope.spec, loaded.was_trained))
    return checks


def _find_base(base: str | None, extension: dict[str, Any] | None) -> tuple[str | None, Path | None]:
    if base is not None:
        return base, resolve_model(base)
    if not extension:
        return None, None
    recorded = Path(extension["base_path"])
    return extension["base_model"], recorded if (recorded / "config.json").is_file() else None


def _check_config(rope: ModelRope, extension: dict[str, Any] | None) -> Check:
    if not extension:
        return Check("config", "info", f"no run.json of longext; checking the config as it is ({rope.spec.method})")
    promised = extension["rope_parameters"]
    for key in sorted({*promised, *rope.parameters}):
        if promised.get(key) != rope.parameters.get(key):
            return Check(
                "config", "fail", f"rope_parameters.{key} is {rope.parameters.get(key)}, written {promised.get(key)}"
            )
    return Check("config", "pass", f"rope_parameters as written ({extension['spec']['method']})")


def _check_layouts(config: dict[str, Any], rope: ModelRope, extension: dict[str, Any] | None) -> list[Check]:
    """Compare the two spellings key by key, as text; `_check_frequencies` compares what they compute."""
    text = rope.text_of(config)
    new = text.get("rope_parameters") or {}
    new = new.get(rope.kind, new)
    theta_key = rope.family.theta_key
    if not new:
        return [Check("layouts", "info", "only the old layout (rope_theta, rope_scaling) is in config.json")]
    if "rope_scaling" not in text and theta_key not in text:
        missing = f"{theta_key} is missing: readers of the old layout fall back to theta 10000"
        if extension and extension.get("layout", "both") == "new":
            why = f"only the new layout: a {rope.model_type} class reads the old one as another RoPE"
            return [Check("layouts", "info", why)]
        if extension:
            return [Check("layouts", "fail", missing)]
        method, told = rope.spec.method, f"{missing}; transformers 5 wrote it so"
        if method in ("none", "linear", "yarn", "llama3"):  # of others the same again takes more than a factor
            flags = method if method == "none" else f"{method} --factor {rope.spec.factor:.17g}"
            told += f", `longext extend MODEL --method {flags} -o DIR` writes both"
        return [Check("layouts", "info", told)]
    old = {**(text.get("rope_scaling") or {"rope_type": "default"}), "rope_theta": text.get(theta_key)}
    for key in sorted(set(new) - {"partial_rotary_factor"} | set(old) - {"type"}):
        if old.get(key, old.get("type") if key == "rope_type" else None) != new.get(key):
            where = theta_key if key == "rope_theta" else f"rope_scaling.{key}"
            return [Check("layouts", "fail", f"{where} is {old.get(key)}, rope_parameters.{key} is {new.get(key)}")]
    return [Check("layouts", "pass", "old and new spelling hold the same keys")]


def _check_adapter_free(directory: Path) -> Check:
    leftovers = sorted(
        file.name for pattern in ("adapter_*", "trainable_params*", "non_lora_*") for file in directory.glob(pattern)
    )
    if leftovers:
        return Check("adapter-free", "fail", f"{leftovers[0]} is in the directory: merge the adapter first")
    config = read_config(directory)
    if "auto_map" not in config:
        return Check("adapter-free", "pass", "plain checkpoint, no adapter, no remote code")
    if not has("torch", "transformers"):
        return Check("adapter-free", "info", "no adapter; config.json has auto_map: it may need remote code")
    if not is_known_type(config):
        return Check("adapter-free", "fail", "config.json has auto_map: the model needs remote code")
    return Check("adapter-free", "pass", "no adapter; transformers has this class, so auto_map's code is not needed")


def _reload(
    directory: Path,
    base: Path | None,
    rope: ModelRope,
    lengths: list[int],
    scratch: Path,
    input_ids: list[int] | None,
    dtype: str,
) -> dict[str, Any]:
    """Run _reload.py in a fresh, isolated interpreter and return its answer; logits are left in `scratch`."""
    config = read_config(directory)
    text = rope.text_of(config)
    configs = {"both": config}
    if "rope_parameters" in text and (rope.family.theta_key in text or "rope_theta" in text):
        configs |= {layout: one_spelling(config, rope, layout) for layout in ("new", "old")}
    directories = {"out": directory}
    if base is not None:
        configs["base"], directories["base"] = read_config(base), base
    answer_path = scratch / "answer.json"
    request = {
        "configs": configs,
        "lengths": lengths,
        "input_ids": input_ids,
        "dtype": dtype,
        "logits": {str(scratch / f"{name}.pt"): str(path.resolve()) for name, path in directories.items()},
        "answer_path": str(answer_path),
    }
    request_path = scratch / "request.json"
    request_path.write_text(json.dumps(request), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-I", str(_RELOAD), str(request_path)],
        stdin=subprocess.DEVNULL,  # transformers may ask whether to run remote code: nobody is to answer
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        lines = [line for line in run.stderr.strip().splitlines() if line.strip()]
        raise LongextError(f"plain transformers cannot load {directory}: {lines[-1] if lines else 'no message'}")
    answer: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf-8"))
    assert not answer["longext_imported"], "the clean process imported longext"
    return answer


def _check_frequencies(
    answer: dict[str, Any], rope: ModelRope, spec: RopeSpec, lengths: list[int], base_rope: ModelRope | None
) -> list[Check]:
    """Hold what each spelling's model computes to the formula and, if there is a base, to what the base computes."""
    computed = {name: computed_from(measured) for name, measured in answer["computed"].items()}
    base, checks = computed.pop("base", None), []
    for layout, ours in computed.items():
        name = {"both": "frequencies", "new": "new spelling", "old": "old spelling"}[layout]
        problem, count, worst = formula_problem(ours, rope, spec, lengths)
        if problem is None and count == 0:
            problem = "0 frequencies found: no layer of the model that transformers builds uses a RoPE"
        if problem is None and base is not None and base_rope is not None:
            try:
                compare(base, ours, base_rope, spec, lengths)
            except CheckpointError as error:
                problem = str(error)
        match = f"{count} frequencies match the formula, largest relative error {worst:.1e}"
        checks.append(Check(name, "fail", problem) if problem else Check(name, "pass", match))
    return checks


def _check_loading(answer: dict[str, Any], text: dict[str, Any]) -> Check:
    reported = answer["loading_problems"]
    left = left_over(reported.pop("unexpected_keys", ()), text, answer["is_part"])
    problems = {**reported, "unexpected_keys": left} if left else reported
    if problems:
        kind, keys = next(iter(problems.items()))
        return Check("loads", "fail", f"{kind.replace('_', ' ')}: {keys[0]} ({len(keys)} in all)")
    return Check("loads", "pass", "plain transformers, no missing or unexpected keys")


def _check_logits(scratch: Path, spec: RopeSpec, base: RopeSpec, was_trained: bool) -> Check:
    import torch

    ours, theirs = (torch.load(scratch / f"{name}.pt").double() for name in ("out", "base"))
    difference = float((ours - theirs).abs().max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    detail = f"{len(ours)} tokens: max |d| {difference:.2g}, KL {mean_kl(theirs, ours):.2g}, same top-1 {agreement:.1%}"
    if was_trained:
        return Check("logits in old window", "info", f"{detail} (training changes them by design)")
    promised = spec == base or (
        base.method == "none" and (ROPE_METHODS[spec.method].is_exact_inside or _is_identity(spec))
    )
    if not promised:
        return Check("logits in old window", "info", f"{detail} ({spec.method} changes them by design)")
    return Check("logits in old window", "pass" if difference == 0 else "fail", f"{detail} (must equal the base)")


def _is_identity(spec: RopeSpec) -> bool:
    """True if nothing changes up to L tokens: factor 1, or LongRoPE whose short factors are 1."""
    plain, _ = compute_inv_freq(dataclasses.replace(spec, method="none"))
    ours, temperature = compute_inv_freq(spec, spec.original_max_position_embeddings)
    return temperature == 1.0 and bool((plain == ours).all())


def _check_merge(shards: list[Shard], merge: dict[str, Any]) -> Check:
    """Compare every weight file with what `merge` wrote and proved."""
    for shard in shards:
        if merge["files"].get(shard.path.name) != sha256_of(shard.path):
            return Check("merged weights", "fail", f"{shard.path.name} is not the file that `merge` wrote")
    proof = merge["proof"]
    proven = f"proven then to {proof['max_difference']:.2g}" if proof else "not proven then (--no-check)"
    return Check("merged weights", "pass", f"{len(shards)} file(s) as `merge` wrote them, by SHA-256; {proven}")


def _check_in_place(shards: list[Shard], marks: dict[str, Any]) -> Check:
    """Look whether a program wrote into the weight files, which hard links share with the base."""
    change = find_change([shard.path for shard in shards], marks)
    if change is not None:
        return Check("weight files", "fail", change)
    return Check("weight files", "pass", f"{len(shards)} not written to since `extend` (size, time, 64 samples each)")


def _check_trained(
    ours: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], tuning: Mapping[str, Any]
) -> Check:
    """Compare names and shapes with the base's: the numbers were trained, of a model with a vision tower most."""
    for name in sorted(set(ours) | set(base)):
        here, there = (tensors[name].shape if name in tensors else None for tensors in (ours, base))
        if here != there:
            return Check("weights", "fail", f"tensor '{name}' is {here} here, {there} in the base")
    trained, total = tuning.get("num_trainable"), tuning.get("num_total")
    told = "all were trained" if trained == total else f"{trained:,} of {total:,} parameters were trained"
    return Check("weights", "pass", f"{len(ours)} tensors of the base's names and shapes; {told}")


def _check_weights(
    shards: list[Shard],
    base: Mapping[str, StoredTensor],
    touched: set[str],
    on_progress: Callable[[int], None] | None,
) -> Check:
    """Compare every tensor with the base's, but for those that a merged adapter `touched`.

    Files that are one inode need no reading; a tensor stored in another type must be the base's, rounded.
    """
    ours = tensors_of(shards)
    for name in sorted((set(ours) ^ set(base)) - touched):
        return Check("weights", "fail", f"tensor '{name}' is in only one of the two models")
    hashed = 0
    for shard in shards:
        for name in sorted(set(shard.tensors) - touched):
            stored, other = shard.tensors[name], base[name]
            is_same_file = shard.path.samefile(other.path)
            if stored.dtype != other.dtype and not has("torch"):
                types = f"'{name}' is {stored.dtype} here, {other.dtype} in the base"
                return Check("weights", "skip", f"{types}: comparing them needs torch: {install_line(['eval'])}")
            if not is_same_file and not _is_same(stored, other):
                return Check("weights", "fail", f"tensor '{name}' in {shard.path.name} differs from the base's")
            hashed += not is_same_file
        if on_progress:
            on_progress(shard.size)
    how = f"{hashed} by SHA-256" if hashed else "one file on disk with the base"
    unchanged = len(set(ours) - touched)
    changed = f"; {len(ours) - unchanged} changed by the adapter" if touched else ""
    return Check("weights", "pass", f"{unchanged} tensors identical to the base's ({how}){changed}")


def _is_same(ours: StoredTensor, theirs: StoredTensor) -> bool:
    if ours.dtype == theirs.dtype:
        return ours.shape == theirs.shape and _sha256(ours) == _sha256(theirs)
    stored = ours.read()
    return bool((theirs.read().to(stored.dtype) == stored).all())


def _sha256(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for block in tensor.blocks():
        digest.update(block)
    return digest.hexdigest()
