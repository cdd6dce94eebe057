"""Optional packages: which extra of longext brings which, whether they are there, and the one line that says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable

from longext.errors import MissingExtraError

# extra -> what a command that needs the extra cannot start without, by the name it is imported under
NEEDED: dict[str, tuple[str, ...]] = {
    "train": ("torch", "transformers", "peft", "accelerate"),
    "eval": ("torch", "transformers"),
    "report": ("matplotlib", "jinja2"),
    "gguf": ("gguf",),
    "flash": ("flash_attn",),
    "liger": ("liger_kernel",),
    "qlora": ("bitsandbytes",),
    "wandb": ("wandb",),
    "zh": ("jieba",),
}
# extra -> further packages that it brings, each needed by a part of what the extra is for
FURTHER: dict[str, tuple[str, ...]] = {
    "train": ("datasets", "jinja2", "tokenizers", "pyarrow"),
    "eval": ("peft", "accelerate", "datasets", "lm_eval", "jinja2", "tokenizers", "pyarrow", "sacrebleu"),
    "report": ("markupsafe",),
    "gguf": ("llama_cpp",),
}
_PROJECTS = {"llama_cpp": "llama-cpp-python"}
_ISOLATED = {"flash": "--no-build-isolation "}  # flash-attn builds against the torch that is there


def project(module: str) -> str:
    """Return the name under which a package index has the package that is imported as `module`."""
    return _PROJECTS.get(module, module.replace("_", "-"))


def has(*modules: str) -> bool:
    """Return True if all of these packages can be imported; none is."""
    return not absent(modules)


def absent(modules: Iterable[str]) -> list[str]:
    """Return those packages that cannot be imported, each once, in order; none is imported."""
    return [module for module in dict.fromkeys(modules) if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an importer that refuses it, or a stand-in without a spec
        return False


def install_line(extras: Iterable[str]) -> str:
    """Return the command that installs extras of longext."""
    names = list(dict.fromkeys(extras))
    how = "".join(_ISOLATED.get(name, "") for name in names)
    return f"pip install {how}'longext[{','.join(names)}]'"


def in_words(names: Collection[str]) -> str:
    """Return "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def require(what: str, extras: Iterable[str], modules: Iterable[str] = ()) -> None:
    """Check that what `extras` are needed for can start.

    Args:
        what: what needs them, as the message begins: "`longext finetune`".
        modules: packages to look for, instead of those that every use of the extras needs.

    Raises:
        MissingExtraError: packages are missing; names all of them, and the install line.
    """
    extras, asked = list(extras), list(modules)
    wanted = {extra: asked or NEEDED[extra] for extra in extras}
    missing = absent(module for modules in wanted.values() for module in modules)
    if missing:
        short = [extra for extra in extras if set(wanted[extra]) & set(missing)]
        # one extra is enough where it brings all that is missing
        alone = next((extra for extra in short if set(missing) <= {*wanted[extra], *FURTHER.get(extra, ())}), None)
        told = in_words([project(module) for module in missing])
        raise MissingExtraError(f"{what} needs {told}: {install_line([alone] if alone else short)}")


def explain_import(error: BaseException, what: str, extras: Collection[str] = ()) -> MissingExtraError | None:
    """Return what to say of an import that failed, or None if no extra brings what it asked for.

    Args:
        what: what needs the package: "`longext eval ppl`".
        extras: those that `what` is known to need, before others that bring the package too.
    """
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    order = dict.fromkeys([*extras, *NEEDED, *FURTHER])
    extra = next((extra for extra in order if module in (*NEEDED.get(extra, ()), *FURTHER.get(extra, ()))), None)
    if not module or extra is None or has(module):  # there, and broken inside: that is another error
        return None
    return MissingExtraError(f"{what} needs {project(module)}: {install_line([extra])}")
