"""The lock of a file keeps other processes out, and ends with the process that has it, however that ends."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCKED_BYTE = 1 << 20  # Windows lets nobody read what is locked: this lies beyond the file's text
_held: set[int] = set()


def _close_in_child() -> None:
    """Closes the locks in a forked process, which shares them and would keep them when their owner is dead."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@dataclass(frozen=True)
class Lock:
    """A `Lock` is held on a file, which is there as long as the lock is.

    Between machines it is as good as the network file system's; one that keeps locks to each machine cannot be told
    from others. path: the file. descriptor: that of the open file. left: whether the file was there before, left by a
    process that was killed. refused: the error of a file system that has no locks, where nobody is kept out; else None.
    """

    path: Path
    descriptor: int
    left: bool
    refused: OSError | None

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """Returns the lock of this file, which is made where it is not there, or None where another process has it.

        Raises OSError where the file cannot be made.
        """
        while True:
            left, refused = os.path.lexists(path), None
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            _held.add(descriptor)
            try:
                if not _lock(descriptor):
                    _close(descriptor)
                    return None
            except OSError as error:
                refused = error
            except BaseException:
                _close(descriptor)
                raise
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # if not, its owner has removed it meanwhile
                    return cls(path, descriptor, left, refused)
            _close(descriptor)

    def write(self, text: str) -> None:
        """Puts a short text into the file, for others to read; on a full disk it stays empty."""
        with contextlib.suppress(OSError):
            os.lseek(self.descriptor, 0, os.SEEK_SET)
            os.truncate(self.descriptor, 0)
            os.write(self.descriptor, text.encode())

    def release(self) -> None:
        """Removes the file, then the lock; on Windows in the other order, as a file that is open cannot be removed."""
        if sys.platform == "win32":
            _close(self.descriptor)
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        if sys.platform != "win32":
            _close(self.descriptor)


def _lock(descriptor: int) -> bool:
    """Returns whether this process has the lock now. Raises OSError where there are no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)
