"""JSON and YAML that people write or libraries left: read within limits, with errors that name the file and stay short."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from typing import Any

MOST_VALUES = 200_000  # of a YAML document with its aliases written out
_reprs = reprlib.Repr()
_reprs.maxlevel, _reprs.maxlist, _reprs.maxdict, _reprs.maxtuple, _reprs.maxstring, _reprs.maxother, _reprs.maxlong = 2, 4, 4, 4, 60, 60, 40
MOST_SHOWN = 120
DEEPEST = 500  # brackets of a line that are not counted


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut where it is long or deep."""
    text = _reprs.repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "an integer of many digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def kind(value: Any) -> str:
    """The JSON name of a value's type, with a short value behind it."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    name = names.get(type(value), "a number")
    return f"{name} {shown(value)}" if isinstance(value, (str, int, float)) and not isinstance(value, bool) else name


def require_regular(path: str | os.PathLike) -> None:
    """ValueError for what is no file: a pipe or a device would be waited for, or read without end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise ValueError(f"{os.fspath(path)[:250]}: {getattr(e, 'strerror', None) or e}") from e
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected a file")


def read_text(path: str | os.PathLike) -> str:
    """A file's text, without a mark of byte order. ValueError for no regular file, one that may not be read, or bytes that are no UTF-8."""
    require_regular(path)
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e


def parse_json(text: str, where: str, what: str = ": not JSON") -> Any:
    """A JSON value. ValueError begins with `where` for what is not JSON or nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep to be read") from None
    except ValueError as e:
        raise ValueError(f"{where}{what} ({str(e)[:200]})") from e


def read_object(path: str | os.PathLike) -> dict:
    """The JSON object of a file.

    Raises:
        ValueError: no regular file, not UTF-8, not JSON, nested without end, or a list, text or number; names the file.
    """
    found = parse_json(read_text(path), str(path), " is not valid JSON")
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object, got {kind(found)}; copy it again")
    return found


def require_rows(path: str | os.PathLike, *, lists: bool = False) -> None:
    """ValueError for a file of JSON lines with a line that is no object, or nested without end: readers of tables end the process on
    some of them. With `lists` a file of one JSON list is left to the reader."""
    require_regular(path)
    with open(path, "rb") as f:
        is_list = None
        for number, line in enumerate(f, 1):
            line = line.strip().removeprefix(b"\xef\xbb\xbf")
            if not line:
                continue
            if is_list is None and line[:1] == b"[":
                is_list = lists and not line.endswith(b"]")
            if is_list:
                return
            is_list = False
            where = f"{path}, line {number}"
            if line.count(b"[") + line.count(b"{") > DEEPEST:
                parse_json(line.decode(errors="replace"), where)
            if line[:1] != b"{" and (line[:1] in b'["-0123456789' or line in (b"null", b"true", b"false")):
                text = line[:40].decode(errors="replace")
                raise ValueError(f"{where}: expected a JSON object, a row of the table, got {text}; mend or remove the line")


def parse_yaml(text: str, where: str) -> Any:
    """A YAML value of plain data.

    Raises:
        ValueError: begins with `where`: not YAML, tags of objects, a value in itself, or aliases that stand for more than `MOST_VALUES`.
    """
    import yaml

    try:
        found = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep to be read") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as e:  # ValueError: a date that is none, a number of too many digits
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(e).split())[:200]})") from e
    _count(found, {}, where)
    return found


def read_yaml(path: str | os.PathLike, what: str = "") -> Any:
    """`parse_yaml` of a file; `what` it is, such as "recipe", stands before its name in messages."""
    return parse_yaml(read_text(path), f"{what} {path}".strip())


def _count(value: Any, known: dict[int, int], where: str) -> int:
    """Values of a document, aliases written out; 0 stands for one whose inside is being counted."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in known:
        if not known[id(value)]:
            raise ValueError(f"{where}: an anchor stands inside of itself")
        return known[id(value)]
    known[id(value)] = 0
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    try:
        total = 1 + sum(_count(entry, known, where) for entry in inside)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep to be read") from None
    if total > MOST_VALUES:
        raise ValueError(f"{where}: its anchors stand for more than {MOST_VALUES:,} values; write what is meant")
    known[id(value)] = total
    return total
