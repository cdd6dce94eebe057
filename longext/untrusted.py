"""The one place for text that somebody else wrote: files, JSON, JSON lines, YAML, patterns.

Whatever is read here has a size, a depth and types that are known afterwards, or ends in one line that names the file
(and the line, in formats made of lines), what was found and what to do. Imports nothing heavy.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import yaml

from longext.errors import CheckpointError, ConfigError, DataError, LongextError

METADATA_LIMIT = 256 * 2**20  # bytes of a configuration, an index or a record: far above any real one
RECIPE_LIMIT = 2**20
MAX_DEPTH = 64  # of nested lists and objects
_YAML_DEPTH = 16
_MAX_DIGITS = 40  # of a whole number: 128 bits and a sign
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_FLOAT_TAG = "__float__"  # how transformers spells numbers that JSON has not: {"__float__": "Infinity"}
_SPELLED: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    None: "null",
    type(None): "null",
}

if TYPE_CHECKING:
    import zipfile

    Openable = Path | zipfile.Path

Kind = type[LongextError]
BuiltT = TypeVar("BuiltT")


# --- notes ------------------------------------------------------------------------------------------------------------

_replaced: dict[str, int] = {}  # place -> characters replaced there; a file that is read twice counts once
_notes: dict[str, None] = {}


def note(text: str) -> None:
    """Keep `text` for the end of the command, where it is said once."""
    _notes[text] = None


def take_notes() -> list[str]:
    """Return what the user should know of what was read, and forget it."""
    notes = list(_notes)
    if _replaced:
        first, count = next(iter(_replaced)), sum(_replaced.values())
        many = f"{count:,} lone surrogates (no characters, as in {first}) were" if count > 1 else None
        notes.append(f"{many or f'a lone surrogate (no character, in {first}) was'} read as U+FFFD.")
    _replaced.clear()
    _notes.clear()
    return notes


# --- files ------------------------------------------------------------------------------------------------------------


def open_file(path: Openable, kind: Kind = DataError) -> IO[bytes]:
    """Open a regular file for reading bytes; never waits, as opening a FIFO would.

    Raises:
        FileNotFoundError: there is none, for the caller to say what was wanted.
        LongextError: of `kind`: a directory, FIFO, device or socket, or no permission.
    """
    if not isinstance(path, Path):
        return path.open("rb")  # inside an archive
    try:
        _require_regular(path, path.stat().st_mode, kind)
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise kind(f"Cannot read {path}: {error.strerror}.") from error
    _require_regular(path, os.fstat(file.fileno()).st_mode, kind)
    return file


def _require_regular(path: Path, mode: int, kind: Kind) -> None:
    if not stat.S_ISREG(mode):
        raise kind(f"{path} is {file_kind(mode)}, not a file. Give a regular file.")


def file_kind(mode: int) -> str:
    """Return what a mode of `stat` is, with an article."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_directory(directory: Path, kind: Kind = CheckpointError) -> None:
    """Refuse a directory that holds a FIFO, device or socket: a library that opened it would hang.

    Raises:
        LongextError: of `kind`; names the first of them.
    """
    for entry in sorted(directory.iterdir()):
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a broken link: whoever needs it says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise kind(f"{entry} is {file_kind(mode)}, not a file. Put the file itself there, or remove it.")


def read_bytes(path: Openable, kind: Kind = DataError, limit: int | None = METADATA_LIMIT) -> bytes:
    """Return what a regular file holds, a byte order mark of UTF-8 left out.

    Args:
        limit: the most bytes it may have; None for data.

    Raises:
        FileNotFoundError, LongextError: as `open_file`; or it is larger than `limit`.
    """
    with open_file(path, kind) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise kind(f"{path} has more than {limit:,} bytes, which no file of its kind needs. Give the right file.")
    return content.removeprefix(codecs.BOM_UTF8)


def read_text(path: Openable, kind: Kind = DataError, limit: int | None = None) -> str:
    """Return the text of a UTF-8 file: line ends as they are, no byte order mark.

    Raises:
        FileNotFoundError, LongextError: as `read_bytes`; or it is not UTF-8 (names line and byte).
    """
    return decode(read_bytes(path, kind, limit), str(path), kind)


def decode(content: bytes, where: str, kind: Kind = DataError) -> str:
    """Return UTF-8 text (LongextError of `kind`, with the byte and of several lines the line, if it is none)."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f", line {line}" if b"\n" in content[:-1] else ""
        raise kind(f"{where}{place} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def spelled(text: str) -> str:
    """Return text with names that are not UTF-8 as it can be written: stray bytes as escapes, which JSON reads too."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- JSON -------------------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """What is refused here though a parser would take it."""


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _Refused(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"the number {digits[:40]} is too large")
    return value


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is no JSON")


def tagged_infinity(name: str) -> Any:
    """Return a literal Infinity as transformers spells it, which is JSON; NaN is refused."""
    return {_FLOAT_TAG: name} if name != "NaN" else _no_constant(name)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is there twice")
    return value


def parse_json(
    text: str,
    where: str,
    kind: Kind = DataError,
    *,
    want: type[dict[str, Any]] | type[list[Any]] | None = None,
    constant: Callable[[str], Any] = _no_constant,
    keep_surrogates: bool = False,
    advice: str = "",
) -> Any:
    """Return the value of a JSON text.

    Args:
        where: its place as an error names it.
        want: the type it must have (dict, list); None for any.
        constant: what NaN, Infinity and -Infinity become; they are no JSON and refused unless this says otherwise.
        keep_surrogates: leave lone surrogates in (names of files of ours); else they become U+FFFD and are counted.
        advice: what to do about a broken text, a sentence.

    Raises:
        LongextError: of `kind`: not JSON, too deep, a number of absurd length, a key twice, another type.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=constant, parse_int=_whole, parse_float=_real
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"nested more than {MAX_DEPTH} deep"
        if re.search(r"(:|, line )\d+$", where):  # one line of a file
            reason = re.sub(r"( at)?: line 1 column", " at column", reason)
        raise kind(f"{where} is not valid JSON ({reason}). {advice}".rstrip()) from error
    if want is not None and type(value) is not want:
        expected = {dict: "a JSON object", list: "a JSON list"}[want]
        raise kind(f"{where} must hold {expected}, found {type_name(value)}. {advice}".rstrip())
    if not keep_surrogates and _SURROGATE_ESCAPE.search(text):
        value = _without_surrogates(value, where)
    return value


def type_name(value: Any) -> str:
    """Return what JSON calls the type of a value, with an article."""
    return _SPELLED.get(type(value), type(value).__name__)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise _Refused(f"nested more than {MAX_DEPTH} deep")
        inner = [container for container in level if isinstance(container, (dict, list)) and container]
        level = [
            item for container in inner for item in (container.values() if isinstance(container, dict) else container)
        ]


def _without_surrogates(value: Any, where: str) -> Any:
    count = 0

    def clean(part: Any) -> Any:
        nonlocal count
        if isinstance(part, str):
            text, number = _SURROGATE.subn("\ufffd", part)
            count += number
            return text
        if isinstance(part, list):
            return [clean(item) for item in part]
        return {clean(key): clean(item) for key, item in part.items()} if isinstance(part, dict) else part

    cleaned = clean(value)
    if count:
        _replaced[where] = count
    return cleaned


def read_json(path: Path, kind: Kind = DataError, **options: Any) -> Any:
    """Return the value in a JSON file; `options` as `parse_json`, and `limit` of `read_bytes`.

    Raises:
        FileNotFoundError, LongextError: as `read_text` and `parse_json`; the message names the file.
    """
    limit = options.pop("limit", METADATA_LIMIT)
    return parse_json(read_text(path, kind, limit), str(path), kind, **options)


def numbered_lines(path: Openable, kind: Kind = DataError, form: str = "{}:{}") -> Iterator[tuple[str, str]]:
    """Yield (place, line) of every line that is not blank; one line is in memory at a time.

    Args:
        form: how a place is spelled, of file and line number.

    Raises:
        LongextError: of `kind`: the file cannot be read, or a line is not UTF-8.
    """
    try:
        file = open_file(path, kind)
    except OSError as error:
        raise kind(f"Cannot read {path}: {error.strerror}.") from error
    with file:
        for number, line in enumerate(file, 1):
            where = form.format(path, number)
            text = decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where, kind)
            del line  # it may be large
            if text and not text.isspace():
                yield where, text


def json_lines(
    path: Openable, kind: Kind = DataError, form: str = "{}:{}", **options: Any
) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every line of JSON that is not blank; `options` as `parse_json`.

    Raises:
        LongextError: as `numbered_lines`; or a line is not JSON.
    """
    for where, line in numbered_lines(path, kind, form):
        yield where, parse_json(line.rstrip("\r\n"), where, kind, **options)


def fields(
    value: Any, where: str, expected: Mapping[str, Any], kind: Kind = DataError, advice: str = ""
) -> dict[str, Any]:
    """Return the fields of an object after checking their types.

    Args:
        expected: name -> type, or a tuple of types. None among them: the field may be null or missing. A whole number
            is a number (float), true and false are none.

    Raises:
        LongextError: of `kind`: no object, a field is missing or of another type.
    """
    if not isinstance(value, dict):
        raise kind(f"{where} must be an object, found {type_name(value)}. {advice}".rstrip())
    checked = {}
    for name, options in expected.items():
        allowed = options if isinstance(options, tuple) else (options,)
        if name not in value and None not in allowed:
            raise kind(f"{where} has no `{name}`. {advice}".rstrip())
        item = value.get(name)
        if not any(is_a(item, one) for one in allowed):
            spelled = " or ".join(_SPELLED[one] for one in allowed)
            raise kind(f"{where}: `{name}` must be {spelled}, found {shown(item)}. {advice}".rstrip())
        checked[name] = item
    return checked


def is_a(value: Any, expected: type | None) -> bool:
    """Return True for a value of the JSON type `expected` (None: null); a whole number is a number, a bool is none."""
    if expected is None:
        return value is None
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float)) if expected is float else isinstance(value, expected)


def shown(value: Any) -> str:
    """Return a value as a message shows it: short."""
    if isinstance(value, (dict, list)):
        return type_name(value)
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def build(cls: type[BuiltT], value: Any, where: str, kind: Kind = DataError, advice: str = "") -> BuiltT:
    """Return the dataclass that JSON made `value` from (lists become tuples again), its types checked.

    Fields with a default may be missing.

    Raises:
        LongextError: of `kind`: no object, an unknown or missing key, a value of another type.
    """
    hints, declared = typing.get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    keys = set(value) if isinstance(value, dict) else set()
    for name in sorted(keys - set(hints)):
        raise kind(f"{where} has the unknown key `{name}`. {advice}".rstrip())
    present = keys | {field.name for field in declared if field.default is dataclasses.MISSING}
    values = fields(value, where, {name: _json_types(hints[name]) for name in hints if name in present}, kind, advice)
    for name, item in values.items():
        if isinstance(item, (list, tuple)):
            (inner,) = set(_tuple_items(hints[name]))
            if not all(is_a(part, inner) for part in item):
                raise kind(f"{where}: `{name}` must be a list of {inner.__name__} values. {advice}".rstrip())
            values[name] = tuple(item)
    return cls(**values)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _json_types(hint: Any) -> tuple[type | None, ...]:
    """Return the types that JSON may have for a field's type."""
    names = {type(None): None}
    return tuple(list if typing.get_origin(option) is tuple else names.get(option, option) for option in _options(hint))


def _tuple_items(hint: Any) -> list[Any]:
    return [typing.get_args(option)[0] for option in _options(hint) if typing.get_origin(option) is tuple]


# --- YAML -------------------------------------------------------------------------------------------------------------


class _PlainLoader(yaml.SafeLoader):
    """YAML in which only what is written as Python writes a number is one, and no date is.

    `2020-01-02`, `0123456` (else octal), `1:30` (else 90) and `1.10` are text, as a commit or tag is.
    """


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":int", ":float"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (("int", r"-?(0|[1-9]\d*)$"), ("float", r"-?(0|[1-9]\d*)\.(0|\d*[1-9])$")):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-0123456789"))


def parse_yaml(text: str, where: str, kind: Kind = ConfigError) -> Any:
    """Return the value of a YAML text: plain mappings, lists and scalars.

    Raises:
        LongextError: of `kind`: not YAML, too deep, aliases or tags, a key twice or a key that is no text; names the
            line.
    """
    try:
        _check_events(text)
        loader = _PlainLoader(text)
        try:
            node = loader.get_single_node()
            _check_keys(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise kind(f"{where}{line} is not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise kind(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error


def _check_events(text: str) -> None:
    """Refuse what would cost time or memory to build, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=_PlainLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        trouble = None
        if depth > _YAML_DEPTH:
            trouble = f"nested more than {_YAML_DEPTH} deep"
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            trouble = "anchors and aliases (& and *) are not read here, write the value out"
        elif tag := getattr(event, "tag", None):
            trouble = f"the tag {tag} is not read here, write the plain value"
        elif isinstance(event, yaml.ScalarEvent) and event.style is None and len(event.value) > 4000:
            trouble = f"a value of {len(event.value):,} characters without quotes"
        if trouble:
            raise yaml.MarkedYAMLError(problem=trouble, problem_mark=event.start_mark)  # type: ignore[arg-type]


def _check_keys(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        names: set[Hashable] = set()
        for key, item in node.value:
            trouble = None
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                trouble = (
                    f"the key {key.value if isinstance(key.value, str) else '?'} must be text, the name of a setting"
                )
            elif key.value in names:
                trouble = f"the key '{key.value}' is there twice"
            if trouble:
                raise yaml.MarkedYAMLError(problem=trouble, problem_mark=key.start_mark)
            names.add(key.value)
            _check_keys(item)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item)


def read_yaml(path: Path, kind: Kind = ConfigError) -> Any:
    """Return the value in a YAML file.

    Raises:
        FileNotFoundError, LongextError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, kind, RECIPE_LIMIT), str(path), kind)


# --- patterns ---------------------------------------------------------------------------------------------------------

_PATTERN_SECONDS = 2.0
_MATCHER = """
import json, re, sys
request = json.load(sys.stdin)
for key, pattern in request["patterns"]:
    print(key, flush=True)
    for name in request["names"]:
        re.match(pattern, name)
        re.fullmatch(pattern, name)
"""


def check_patterns(
    patterns: Iterable[tuple[str, str]], names: Iterable[str], where: str, kind: Kind = CheckpointError
) -> None:
    """Refuse regular expressions that are none, or that take too long on the names they are for.

    Python's `re` may backtrack for ever, so the names are matched in a process of their own that can be ended.

    Args:
        patterns: (what a message calls it, the expression).
        names: what they will be matched with.

    Raises:
        LongextError: of `kind`.
    """
    patterns = list(patterns)
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise kind(f"{where}: `{key}` is no regular expression ({error}): {shown(pattern)}.") from error
    risky = [(key, pattern) for key, pattern in patterns if re.search(r"[*+{]", pattern)]
    if not risky:
        return
    request = json.dumps({"patterns": risky, "names": list(names)})
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    try:
        subprocess.run(command, input=request.encode(), capture_output=True, timeout=_PATTERN_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        key = (error.stdout or b"?").decode().split("\n")[-2:][0] or risky[0][0]
        raise kind(
            f"{where}: `{key}` takes more than {_PATTERN_SECONDS:g} s to match the model's names: "
            f"{shown(dict(risky).get(key, ''))}. Write it without nested repetition, or as a list of names."
        ) from error
