"""What reaches the terminal, and how a command ends.

Names and metadata come from files that somebody else has written: no character of theirs may move the cursor, change
the title or begin a line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import click

from ..errors import printable

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143


def one_line(text: object) -> str:
    """The words of a message, as `printable` text."""
    return printable(" ".join(str(text).split()))


def echo(*lines: object, err: bool = False) -> None:
    """Prints lines, each made `printable`; characters that the stream's encoding lacks are escaped too.

    Raises OSError that names the standard output where it takes no more; BrokenPipeError as it is.
    """
    text = "\n".join(map(printable, lines))
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_output()
        raise OSError(error.errno, error.strerror, "standard output") from error


def give_up_output() -> None:
    """Python writes what is left in the buffer of the standard output when it ends, and would complain again."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises Terminated within, so that files are left as `replacing` promises. The second one is ignored."""
    here = threading.current_thread() is threading.main_thread()  # Python gives signals to the main thread alone
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
