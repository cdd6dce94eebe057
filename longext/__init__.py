"""longext: extend, train and evaluate long-context Hugging Face checkpoints.

Importing this package is cheap: everything public is loaded on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "load": "longext.api",
    "evaluate": "longext.api",
    "compare": "longext.api",
    "advise": "longext.api",
    "gate": "longext.api",
    "extend": "longext.api",
    "search": "longext.api",
    "finetune": "longext.api",
    "compress": "longext.api",
    "merge": "longext.api",
    "generate": "longext.api",
    "chat": "longext.api",
    "build_memory": "longext.api",
    "plan": "longext.api",
    "Result": "longext.report.outcome",
    "Comparison": "longext.report.outcome",
    "Conversation": "longext.compressor.writing.conversation",
    "EVALS": "longext.evals.base",
    "ROPE_METHODS": "longext.rope.spec",
    "RopeSpec": "longext.rope.spec",
    "compute_inv_freq": "longext.rope.spec",
    "rope_parameters": "longext.rope.spec",
    "ExtendConfig": "longext.conversion.config",
    "MergeConfig": "longext.conversion.config",
    "FinetuneConfig": "longext.training.config",
    "CompressConfig": "longext.compressor.config",
    "PlanConfig": "longext.planning.config",
    "CompareConfig": "longext.report.config",
    "AdviseConfig": "longext.report.config",
    "Perplexity": "longext.evals.suites.ppl",
    "Passkey": "longext.evals.suites.passkey",
    "REMAPS": "longext.attention.bands",
    "attach": "longext.models.remap",
    "register_attention": "longext.attention.shifted",
    "extend_checkpoint": "longext.conversion.extend",
    "finetune_checkpoint": "longext.training.longlora",
    "merge_adapter": "longext.conversion.merge",
    "plan_training": "longext.planning.fit",
    "verify_checkpoint": "longext.conversion.verify",
    "load_language_model": "longext.models.hf",
    "evaluate_perplexity": "longext.evals.perplexity",
    "evaluate_passkey": "longext.evals.passkey",
}
_RENAMED = {"PerplexityConfig": "Perplexity", "PasskeyConfig": "Passkey"}  # as 0.1 called them

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def _version() -> str:
    """The version that was installed, which the tags of the repository make (pyproject.toml)."""
    from importlib import metadata

    try:
        return metadata.version("longext")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # a source tree that nobody installed


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    name = _RENAMED.get(name, name)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'longext' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
