"""Prove that a GGUF file is what it says: its keys, its frequencies, its weights, and what llama.cpp makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longext.checkpoint.gguf import GgufFile, is_gguf, read_gguf
from longext.checkpoint.gguf_rope import FREQS, read_gguf_rope, rope_for
from longext.checkpoint.rope_config import ModelRope
from longext.conversion.gguf.engine import LlamaCpp, engine_version
from longext.conversion.gguf.extend import read_record
from longext.conversion.verify import Check, Verification
from longext.errors import CheckpointError, LongextError, MissingExtraError
from longext.rope.reading import spec_from_json
from longext.rope.spec import RopeSpec, compute_inv_freq

_NUM_TOKENS = 256
_TOLERANCE = 1e-6  # relative; keys and tensors are float32


def verify_gguf(
    model: str,
    base: str | None = None,
    *,
    logits: bool = True,
    hashes: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Verification:
    """Check a GGUF file against its formula and the file it was made from.

    Args:
        base: the .gguf it was made from; by default the one it names.
        logits: run both in llama.cpp (skipped if it is not installed).
        hashes: compare every tensor with the base's.
        on_progress: called with the bytes just compared.

    Raises:
        CheckpointError: the file or the base cannot be read.
    """
    file = read_gguf(Path(model).expanduser())
    rope, record = read_gguf_rope(file), read_record(file)
    spec = spec_from_json(record["spec"]) if record else rope.spec
    checks = [*_check_keys(file, record, spec), _check_frequencies(rope, spec)]
    named = Path(base) if base else file.path.parent / record["base_path"] if record else None
    other = read_gguf(named) if named and is_gguf(named) and (base or named.is_file()) else None
    if other is None:
        why = "was exported from a checkpoint" if named and not is_gguf(named) else "has no base that is here"
        checks.append(Check("weights", "skip", f"the file {why}: pass --base FILE.gguf"))
    elif hashes:
        checks.append(_check_weights(file, other, on_progress))
    if logits:
        try:
            checks += _check_engine(file, other, spec)
        except MissingExtraError as error:
            checks.append(Check("llama.cpp", "skip", str(error)))
        except LongextError as error:
            checks.append(Check("llama.cpp", "fail", str(error)))
    return Verification(model, str(base or record.get("base_model") or "") or None, tuple(checks))


def _check_keys(file: GgufFile, record: dict[str, Any], spec: RopeSpec) -> list[Check]:
    if not record:
        return [Check("keys", "info", f"no note of longext in it; checking the file as it is ({spec.method})")]
    wanted = rope_for(file.architecture, spec, record["new_length"])
    for name, value in wanted.keys.items():
        found, promised = file.values.get(name), value[1] if value else None
        is_near = False
        if isinstance(promised, float) and isinstance(found, float):
            is_near = math.isclose(found, promised, rel_tol=_TOLERANCE)
        if found != promised and not is_near:
            return [Check("keys", "fail", f"{name} is {found}, written {promised}")]
    if bool(wanted.tensors) != (FREQS in file.tensors):
        return [Check("keys", "fail", f"{FREQS} is {'missing' if wanted.tensors else 'there, and was not written'}")]
    return [Check("keys", "pass", f"{len(wanted.keys)} keys as written ({spec.method})")]


def _check_frequencies(rope: ModelRope, spec: RopeSpec) -> Check:
    """Hold what the keys and tensors of the file mean to llama.cpp to the formula, in float64."""
    length = spec.original_max_position_embeddings
    (ours, temperature), (theirs, wanted) = compute_inv_freq(rope.spec, length), compute_inv_freq(spec, length)
    if ours.shape != theirs.shape:
        return Check("frequencies", "fail", f"{len(ours)} frequencies in the file, {len(theirs)} by the formula")
    errors = abs(ours - theirs) / theirs
    worst = max(float(errors.max()), abs(temperature - wanted) / wanted)
    found = f"{len(ours)} frequencies and the temperature, largest relative error {worst:.1e}"
    return Check("frequencies", "pass" if worst < _TOLERANCE else "fail", found)


def _check_weights(file: GgufFile, base: GgufFile, on_progress: Callable[[int], None] | None) -> Check:
    own = set(file.tensors) - {FREQS}
    for name in sorted(own ^ (set(base.tensors) - {FREQS})):
        return Check("weights", "fail", f"tensor '{name}' is in only one of the two files")
    for name in sorted(own):
        ours, theirs = file.tensors[name], base.tensors[name]
        is_like = (ours.kind, ours.shape) == (theirs.kind, theirs.shape)
        if not is_like or file.sha256(ours) != base.sha256(theirs):
            return Check("weights", "fail", f"tensor '{name}' differs from the base's")
        if on_progress:
            on_progress(ours.size)
    return Check("weights", "pass", f"{len(own)} tensors identical to the base's (by SHA-256)")


def _check_engine(file: GgufFile, base: GgufFile | None, spec: RopeSpec) -> list[Check]:
    """Run the file in llama.cpp, and tell from its base's logits whether the engine took the new RoPE."""
    import numpy as np

    engine = LlamaCpp(file.path)
    count = min(_NUM_TOKENS, spec.original_max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, engine.num_tokens, count).tolist()
    ours = _all_logits(engine, ids)
    if not np.isfinite(ours).all():
        raise CheckpointError(f"logits of {count} random tokens are not finite numbers in {engine_version()}")
    checks = [Check("llama.cpp", "pass", f"{engine_version()} loads it; logits of {count} tokens are finite")]
    if base is None:
        return checks
    difference = float(abs(ours - _all_logits(LlamaCpp(base.path), ids)).max())
    (plain, cool), (scaled, warm) = (compute_inv_freq(each, count) for each in (read_gguf_rope(base).spec, spec))
    is_same = bool((plain == scaled).all()) and cool == warm
    promise = "must equal the base" if is_same else "must differ from the base"
    detail = f"{count} tokens: max |d logit| {difference:.2g} ({promise})"
    ok = (difference == 0) == is_same
    return [*checks, Check("engine reads the RoPE", "pass" if ok else "fail", detail)]


def _all_logits(engine: LlamaCpp, ids: list[int]) -> Any:
    import numpy as np

    logits = np.concatenate([piece.copy() for piece in engine.logits(ids)])
    engine.close()
    return logits
