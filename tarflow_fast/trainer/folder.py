"""The folder of a run has one trainer at a time, by a lock that dies with its owner."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArgumentError
from ..locks import Lock

LOCK = ".tarflow.lock"
_OWNER = re.compile(r"process \d+ on [\w.-]+")
_OWNER_BYTES = 300
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def locked(out: str) -> Iterator[bool]:
    """Makes the folder and keeps other trainers out of it, until the block ends or this process does, however it does.

    Gives whether a trainer was killed in the folder and has left its lock file. If the block raises, folders that were
    made for it and are empty go. Between machines the lock is as good as the network file system's: where that has
    none, a line on standard error says so; one that keeps locks to each machine cannot be told from others.
    Raises ArgumentError where another trainer runs in the folder, or `out` is no folder or cannot be written to.
    """
    folder = Path(out)
    made = _make(folder)
    try:
        lock = _acquire(folder)
        owner = os.getpid()
        try:
            yield lock.left
        finally:
            if os.getpid() == owner:
                lock.release()
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _make(folder: Path) -> list[Path]:
    """Makes a folder and those above it, and returns those that were not there, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArgumentError("out", "a folder", f"{str(folder)!r}, which is or lies below a file") from error
    except OSError as error:
        raise _refusal(folder, error) from error
    return missing


def _refusal(folder: Path, error: OSError) -> Exception:
    if error.errno in _READ_ONLY:
        return ArgumentError("out", "a folder that can be written to", repr(str(folder)))
    return OSError(error.errno, error.strerror, str(folder))


def _acquire(folder: Path) -> Lock:
    """Returns the lock of the folder."""
    path = folder / LOCK
    try:
        lock = Lock.take(path)
    except OSError as error:
        raise _refusal(folder, error) from error
    if lock is None:
        other = f"{str(folder)!r}, where {_owner(path)} trains"
        raise ArgumentError("out", "a folder in which no other trainer runs", other)
    if lock.refused is not None:
        message = f"{folder}: {lock.refused.strerror} for a lock: see to it that no other trainer writes there"
        print(message, file=sys.stderr)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")  # for the text of a refusal
    return lock


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        match = _OWNER.match(file.read(_OWNER_BYTES).decode(errors="replace"))
        if match:
            return match[0]
    return "another process"
