"""Files and folders that appear whole or not at all: written under another name, brought to disk, renamed.

A reader sees the old content or the new one, never half of it, also after a kill or a power cut. What an error or a kill left
behind ends in `.part` and is nobody's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PART = ".part"
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
_UNENCODABLE = "backslashreplace"  # half of a surrogate pair is written as JSON's own escape of it
AnyPath = str | os.PathLike  # what functions of this project take for a file or folder


def sync_to_disk(path: AnyPath) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, or anything; a rename stays atomic there. A full or failing disk is told.
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)


def sync_tree_to_disk(folder: AnyPath) -> None:
    """`sync_to_disk` for every file in a folder and below it."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_to_disk(os.path.join(root, name))


def give_mode(path: AnyPath, mode: int) -> None:
    """Gives a file these permissions where it has others: libraries that write a temporary file leave it readable by its owner alone."""
    if os.stat(path).st_mode != mode:
        os.chmod(path, mode & 0o7777)


def give_umask_mode(folder: AnyPath) -> None:
    """`give_mode` for every file in a folder and below it: what a new file has there, by the umask and the folder's own rules."""
    probe = _part_of(Path(folder) / "mode")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for root, _, names in os.walk(folder):
        for name in names:
            give_mode(os.path.join(root, name), mode)


# What a disk or its permissions refuse, as against a mistake in a program.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}
_OF_SAFETENSORS = re.compile(r"os error (\d+)")
_OF_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container|iostream error|unexpected pos")  # what torch.save says of any of them


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Around what writes to `path` by whatever library: a full or unwritable disk becomes an OSError that names `path`.

    safetensors and torch.save raise errors of their own for it.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        named = getattr(error, "filename", None)
        raise OSError(number, os.strerror(number), os.fspath(path if named is None else named)) from error


def _disk_error(error: Exception) -> int | None:
    """The system's number of a disk's refusal, as far as an error tells it; None for other errors."""
    if isinstance(error, OSError):
        return error.errno if error.errno in DISK_ERRORS else None
    if type(error).__name__ == "SafetensorError" and (found := _OF_SAFETENSORS.search(str(error))):
        return int(found[1]) if int(found[1]) in DISK_ERRORS else None
    return errno.ENOSPC if isinstance(error, RuntimeError) and _OF_TORCH.search(str(error)) else None


def disk_message(error: OSError) -> str:
    """One line on a file that could not be written or read: which, why, and what is free on its disk."""
    where = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
    message = f"{where}{': ' if where else ''}{error.strerror}"
    folder = Path(where).absolute()
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not where:
        return message
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**20
    return f"{message} (the disk of {folder} has {free:,.0f} MiB free); make room, then the same command goes on"


@contextlib.contextmanager
def replacing(path: AnyPath, *, durable: bool = True, make_parents: bool = True) -> Iterator[Path]:
    """Gives a path to write to, which takes the name `path` when the block ends; an error in the block leaves `path` as it was.

    Args:
        durable: on disk before it takes the name, which takes a disk milliseconds. False is for what a second run makes again from
            what is kept: unpacked frames, scores of stored embeddings.
        make_parents: make the folder of `path` where it is not there.
    """
    path = Path(path)
    if make_parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    try:
        with writing(path):
            part.touch()
            mode = part.stat().st_mode
            yield part
            give_mode(part, mode)
            if durable:
                sync_to_disk(part)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync_to_disk(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: AnyPath, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the name `folder` when the block ends; an error leaves `folder` as it was.

    Args:
        durable: as for `replacing`.
        shared: several processes may make the same folder: each writes its own, and the first one to be whole stays. Otherwise
            what an interrupted process left is removed, and a `folder` that is there is replaced.

    Raises:
        ValueError: no folder can be made there.
    """
    folder = Path(folder)
    part = _part_of(folder) if shared else folder.with_name(folder.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror}); choose a folder that can be written") from error
    try:
        with writing(folder):
            yield part
            give_umask_mode(part)
            if durable:
                sync_tree_to_disk(part)
        if shared:
            try:
                os.replace(part, folder)
            except OSError:
                if not folder.is_dir():
                    raise
        else:
            _replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if durable:
        sync_to_disk(folder.parent)


@contextlib.contextmanager
def filling_folder(folder: AnyPath) -> Iterator[Path]:
    """Gives an empty folder whose files go into `folder` when the block ends, each whole; other files there stay.

    A kill before the end of the block leaves `folder` as it was; one while the files are moved, some old and some new.
    """
    folder = Path(os.path.abspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix=".saving-", dir=folder.parent)
    try:
        with writing(folder):
            yield Path(work)
            give_umask_mode(work)
            sync_tree_to_disk(work)
            for root, _, names in os.walk(work):
                target = folder / os.path.relpath(root, work)
                target.mkdir(parents=True, exist_ok=True)
                for name in names:
                    os.replace(os.path.join(root, name), target / name)
                sync_to_disk(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_bytes(path: AnyPath, content: bytes, *, durable: bool = True) -> None:
    """A file of these bytes; see `replacing`."""
    with replacing(path, durable=durable) as part:
        part.write_bytes(content)


def write_text(path: AnyPath, text: str, *, durable: bool = True, make_parents: bool = True) -> None:
    """A UTF-8 file of this text; see `replacing`."""
    with replacing(path, durable=durable, make_parents=make_parents) as part:
        part.write_text(text, encoding="utf-8", errors=_UNENCODABLE)


def write_lines(path: AnyPath, lines: Iterable[str], *, durable: bool = True) -> None:
    """A UTF-8 file of these lines, which are written as they come; see `replacing`."""
    with replacing(path, durable=durable) as part, open(part, "w", encoding="utf-8", errors=_UNENCODABLE) as file:
        for line in lines:
            file.write(line + "\n")


def write_json(path: AnyPath, content: Any, *, durable: bool = True, **options: Any) -> None:
    """A UTF-8 file of `content` as indented JSON with a newline at its end; `options` go to `json.dumps`. See `replacing`."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, **options) + "\n", durable=durable)


def write_table(path: AnyPath, table: Any, *, durable: bool = True) -> None:
    """A zstd-compressed parquet file of a `pyarrow.Table`; see `replacing`."""
    import pyarrow.parquet as pq

    with replacing(path, durable=durable) as part:
        pq.write_table(table, part, compression="zstd")


def _part_of(path: Path) -> Path:
    """The name to write under, in the same folder; processes and threads of all machines have their own."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}{PART}")


def _replace_folder(part: Path, folder: Path) -> None:
    """A folder that is there goes only after the new one is in its place."""
    old = folder.with_name(f"{folder.name}.old{PART}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
