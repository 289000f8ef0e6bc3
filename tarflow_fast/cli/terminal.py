"""This file sees to what reaches the terminal, and to how a command ends.

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
from typing import Any, NoReturn

import click

from ..errors import printable

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143


def one_line(text: object) -> str:
    """Returns the words of a message on one line, as `printable` text."""
    return printable(" ".join(str(text).split()))


def echo(*lines: object, err: bool = False) -> None:
    """Prints lines, each made `printable`; characters that the stream's encoding lacks are escaped too.

    Raises an OSError that names the standard output where that takes no more; a BrokenPipeError passes as it is.
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
    """Puts another file in the place of the standard output: Python would write what is left in its buffer at the end,
    and complain again."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Interrupted(BaseException):
    """`Interrupted` is raised by Ctrl-C.

    It is no KeyboardInterrupt: where that passes through exec(), as in many an import, Python kills itself at the end,
    whatever the exit code; and click makes an exit code of its own of it, wherever it finds it.
    """


class Terminated(BaseException):
    """`Terminated` is raised by SIGTERM."""


_stops: list[BaseException] = []  # those that signals have raised


def lost_stop(error: BaseException) -> BaseException | None:
    """Returns the stop that somebody else's code took for a failure of its own, so that `error` came of it, or None.

    What fails while a stop is on its way has it in its context: that failure is to be told.
    """
    of: BaseException | None = error
    while of is not None:
        if of in _stops:
            return None
        of = of.__cause__ or of.__context__
    return _stops[-1] if _stops else None


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM raise Interrupted and Terminated in the block, so that files are left as `replacing`
    promises. A second SIGTERM is ignored; signals that somebody else handles are left alone."""
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one alone
        yield
        return

    def stop_by(stop: BaseException) -> NoReturn:
        _stops.append(stop)
        raise stop

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop_by(Interrupted())

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        stop_by(Terminated())

    _stops.clear()
    ours: dict[int, Any] = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ours[signal.SIGINT] = interrupt
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        ours[signal.SIGTERM] = terminate
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
