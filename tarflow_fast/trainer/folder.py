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

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".tarflow.lock"
_OWNER = re.compile(r"process \d+ on [\w.-]+")
_OWNER_BYTES = 300
_LOCKED_BYTE = 1 << 20  # Windows lets nobody read what is locked: this lies beyond the owner's name
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_held: set[int] = set()


def _close_in_child() -> None:
    """Closes the lock in a forked process, which shares it and would keep it when its owner is dead."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


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
        descriptor, left = _acquire(folder)
        owner = os.getpid()
        try:
            yield left
        finally:
            if os.getpid() == owner:
                _release(folder, descriptor)
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


def _acquire(folder: Path) -> tuple[int, bool]:
    """Returns (descriptor of the locked file, whether the file was there)."""
    path = folder / LOCK
    while True:
        left = os.path.lexists(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise _refusal(folder, error) from error
        _held.add(descriptor)
        try:
            if not _lock(descriptor):
                raise ArgumentError(
                    "out", "a folder in which no other trainer runs", f"{str(folder)!r}, where {_owner(path)} trains"
                )
        except OSError as error:
            message = f"{folder}: {error.strerror} for a lock: see to it that no other trainer writes there"
            print(message, file=sys.stderr)
        except BaseException:
            _close(descriptor)
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # if not, its owner has removed it meanwhile
                break
        _close(descriptor)
    with contextlib.suppress(OSError):  # this is for the text of a refusal; a full disk is told by what matters
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor, left


def _lock(descriptor: int) -> bool:
    """Returns whether this process has the lock now. Raises OSError where there are no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        match = _OWNER.match(file.read(_OWNER_BYTES).decode(errors="replace"))
        if match:
            return match[0]
    return "another process"


def _release(folder: Path, descriptor: int) -> None:
    """Removes the lock file, then the lock; on Windows in the other order, as a file that is open cannot be removed."""
    if sys.platform == "win32":
        _close(descriptor)
    with contextlib.suppress(OSError):
        os.unlink(folder / LOCK)
    if sys.platform != "win32":
        _close(descriptor)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)
