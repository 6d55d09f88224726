"""A folder for one process at a time: a second run into the output of a living one is refused.

The lock is the system's (`fcntl`), so it ends with the process that holds it, killed or not, on this machine and, where the file
server keeps locks, from another one. The file `.lock` says who holds it. Where locks cannot be had, the file alone decides: a
process of this machine is looked for, one of another machine is taken to be alive, and the message says which file to remove.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_REFUSED = {errno.EACCES, errno.EAGAIN}
_own: dict[str, tuple[int, int, int]] = {}  # path of the lock -> (process, thread, blocks); the system's lock does not tell threads apart
_own_lock = threading.Lock()


@contextlib.contextmanager
def locked(folder: str | os.PathLike, doing: str) -> Iterator[None]:
    """Within the block the folder is this thread's; a block within a block of the same thread is free.

    The folder is made where it is not there, and goes again where nothing was written into it.

    Args:
        doing: what the message of a refused second run calls this one, such as "a training run".

    Raises:
        ValueError: another process or thread holds the folder, or it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    path = folder / LOCK
    me = (os.getpid(), threading.get_ident())
    with _own_lock:
        held = _own.get(str(path))
        if held is not None and held[0] == me[0]:
            if held[1] != me[1]:
                raise ValueError(f"{folder} is in use by another thread of this process; wait for it, or choose another folder")
            _own[str(path)] = (*me, held[2] + 1)
            nested = True
        else:
            _own[str(path)] = (*me, 1)
            nested = False
    made, descriptor = [], None
    try:
        if not nested:
            made = _make(folder)
            descriptor = _acquire(path, doing)
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)
        with _own_lock:
            blocks = _own[str(path)][2] - 1
            if blocks:
                _own[str(path)] = (*me, blocks)
            else:
                del _own[str(path)]
        for empty in made:
            with contextlib.suppress(OSError):  # something was written into it
                empty.rmdir()


def _make(folder: Path) -> list[Path]:
    """Makes the folder; what of its path was not there, innermost first."""
    try:
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {str(folder)[:200]}: cannot be made ({error.strerror}); choose a folder that can be written") from error
    return made


def _acquire(path: Path, doing: str) -> int:
    """The descriptor that holds the lock."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"{path.parent}: cannot be written ({error.strerror}); choose a folder that can be") from error
        try:
            refused = _refusal(path, descriptor)
            if refused:
                raise ValueError(refused)
            if not _is_still(path, descriptor):  # its holder has ended and removed it meanwhile
                os.close(descriptor)
                continue
            about = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "doing": doing}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _refusal(path: Path, descriptor: int) -> str | None:
    """None where the system, or where it has no locks the file's content, gives the lock to this process; else what to tell."""
    about = _holder(descriptor)
    who = f": {about['doing']}, process {about['process']} on {about['host']} since {about['since']}" if len(about) == 4 else ""
    told = f"{path.parent} is in use{who}; wait for it to end or choose another folder"
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if error.errno in _REFUSED:
                return told
    if not about or (about.get("host") == socket.gethostname() and not _is_alive(about.get("process"))):
        return None
    return f"{told} (if it is gone, remove {path})"


def _is_alive(process: object) -> bool:
    if not isinstance(process, int) or not os.path.isdir("/proc/self"):
        return True
    return os.path.isdir(f"/proc/{process}") and process != os.getpid()


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
