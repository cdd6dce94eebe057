"""Settings of `extend`, `merge` and `convert`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longext.attention.bands import no_checkpoint
from longext.checkpoint.gguf import is_gguf
from longext.options import RopeConfig
from longext.rope.spec import ROPE_METHODS, extension_methods
from longext.settings import option, shown_name


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(RopeConfig):
    """`longext extend`: one checkpoint, one method, one length."""

    model: str = option(help="Directory, Hub id, books-5m (bundled), or a .gguf file.", argument=True)
    method: str = option(names=extension_methods, elsewhere=no_checkpoint, panel="Method")
    output: str | None = option(None, "Directory to write; the file, for a .gguf.", "--output", "-o", panel="Output")
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.", panel="Running")
    copy: bool = option(False, "Copy the weights instead of hard-linking them.")
    check: bool = option(
        True, "Build the new config with transformers and compare it with the plan.", "--check", "--no-check"
    )
    force: bool = option(False, "Replace an output that longext wrote before.", panel="Output")

    @property
    def named_output(self) -> str:
        """Return the output directory: as given, else in this folder, after model, method and length."""
        if self.output is not None:
            return self.output
        size = f"{self.factor:g}x" if self.factor else str(self.target_length or "")
        stem, suffix = shown_name(self.model).replace("/", "-"), ""
        if is_gguf(self.model):
            stem, suffix = stem[:-5], ".gguf"
        return "-".join(part for part in (stem, self.method, size) if part) + suffix


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """`longext merge`: an adapter into a standard checkpoint."""

    adapter: str = option(help="Adapter directory (adapter_config.json) or Hub id.", argument=True)
    base: str | None = option(None, "The base model (default: the one the adapter names).")
    revision: str | None = option(None, "Branch, tag or commit of --base, for a Hub id.", panel="Running")
    output: str | None = option(None, "Directory to write.", "--output", "-o", panel="Output")
    dtype: str = option("auto", "auto (each tensor in the base's type), float32, bfloat16, float16.", panel="Running")
    check: bool = option(True, "Compare the logits before the output appears.", "--check", "--no-check")
    trust_remote_code: bool = option(False, "Run model code from the checkpoint.", panel="Running")
    force: bool = option(False, "Replace an output that longext wrote before.", panel="Output")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(RopeConfig):
    """`longext convert`: an adapter's pickle files into safetensors."""

    adapter: str = option(help="Adapter directory or Hub id.", argument=True)
    base: str | None = option(None, "The base model (default: the one the adapter names).")
    revision: str | None = option(None, "Branch, tag or commit of --base, for a Hub id.", panel="Running")
    method: str | None = option(
        None, "RoPE it was trained with (none: the base's own).", names=lambda: ROPE_METHODS, panel="Method"
    )
    output: str | None = option(None, "Directory to write.", "--output", "-o", panel="Output")
    force: bool = option(False, "Replace an output that longext wrote before.", panel="Output")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`longext export`: a checkpoint in another format."""

    format: str = option(names=lambda: ("gguf",), argument=True)
    model: str = option(help="Directory, Hub id, or books-5m (bundled).", argument=True)
    output: str | None = option(
        None, "File to write (default: named after the model).", "--output", "-o", panel="Output"
    )
    dtype: str = option("auto", "auto (as stored), float32, bfloat16, float16; vectors are float32.", panel="Running")
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.", panel="Running")
    force: bool = option(False, "Replace an output that longext wrote before.", panel="Output")

    @property
    def named_output(self) -> str:
        """Return the output file: as given, else in this folder, after the model."""
        return self.output or shown_name(self.model).replace("/", "-") + ".gguf"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RopeConfig):
    """`longext serve-config`: one model, one engine."""

    model: str = option(help="Directory, Hub id, books-5m (bundled), or a .gguf file.", argument=True)
    engine: str = option(names=lambda: ("vllm", "sglang", "llama.cpp", "mlx", "exllamav3"))
    version: str | None = option(None, "Its version (default: the one of docs/engines.md).")
    method: str | None = option(
        None, "Flags that extend a model that is not extended.", names=extension_methods, panel="Method"
    )
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.", panel="Running")

    @property
    def request(self) -> ExtendConfig:
        """Return the extension that `method` and its parameters ask for."""
        shared = {item.name: getattr(self, item.name) for item in fields(RopeConfig)}
        return ExtendConfig(model=self.model, method=self.method or "none", revision=self.revision, **shared)
