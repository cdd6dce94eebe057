"""Prove that a checkpoint is what it says: reload it with plain transformers in a fresh process and compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longext.checkpoint.links import find_change
from longext.checkpoint.rope_config import ModelRope, read_model_rope
from longext.checkpoint.source import Shard, read_config, read_shards, resolve_model
from longext.checkpoint.writing import file_hash, read_tensor, stored_blocks
from longext.errors import LongextError
from longext.manifest import read_manifest
from longext.models.checks import left_over
from longext.rope.methods import ROPE_METHODS, RopeSpec, compute_inv_freq
from longext.rope.reading import read_parameters, spec_from_json

_TOLERANCE = 1e-6  # relative; float32 frequencies are exact to about 4e-7
_FLOAT32_LIMIT = 8 * 2**30  # larger checkpoints are compared in their own dtype
_RELOAD = Path(__file__).with_name("_reload.py")

# What to delete from config.json to leave one layout of the RoPE keys.
_OLD_KEYS = [
    "rope_theta",
    "rope_scaling",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "rope_local_base_freq",
]
_NEW_KEYS = ["rope_parameters"]


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
        """True where no check failed."""
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

    Args:
        base: the model it was made from; by default the one its run.json names.
        logits: load the weights and compare logits inside the trained window with the base's.
        hashes: compare every weight file with the base's (skipped per file where both are one file on disk).
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
    spec = _promised_spec(rope, extension)
    checks = [
        _check_config(rope, extension),
        *_check_layouts(read_config(directory), rope),
        _check_adapter_free(directory),
    ]
    with tempfile.TemporaryDirectory(prefix="longext-verify-") as scratch:
        ids = _probe_tokens(directory, spec) if logits else None
        answer = _reload(directory, base_directory, rope, spec, Path(scratch), ids, _dtype_for(shards))
        checks += _check_frequencies(answer, rope, spec)
        if logits:
            config = read_config(directory)
            checks.append(_check_loading(answer, config[rope.section] if rope.section else config))
        if logits and base_directory is not None:
            is_plain = read_model_rope(base_directory).spec.method == "none"
            checks.append(_check_logits(Path(scratch), spec, is_plain, was_trained=is_trained or merge is not None))
    if merge and hashes:
        checks.append(_check_merge(shards, merge))
    if base_directory is None:
        why = f"the base model {base_name} is not here any more" if base_name else "no base model given or recorded"
        checks.append(Check("weights", "skip", f"{why}: pass --base MODEL"))
    elif is_trained:
        checks.append(_check_trained(shards, read_shards(base_directory)))
    elif hashes:
        touched = set(merge["touched"]) if merge else set()
        checks.append(_check_weights(shards, read_shards(base_directory), touched, on_progress))
    if extension and "files" in extension:
        checks.append(_check_in_place(shards, extension["files"]))
    return Verification(model, base_name, tuple(checks))


def _find_base(base: str | None, extension: dict[str, Any] | None) -> tuple[str | None, Path | None]:
    if base is not None:
        return base, resolve_model(base)
    if not extension:
        return None, None
    recorded = Path(extension["base_path"])
    return extension["base_model"], recorded if (recorded / "config.json").is_file() else None


def _promised_spec(rope: ModelRope, extension: dict[str, Any] | None) -> RopeSpec:
    """The RoPE that was promised: run.json's where there is one, else what the config itself says."""
    if not extension:
        return rope.spec
    return spec_from_json(extension.get("spec"))


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


def _check_layouts(config: dict[str, Any], rope: ModelRope) -> list[Check]:
    """Compare the two spellings key by key, as text; `_check_frequencies` compares what they compute."""
    text = config[rope.section] if rope.section else config
    new = text.get("rope_parameters") or {}
    new = new.get("full_attention", new)
    theta_key = rope.family.theta_key
    if not new:
        return [Check("layouts", "info", "only the old layout (rope_theta, rope_scaling) is in config.json")]
    if "rope_scaling" not in text and theta_key not in text:
        return [Check("layouts", "fail", f"{theta_key} is missing: readers of the old layout fall back to theta 10000")]
    old = {**(text.get("rope_scaling") or {"rope_type": "default"}), "rope_theta": text.get(theta_key)}
    for key in sorted(set(new) - {"partial_rotary_factor"} | set(old) - {"type"}):
        if old.get(key, old.get("type") if key == "rope_type" else None) != new.get(key):
            where = theta_key if key == "rope_theta" else f"rope_scaling.{key}"
            return [Check("layouts", "fail", f"{where} is {old.get(key)}, rope_parameters.{key} is {new.get(key)}")]
    return [Check("layouts", "pass", "old and new spelling hold the same keys")]


def _check_adapter_free(directory: Path) -> Check:
    leftovers = sorted(
        file.name for pattern in ("adapter_*", "*.bin", "trainable_params*") for file in directory.glob(pattern)
    )
    if leftovers:
        return Check("adapter-free", "fail", f"{leftovers[0]} is in the directory: merge the adapter first")
    if "auto_map" in read_config(directory):
        return Check("adapter-free", "fail", "config.json has auto_map: the model needs remote code")
    return Check("adapter-free", "pass", "plain checkpoint, no adapter, no remote code")


def _probe_tokens(directory: Path, spec: RopeSpec) -> list[int]:
    """Seeded token ids that fit the trained window (256 at most): any ids serve to compare two models."""
    config = read_config(directory)
    vocabulary = (config.get("text_config") or config).get("vocab_size") or config.get("vocab_size") or 1000
    length = min(spec.original_max_position_embeddings, 256)
    return [int(i) for i in np.random.default_rng(0).integers(0, vocabulary, length)]


def _dtype_for(shards: list[Shard]) -> str:
    return "float32" if sum(shard.size for shard in shards) < _FLOAT32_LIMIT else "auto"


def _reload(
    directory: Path,
    base: Path | None,
    rope: ModelRope,
    spec: RopeSpec,
    scratch: Path,
    input_ids: list[int] | None,
    dtype: str,
) -> dict[str, Any]:
    """Run _reload.py in a fresh, isolated interpreter and return its answer; logits are left in `scratch`."""
    length = spec.original_max_position_embeddings
    text = read_config(directory)
    text = text[rope.section] if rope.section else text
    has_both = "rope_parameters" in text and (rope.family.theta_key in text or "rope_theta" in text)
    answer_path = scratch / "answer.json"
    directories = {"out": directory} if base is None else {"out": directory, "base": base}
    request = {
        "directory": str(directory.resolve()),
        "layouts": ["both", "new", "old"] if has_both else ["both"],
        "dropped_keys": {"new": _OLD_KEYS, "old": _NEW_KEYS},
        "lengths": sorted({length, round(length * max(spec.factor, 1)) + 1}),
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


def frequency_tolerance(spec: RopeSpec) -> float:
    """Return the relative error allowed in a frequency: 1e-6, or what a float32 ramp loses at a large factor.

    An error of 2^-23 in a ramp value near 0 is `factor` times as large relative to the frequency.
    """
    return max(_TOLERANCE, spec.factor * 2.0**-23)


def _check_frequencies(answer: dict[str, Any], rope: ModelRope, spec: RopeSpec) -> list[Check]:
    checks = []
    for layout, by_length in answer["frequencies"].items():
        name = {"both": "frequencies", "new": "new spelling", "old": "old spelling"}[layout]
        checks.append(_compare_frequencies(name, by_length, rope, spec))
    return checks


def _compare_frequencies(name: str, by_length: dict[str, Any], rope: ModelRope, spec: RopeSpec) -> Check:
    worst, count = 0.0, 0
    for length, modules in by_length.items():
        for module, (values, scaling) in modules.items():
            kind = module.partition(":")[2]
            if kind and kind != "full_attention":
                expected_spec = _local_spec(rope, kind)
            else:
                expected_spec = spec
            expected, temperature = compute_inv_freq(expected_spec, int(length))
            if len(values) != len(expected):
                return Check(name, "fail", f"{module}: {len(values)} frequencies, {len(expected)} expected")
            error = np.abs(np.array(values) / expected - 1)
            if error.max() > frequency_tolerance(expected_spec):
                i = int(error.argmax())
                return Check(
                    name,
                    "fail",
                    f"{module} at length {length}: inv_freq[{i}] is {values[i]:.8g}, should be {expected[i]:.8g}",
                )
            if abs(scaling / temperature - 1) > _TOLERANCE:
                return Check(
                    name, "fail", f"{module}: attention factor is {scaling:.8g}, the formula gives {temperature:.8g}"
                )
            worst, count = max(worst, float(error.max())), count + len(values)
    return Check(name, "pass", f"{count} frequencies match the formula, largest relative error {worst:.1e}")


def _local_spec(rope: ModelRope, kind: str) -> RopeSpec:
    return read_parameters(rope.local_parameters[kind], rope.spec.rotary_dim, rope.max_position_embeddings)


def _check_loading(answer: dict[str, Any], text: dict[str, Any]) -> Check:
    found = answer["loading_problems"]
    left = left_over(found.pop("unexpected_keys", ()), text, answer["is_part"])
    problems = {**found, "unexpected_keys": left} if left else found
    if problems:
        kind, keys = next(iter(problems.items()))
        return Check("loads", "fail", f"{kind.replace('_', ' ')}: {keys[0]} ({len(keys)} in all)")
    return Check("loads", "pass", "plain AutoModelForCausalLM, no missing or unexpected keys")


def _check_logits(scratch: Path, spec: RopeSpec, base_is_plain: bool, was_trained: bool) -> Check:
    import torch

    ours, theirs = (torch.load(scratch / f"{name}.pt").double() for name in ("out", "base"))
    difference = float((ours - theirs).abs().max())
    kl = float(torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1).mean())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    detail = f"{len(ours)} tokens: max |d| {difference:.2g}, KL {kl:.2g}, same top-1 {agreement:.1%}"
    if was_trained:
        return Check("logits in old window", "info", f"{detail} (training changes them by design)")
    promised = base_is_plain and (ROPE_METHODS[spec.method].is_exact_inside or _is_identity(spec))
    if not promised:
        return Check("logits in old window", "info", f"{detail} ({spec.method} changes them by design)")
    return Check("logits in old window", "pass" if difference == 0 else "fail", f"{detail} (must equal the base)")


def _is_identity(spec: RopeSpec) -> bool:
    """True where nothing changes up to L tokens: factor 1, or LongRoPE whose short factors are 1."""
    plain, _ = compute_inv_freq(dataclasses.replace(spec, method="none"))
    ours, temperature = compute_inv_freq(spec, spec.original_max_position_embeddings)
    return temperature == 1.0 and bool((plain == ours).all())


def _check_merge(shards: list[Shard], merge: dict[str, Any]) -> Check:
    """Compare every weight file with what `merge` wrote and proved."""
    for shard in shards:
        if merge["files"].get(shard.path.name) != file_hash(shard.path):
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


def _check_trained(ours: list[Shard], theirs: list[Shard]) -> Check:
    """Compare names and shapes with the base's: every number was trained."""
    shapes, base = ({name: s.tensors[name][1] for s in shards for name in s.tensors} for shards in (ours, theirs))
    for name in sorted(set(shapes) | set(base)):
        if shapes.get(name) != base.get(name):
            return Check("weights", "fail", f"tensor '{name}' is {shapes.get(name)} here, {base.get(name)} in the base")
    return Check("weights", "pass", f"{len(shapes)} tensors of the base's names and shapes; all were trained")


def _check_weights(
    ours: list[Shard], theirs: list[Shard], touched: set[str], on_progress: Callable[[int], None] | None
) -> Check:
    """Compare every tensor with the base's, but for those that a merged adapter `touched`.

    Files that are one inode need no reading; a tensor stored in another type must be the base's, rounded.
    """
    base = {name: shard for shard in theirs for name in shard.tensors}
    names = {name for shard in ours for name in shard.tensors}
    for name in sorted((names ^ set(base)) - touched):
        return Check("weights", "fail", f"tensor '{name}' is in only one of the two models")
    hashed = 0
    for shard in ours:
        for name in sorted(set(shard.tensors) - touched):
            is_same_file = _is_same_file(shard, base[name])
            if not is_same_file and not _is_same_tensor(shard, base[name], name):
                return Check("weights", "fail", f"tensor '{name}' in {shard.path.name} differs from the base's")
            hashed += not is_same_file
        if on_progress:
            on_progress(shard.size)
    how = f"{hashed} by SHA-256" if hashed else "one file on disk with the base"
    kept = len(names - touched)
    changed = f"; {len(names) - kept} changed by the adapter" if touched else ""
    return Check("weights", "pass", f"{kept} tensors identical to the base's ({how}){changed}")


def _is_same_tensor(ours: Shard, theirs: Shard, name: str) -> bool:
    if ours.tensors[name][0] == theirs.tensors[name][0]:
        return _tensor_hash(ours, name) == _tensor_hash(theirs, name)
    stored = read_tensor(ours, name)
    return bool((read_tensor(theirs, name).to(stored.dtype) == stored).all())


def _is_same_file(a: Shard, b: Shard) -> bool:
    return a.path.samefile(b.path)


def _tensor_hash(shard: Shard, name: str) -> tuple[str, tuple[int, ...], str]:
    """(dtype, shape, SHA-256 of the bytes) of one tensor, read in pieces."""
    dtype, shape, *_ = shard.tensors[name]
    digest = hashlib.sha256()
    for block in stored_blocks(shard, name):
        digest.update(block)
    return dtype, shape, digest.hexdigest()
