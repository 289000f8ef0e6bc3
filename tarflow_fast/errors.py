"""Every error that this package raises on purpose. Each message names the argument, what was expected, what came."""

from __future__ import annotations

import signal


def printable(text: object) -> str:
    """Text of a foreign file or library, without what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def first_line(error: BaseException) -> str:
    """What a foreign library's error says, in one line; its type where it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def _in_a_line(value: object, most: int = 200) -> str:
    """As it is, unless it has several lines, as a tensor has."""
    text = str(value)
    if "\n" not in text:
        return text
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


class TarFlowWarning(UserWarning):
    """Something was decided for the user who may want it otherwise; one line, which the command line shows as such."""


class TarFlowError(Exception):
    """Base of all errors raised by tarflow_fast."""


class ArgumentError(TarFlowError, ValueError):
    """An argument has the wrong type, shape, range or name."""

    def __init__(self, argument: str, expected: str, got: object):
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(f"{argument}: expected {expected}, got {_in_a_line(got)}")


class CheckpointError(TarFlowError, ValueError):
    """A file is not a checkpoint that can be loaded whole."""


class DataError(TarFlowError, ValueError):
    """A file does not hold the images or labels that were asked for."""


class TrainingDiverged(TarFlowError, ArithmeticError):
    """The loss or the gradient became infinite or NaN; the last checkpoint is from before that."""


class TrainingStopped(TarFlowError):
    """A signal ended a training run early; its checkpoint is written. signal: the signal's number."""

    def __init__(self, number: int, step: int, steps: int):
        self.signal = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step} of {steps}; resume to go on")


class ProcessLost(TarFlowError, ConnectionError):
    """Another process of the same training run ended before its time, so that this one cannot go on."""


class BackendError(TarFlowError, RuntimeError):
    """A backend, device or dtype was asked for that cannot be had here; the message says why and how to mend it."""


class OutOfMemoryError(TarFlowError, MemoryError):
    """The batch does not fit in memory; the message says how many samples would."""


class NonFiniteError(TarFlowError, ArithmeticError):
    """Sampling produced an infinity or a NaN.

    block: index of the flow block; token: index in that block's processing order; sample: image number.
    """

    def __init__(self, block: int, token: int, sample: int):
        self.block, self.token, self.sample = block, token, sample
        super().__init__(
            f"non-finite value in flow block {block}, token {token} (in the block's order), sample {sample}; "
            "lower the guidance, use a wider dtype, or pass on_nonfinite='redraw'"
        )
