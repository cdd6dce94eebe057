"""What a command's settings name, opened: a model and a text that it reads, empty or gone on with from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.compressor.checkpoint import check_base_options, find_base, is_compressor, load_compressor
from longext.compressor.config import MemoryConfig
from longext.compressor.reading.continuing import Continued
from longext.compressor.reading.held import HeldSession, check_holds
from longext.compressor.reading.memory_file import Origin, Stored, check_model, read_memory
from longext.compressor.reading.readers import Reader, find_compressor, load_reader
from longext.compressor.reading.session import UNTRAINED, Session
from longext.compressor.reading.window import WindowSession
from longext.compressor.schedule import Ratio, spelled
from longext.errors import CheckpointError, ConfigError
from longext.models.hf import HFLanguageModel, load_language_model
from longext.models.methods import check_method
from longext.settings import check_names
from longext.threads import set_threads


@dataclass
class Opened:
    """A model and a text that it reads.

    Attributes:
        model: by itself.
        text: its tokens, and what is kept of them.
        spec: the memory as `--memory` spells it; "" for a plain window, and for a compressor given by itself.
        documents: name and tokens of each that was read.
        turn: whose message is open at the end of the text: "user", or "" for none.
    """

    model: HFLanguageModel
    text: Continued
    spec: str = ""
    find_origin: Callable[[], Origin] | None = None
    documents: Sequence[dict[str, Any]] = ()
    turn: str = ""

    def check_saving(self) -> None:
        """Raise ConfigError if what the text keeps is nothing that a file could stand for, before much is read."""
        if isinstance(self.text, HeldSession):
            check_holds(self.spec, self.text.trail)
        elif not isinstance(self.text, Session):
            raise ConfigError(
                "A plain model's window is no memory to keep: give a compressor, or --memory (thinned:8, snapkv:512)."
            )
        if self.text.origin is None:
            assert self.find_origin is not None
            self.text.origin = self.find_origin()

    def save(self, path: Path) -> None:
        """Write the text to a memory file (ConfigError as `check_saving`)."""
        self.check_saving()
        assert isinstance(self.text, (Session, HeldSession))
        self.text.save(path, documents=list(self.documents), turn=self.turn)


def check_memory_config(config: MemoryConfig) -> None:
    """Raise ConfigError for what can be told to be wrong before anything is loaded."""
    check_method(config.method, config.factor)
    check_names(config)
    if memory_file(config) is not None:
        return
    if is_compressor(config.model):
        check_base_options(config)
        _check_unused(config, ("method", "factor", "segment"), "a trained compressor")
        return
    trained = _find_compressor(config.memory) if config.memory else None
    if not (config.model or trained):
        raise ConfigError(
            "Missing: model. Name the model that reads, or a file of `longext memory build` with --memory."
        )
    if trained is None:
        _check_unused(config, ("ratio", "base"), "a plain model")
    elif config.ratio:
        raise ConfigError(f"--memory {config.memory} says the ratio, as in OUT@8 or OUT@2,4,8: leave --ratio out.")
    if not config.memory:
        _check_unused(config, ("segment",), "a plain model")


def _find_compressor(spec: str) -> tuple[Path, Ratio | None, int | None] | None:
    try:
        return find_compressor(spec)
    except ConfigError as error:
        if "/" not in spec and ":" in spec:
            raise
        raise ConfigError(f"{error} There is no memory file of that name either (`longext memory build`).") from error


def _check_unused(config: MemoryConfig, names: Sequence[str], what: str) -> None:
    wrong = ", ".join(f"--{name}" for name in names if getattr(config, name))
    if wrong:
        advice = "give the -o directory of `longext compress-train`." if what == "a plain model" else "leave it out."
        raise ConfigError(f"{config.model} is {what}, which takes no {wrong}: {advice}")


def memory_file(config: MemoryConfig) -> Path | None:
    """Return the memory file that --memory names, None if it names a kind of memory."""
    if not config.memory:
        return None
    path = Path(config.memory).expanduser()
    return path if path.is_file() or is_compressor(config.model) else None


def open_text(config: MemoryConfig) -> Opened:
    """Load what `config` names, ready to read.

    Raises:
        ConfigError, CheckpointError: as the message says.
    """
    check_memory_config(config)
    set_threads(config.threads)
    path = memory_file(config)
    if path is not None:
        return _from_file(config, path)
    if is_compressor(config.model):
        loaded = _load_compressor(config, config.model, config.base)
        return Opened(loaded.plain, Session.of(loaded, ratio=config.ratio or None, when_full=config.when_full))
    if config.memory:
        named = dataclasses.replace(config, model=config.base or config.model)
        reader = load_reader(named, config.memory, segment=config.segment, method=config.method, factor=config.factor)
        text = reader.session(config.when_full)
        return Opened(reader.plain, text, config.memory, lambda: _origin(config, reader))
    model = load_language_model(config, config.method, config.factor)
    return Opened(model, WindowSession(model))


def _load_compressor(config: MemoryConfig, directory: str, base: str | None) -> Any:
    return load_compressor(directory, base=base, device=config.device, dtype=config.dtype, attention=config.attention)


def _origin(config: MemoryConfig, reader: Reader) -> Origin:
    """Return what a memory file says of a reader."""
    if reader.plain.adapter:
        raise ConfigError(f"{reader.plain.name} is an adapter: merge it (longext merge) before its memory is kept.")
    base, trained = find_base(str(reader.plain.directory)), find_compressor(reader.spec)
    spec = reader.spec if trained is None else f"{trained[0].absolute()}{reader.spec[len(str(_bare(reader.spec))) :]}"
    name, path = reader.plain.name, Path(reader.plain.name).expanduser()
    named = str(path.resolve()) if path.is_dir() else name
    return Origin(spec, named, config.revision, base.weights, reader.segment, config.method, config.factor)


def _bare(spec: str) -> str:
    """Return a compressor's directory in a spec, as it is written there."""
    return spec if is_compressor(spec) else spec.rpartition("@")[0]


def _from_file(config: MemoryConfig, path: Path) -> Opened:
    """Go on from a memory file, with the model it names or the one given in its place."""
    stored = read_memory(path)
    origin = stored.origin
    for name in ("method", "factor", "segment"):
        if getattr(config, name) not in (None, getattr(origin, name) or ("none" if name == "method" else None)):
            written = f"with --{name} {getattr(origin, name)}" if getattr(origin, name) else f"without --{name}"
            raise ConfigError(f"{path} was written {written}: leave --{name} out.")
    is_trained = stored.description["kind"] == "compressor" and not origin.memory.startswith(f"{UNTRAINED}:")
    opened = _of_compressor(config, stored) if is_trained else _of_reader(config, stored)
    assert isinstance(opened.text, (Session, HeldSession))
    opened.text.restore_from(stored)
    _check_asked(config, path, opened.text)
    opened.documents, opened.turn = stored.description["documents"], stored.description["turn"]
    return opened


def _check_asked(config: MemoryConfig, path: Path, text: Session | HeldSession) -> None:
    if not isinstance(text, Session):
        wrong = [name for name in ("ratio", "when_full") if getattr(config, name)]
        if wrong:
            flag = f"--{wrong[0].replace('_', '-')}"
            raise ConfigError(f"{path} keeps what {text.reader.spec} keeps, and no more: leave {flag} out.")
        return
    written = text.trail.schedule.ratios
    if config.ratio and config.ratio != written:
        raise ConfigError(f"{path} was written at --ratio {spelled(written)}, not {spelled(config.ratio)}.")
    if config.when_full not in (None, text.when_full):
        raise ConfigError(f"{path} was written with --when-full {text.when_full}: leave --when-full out.")


def _of_compressor(config: MemoryConfig, stored: Stored) -> Opened:
    origin = stored.origin
    spec, is_given = origin.memory, is_compressor(config.model)
    said = spec.rpartition("@")[2]
    # a directory may have an @ in its name, and may have moved
    has_sizes = said and not is_compressor(spec) and set(said) <= set("0123456789,+")
    sizes = f"@{said}" if has_sizes else ""
    directory = config.model if is_given else spec[: len(spec) - len(sizes)]
    if not is_compressor(directory):
        raise CheckpointError(
            f"{stored.path} was written with the compressor {directory}, which is not there: give MODEL."
        )
    here = origin.model if Path(origin.model).is_dir() else None
    loaded = _load_compressor(config, directory, config.base or ("" if is_given else config.model) or here)
    check_model(stored.path, loaded.base, origin.weights)
    found = find_compressor(f"{directory}{sizes}")
    if found is not None and found[2] is not None:
        loaded.compressor.spec = dataclasses.replace(loaded.compressor.spec, overlap=found[2])
    text = Session.of(loaded)
    named = f"{Path(directory).expanduser().absolute()}{sizes}"
    text.origin = dataclasses.replace(origin, memory=named, model=loaded.base.name)  # where they lie now
    return Opened(loaded.plain, text)


def _of_reader(config: MemoryConfig, stored: Stored) -> Opened:
    origin = stored.origin
    given = config.base or config.model
    model, revision = (given, config.revision) if given else (origin.model, origin.revision)
    base = find_base(model, revision)
    check_model(stored.path, base, origin.weights)
    named = dataclasses.replace(config, model=model, revision=revision)
    reader = load_reader(named, origin.memory, segment=origin.segment, method=origin.method, factor=origin.factor)
    text = reader.session()
    text.origin = dataclasses.replace(origin, model=base.name, revision=revision)
    return Opened(reader.plain, text, origin.memory)
