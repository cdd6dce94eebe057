"""The one place for output directories: checked and locked before the work, complete or absent after it.

While a command works towards OUTPUT it holds `.OUTPUT.lock` next to it (flock), so that there is one at a time; it
writes into `.OUTPUT.partial-*`, and that gets its name by a rename. What a killed command left is removed by the next
one that gets the lock. Only the unfinished runs of trainings, in `OUTPUT.running`, outlive a kill.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from longext.errors import ConfigError, LongextError
from longext.manifest import read_manifest
from longext.signals import raise_if_received
from longext.untrusted import file_kind

_DAY = 86400.0
_Identity = tuple[int, int]


class OutputInUse(ConfigError):
    """Another process works towards the same output."""


class OutputTaken(LongextError):
    """Something appeared under the output's name while the command was at work; it was left alone."""


@dataclass
class _Lock:
    """A lock of this process: its open file, the folders made for it, what was at the output at the check."""

    file: IO[str] | None
    folders: list[Path]
    identity: _Identity | None = None
    was_filled: bool = False

    def look(self, target: Path) -> None:
        """Note what is at `target`."""
        self.identity = _identity(target)
        self.was_filled = target.is_dir() and any(target.iterdir())


_locks: dict[Path, _Lock] = {}


def resolve_output(output: Path) -> Path:
    """Return the path that is written: links are followed, so a link to a directory stays and its target changes."""
    if "\0" in str(output):
        raise ConfigError(f"The output {str(output)!r} holds a NUL byte. Choose another -o.")
    return Path(os.path.realpath(output))


def check_output(output: Path, force: bool, *, protected: Path | None = None) -> None:
    """Raise ConfigError if writing `output` would lose something or cannot work.

    Args:
        output: the directory to be written. A link to a directory means its target.
        force: the user allows an existing directory to be replaced.
        protected: a directory that must survive (the source model).
    """
    target = resolve_output(output)
    source = None if protected is None else resolve_output(protected)
    if source is not None and (_holds(target, source) or _holds(source, target)):
        raise ConfigError(f"The output {output} and the model {protected} overlap. Choose another -o directory.")
    _check_place(output, target)
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ConfigError(f"The output {output} already exists. Choose another -o, or add --force to replace it.")
        if not is_ours(target):
            raise ConfigError(
                f"The output {output} exists and was not written by longext, so --force will not delete it. "
                "Choose another -o."
            )


def check_apart(output: Path, read: Path) -> None:
    """Raise ConfigError if replacing `output` would delete what the command reads."""
    if _holds(resolve_output(output), resolve_output(read)):
        raise ConfigError(f"The output {output} is or holds {read}, which this command reads. Choose another -o.")


def _check_place(output: Path, target: Path) -> None:
    """Raise ConfigError if `output` is something else than a directory, or none can be made or replaced there."""
    for path in (output, *output.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise ConfigError(f"The output {output} is no directory: {path} is a link to nothing. Choose another -o.")
    if os.path.lexists(target) and not target.is_dir():
        raise ConfigError(f"The output {output} is {file_kind(target.lstat().st_mode)}. Choose a directory with -o.")
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"The output {output} is or holds the current directory. Choose one inside it with -o.")
    if _is_mount(target):
        raise ConfigError(f"The output {output} is a mount point, which cannot be renamed. Choose -o {output}/NAME.")
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"Cannot write {output}: {parent} is not a writable directory. Choose another -o.")


def _is_mount(path: Path) -> bool:
    """True for a mount point, a bind mount of the same file system too (which has the same device number)."""
    if os.path.ismount(path):
        return True
    with contextlib.suppress(OSError), Path("/proc/self/mountinfo").open("rb") as file:
        spelled = re.sub(rb"[\\ \t\n]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))
        return any(line.split()[4] == spelled for line in file)
    return False


def _holds(folder: Path, path: Path) -> bool:
    """True if `path` is `folder` or inside it, compared as names and as files on disk."""
    above, identity = (path, *path.parents), _identity(folder)
    return folder in above or (identity is not None and identity in map(_identity, above))


def _identity(path: Path) -> _Identity | None:
    """Return (device, inode) of what is at `path`, None if nothing does."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return status.st_dev, status.st_ino
    return None


def is_taken(output: Path) -> bool:
    """Return True if something is at `output`, or a command is at work on it."""
    return os.path.lexists(output) or os.path.lexists(_lock_name(output))


def is_ours(directory: Path) -> bool:
    """Return True for a directory that a longext command wrote (it holds longext's run.json)."""
    return bool(read_manifest(directory))


def hold_output(output: Path, force: bool) -> bool:
    """Check and lock `output` until `release_outputs`; return False if this process holds it already.

    Raises:
        ConfigError: as `check_output`.
        OutputInUse: another process holds it.
    """
    is_new = hold_name(output)
    target = resolve_output(output)
    try:
        check_output(output, force)
    except BaseException:
        if is_new:
            release_outputs(output)
        raise
    _locks[target].look(target)
    return is_new


def hold_name(output: Path) -> bool:
    """Lock `output`, whatever is there, and remove what killed commands left; False if it is held already.

    Raises:
        ConfigError: nothing can be written at this place.
        OutputInUse: another process holds it.
    """
    target = resolve_output(output)
    if target in _locks:
        return False
    _check_place(output, target)
    folders = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(target, output)
    except BaseException as error:
        _remove_empty(folders)
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ENOENT, errno.ELOOP):
            raise ConfigError(f"Cannot write {output}: {error.strerror}. Choose another -o.") from error
        raise
    _locks[target] = _Lock(file, folders)
    if file is not None:
        _tidy(target)
    _locks[target].look(target)
    return True


def release_outputs(*outputs: Path) -> None:
    """Let go of the locks on `outputs`, or of all that this process holds."""
    for target in [resolve_output(output) for output in outputs] or list(_locks):
        lock = _locks.pop(target)
        _unlock(target, lock.file)
        _remove_empty(lock.folders)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _lock(target: Path, output: Path) -> IO[str] | None:
    """Return the locked file next to `target`, None on systems and file systems without flock."""
    try:
        import fcntl
    except ImportError:
        return None
    path = _lock_name(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            os.close(descriptor)
            raise ConfigError(f"{path} is no file that a lock can be put on. Choose another -o.")
        file = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise OutputInUse(_in_use(output, file.read(200))) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            path.unlink(missing_ok=True)
            return None
        if _identity(path) == (opened.st_dev, opened.st_ino):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # its owner removed it as we opened it


def _unlock(target: Path, file: IO[str] | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):  # before it is let go: whoever gets it looks whether it is there
            _lock_name(target).unlink()
        file.close()


def _in_use(output: Path, owner: str) -> str:
    who = owner if re.fullmatch(r"process \d+ on \S+", owner) else "another process"
    return f"The output {output} is in use: {who} is at work on it. Wait for it, stop it, or choose another -o."


def _machine() -> str:
    """Return 12 hex digits for the names of unfinished directories: 6 of the host's name, 6 of its last start."""
    boot = b""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return "".join(hashlib.sha256(part).hexdigest()[:6] for part in (socket.gethostname().encode(), boot))


def _tidy(target: Path) -> None:
    """Remove what killed commands left next to `target`, whose lock is held; a replacement cut in two is undone.

    The lock says that none of this machine is alive. A lock of another machine, on a shared file system, may not be
    seen here: its directories go once nothing in them has changed for a day.
    """
    form = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-(?:(\w{{6}})(\w{{6}})-)?\w{{8}}")
    ours = _machine()
    for path in target.parent.iterdir():
        match = form.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        if match[2] != ours[:6] and match[3] != ours[6:] and time.time() - _last_change(path) < _DAY:
            continue
        if match[1] == "old" and not os.path.lexists(target):
            path.rename(target)  # killed between the two renames of a replacement
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _last_change(path: Path) -> float:
    times = [path.lstat().st_mtime]
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            times.append(file.lstat().st_mtime)
    return max(times)


@contextlib.contextmanager
def staged_directory(output: Path, force: bool = False, *, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `output`; rename it to `output` on success, remove it on any failure or Ctrl-C.

    Args:
        output: the final name. It must not exist, unless `force` and longext wrote it.
        keep: leave a finished directory whose name was taken meanwhile under another name.

    Raises:
        ConfigError: `output` exists and may not be replaced, or another process writes it.
        OutputTaken: something appeared there meanwhile.
    """
    target = resolve_output(output)
    is_new = target not in _locks and hold_output(output, force)
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(release_outputs, output)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{_machine()}-", dir=target.parent))
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        staging.chmod(0o755)  # mkdtemp makes it private; a result is as readable as any directory
        yield staging
        raise_if_received()
        try:
            _replace(staging, target)
        except OutputTaken as error:
            if not keep:
                raise
            place = staging.rename(target.with_name(f"{target.name}.kept-{secrets.token_hex(4)}"))
            raise OutputTaken(f"{error} What was to be there is in {place}.") from error


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of a file, which takes its name on success and is removed on any failure.

    Raises:
        OutputInUse: another process writes it.
    """
    target = resolve_output(path)
    lock = _lock(target, path)
    unfinished = target.with_name(f".{target.name}.partial-{_machine()}-{secrets.token_hex(4)}")
    try:
        if lock is not None:
            _tidy(target)
        yield unfinished
        raise_if_received()
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
        _unlock(target, lock)


def replace_directory(finished: Path, output: Path) -> None:
    """Give a finished directory (of a long run, that could not be a temporary one) the name of an output that is held.

    Raises:
        OutputTaken: something appeared there meanwhile.
    """
    target = resolve_output(output)
    try:
        _replace(finished, target)
    except OutputTaken as error:
        raise OutputTaken(f"{error} What was to be there is in {finished}.") from error


def _replace(staging: Path, target: Path) -> None:
    """Move `staging` to `target`; what was there at the check is set aside first, and deleted at the end.

    A rename of a directory fails (POSIX) if its new name is taken by anything but an empty directory, so whatever
    appears at the last moment is safe.
    """
    taken = f"{target} was made or changed by another program meanwhile and was left alone. Choose another -o."
    lock, aside = _locks[target], None
    if _identity(target) != lock.identity:
        raise OutputTaken(taken)
    if lock.was_filled:
        aside = target.rename(target.with_name(f".{target.name}.old-{_machine()}-{secrets.token_hex(4)}"))
    try:
        if aside is not None and _identity(aside) != lock.identity:
            raise OutputTaken(taken)
        staging.rename(target)
    except BaseException as error:
        if aside is not None and _identity(target) is None:
            aside.rename(target)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise OutputTaken(taken) from error
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
