"""Files are written whole: under another name first, which takes the file's place when all of it is there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import ArgumentError

if sys.platform != "win32":
    import fcntl

PathLike = str | os.PathLike[str]

_UNFINISHED = re.compile(r"\.tarflow-[0-9a-f]{16}(\.[^.]+)?")
_OS_ERROR = re.compile(r"(?:\(os error |\bcode: )(\d+)")  # errno in the messages of Rust's libraries


def check_path(argument: str, path: PathLike, suffixes: Sequence[str] = ()) -> Path:
    """Returns `path` as a file that can be written.

    It has one of the suffixes, if any are given, and is in an existing folder, not itself a folder. Raises
    ArgumentError that names the argument.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise ArgumentError(argument, "a path", type(path).__name__)
    out, text = Path(path), repr(os.fspath(path))
    if suffixes and out.suffix.lower() not in suffixes:
        raise ArgumentError(argument, "a file name ending in " + " or ".join(suffixes), text)
    try:
        mode = os.stat(out).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:  # a NUL in the name raises ValueError
        raise ArgumentError(argument, "a file name", f"{text} ({getattr(error, 'strerror', None) or error})") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise ArgumentError(argument, "a file", f"the folder {text}")
    if not out.parent.is_dir():
        raise ArgumentError(argument, "a file in an existing folder", text)
    special = mode is not None and not stat.S_ISREG(mode)
    if not os.access(out if special else out.parent, os.W_OK) or (mode is not None and not os.access(out, os.W_OK)):
        raise ArgumentError(argument, "a place that can be written to", text)
    return out


@contextlib.contextmanager
def replacing(path: PathLike, *, durable: bool = False, sweep: bool = True) -> Iterator[Path]:
    """Yield the name of a new, empty file of the same suffix, which takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was and nothing is left beside it. What a killed process left in the folder
    is removed by the next one that writes there. A link at `path` is replaced, not followed; the mode of a file that
    was there is kept. A device or a pipe is written to directly.

    durable: whether to wait until the disk has the file. sweep: whether to look for what killed processes have left,
    which takes a while in a folder of very many files. Raises OSError that names `path` where the system refuses (no
    space, no permission).
    """
    path = Path(path)
    try:
        old = os.lstat(path)
        special = not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        old, special = None, False
    if special:
        try:
            yield path
        except OSError as error:
            raise (_about(path, error) if error.filename is None else error) from error
        return
    if sweep:
        remove_unfinished(path.parent)
    try:
        descriptor, partial = _create(path)
    except OSError as error:
        raise _about(path, error) from error
    try:
        try:
            yield partial
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(partial, stat.S_IMODE(old.st_mode) if old and stat.S_ISREG(old.st_mode) else 0o666 & ~umask)
            if durable:
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
            if sys.platform != "win32":  # locked until it has its name, so that nobody takes it for a dead process's
                os.replace(partial, path)
        finally:
            os.close(descriptor)  # which also gives up its lock
        if sys.platform == "win32":  # where a file that is open cannot be renamed
            os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and (error.filename is None or Path(os.fsdecode(error.filename)) == partial):
            raise _about(path, error) from error
        if isinstance(error, Exception) and (match := _OS_ERROR.search(str(error))):
            raise _about(path, OSError(int(match[1]), os.strerror(int(match[1])))) from error
        raise
    if durable and sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _about(path: Path, error: OSError) -> OSError:
    """Returns this error as one that names `path`."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))


def _create(path: Path) -> tuple[int, Path]:
    """Returns the descriptor and the name of a new file beside `path` that is locked while this process lives."""
    while True:
        partial = path.with_name(f".tarflow-{secrets.token_hex(8)}{path.suffix}")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if sys.platform == "win32":
            return descriptor, partial
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another process took it for a dead one's before it was locked
            return descriptor, partial
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that are no more have left unfinished in a folder."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _UNFINISHED.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_dead(entry.path)


def _remove_if_dead(name: str) -> None:
    """Remove an unfinished file unless its writer is alive. Raises OSError where it cannot be removed."""
    if sys.platform == "win32":  # Windows does not remove a file that is open
        os.unlink(name)
        return
    descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its writer lives
        os.unlink(name)
    finally:
        os.close(descriptor)
