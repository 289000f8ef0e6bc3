"""The errors and warnings that this package raises on purpose.

The message of an error names the argument or the file, and says what was expected and what came.
"""

from __future__ import annotations

import signal


def printable(text: object) -> str:
    """Returns text of a foreign file or library without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def first_line(error: BaseException) -> str:
    """Returns the first line of a foreign library's error, or the error's type where it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def shown(text: object, most: int = 80) -> str:
    """Returns text from a file for a message: as it is where that can do no harm, else quoted; cut where it is long."""
    text = str(text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text if text.isprintable() and text.strip() == text and text else repr(text)


def some(names: list[str], most: int = 3) -> str:
    """Returns the first names for a message, with "…" where there are more."""
    return ", ".join(map(shown, names[:most])) + (", …" if len(names) > most else "")


def _in_a_line(value: object, most: int = 200) -> str:
    """Returns the text of a value.

    If it has several lines, as a tensor has, they are joined and cut to `most` characters.
    """
    text = str(value)
    if "\n" not in text:
        return text
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


class TarFlowWarning(UserWarning):
    """A warning of something that was decided for the user, who may want it otherwise.

    The message is one line, which the command line shows as it is.
    """


class TarFlowError(Exception):
    """The base class of all errors that tarflow_fast raises on purpose."""


class ArgumentError(TarFlowError, ValueError):
    """An argument has the wrong type, shape, range or name.

    Attributes:
        argument: The name of the argument.
        expected: A description of what was expected.
        got: The value that came, or a description of it.
    """

    def __init__(self, argument: str, expected: str, got: object):
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(f"{argument}: expected {expected}, got {_in_a_line(got)}")


class CheckpointError(TarFlowError, ValueError):
    """A file is not a checkpoint that can be loaded whole, and the message says why."""


class DataError(TarFlowError, ValueError):
    """A file does not hold the images or labels that were asked for."""


class TrainingDiverged(TarFlowError, ArithmeticError):
    """The loss or the gradient became infinite or NaN. The last checkpoint is from before that."""


class TrainingStopped(TarFlowError):
    """A signal ended a training run early, and its checkpoint is written.

    signal: the signal's number.
    """

    def __init__(self, number: int, step: int, steps: int):
        self.signal = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step} of {steps}; resume to go on")


class ProcessLost(TarFlowError, ConnectionError):
    """Another process of the same training run ended before its time, so that this one cannot go on."""


class BackendError(TarFlowError, RuntimeError):
    """A backend, device or dtype was asked for that cannot be had here. The message says why, and how to mend it."""


class DeviceFault(TarFlowError, RuntimeError):
    """An engine broke the context of its device, so that this process can compute nothing on that device any more.

    Attributes:
        backend: The name of the backend whose engine ran.
    """

    def __init__(self, backend: str, why: str, advice: str):
        self.backend = backend
        super().__init__(f"backend {backend!r} broke this process's use of the device ({why}); {advice}")


class OutOfMemoryError(TarFlowError, MemoryError):
    """The batch does not fit in memory, and the message says how many samples would."""


class NonFiniteError(TarFlowError, ArithmeticError):
    """Sampling produced an infinity or a NaN.

    Attributes:
        block: The index of the flow block.
        token: The index of the token, in the order in which that block processes them.
        sample: The number of the image.
    """

    def __init__(self, block: int, token: int, sample: int):
        self.block, self.token, self.sample = block, token, sample
        super().__init__(
            f"non-finite value in flow block {block}, token {token} (in the block's order), sample {sample}; "
            "lower the guidance, use a wider dtype, or pass on_nonfinite='redraw'"
        )


class ODEDiverged(TarFlowError, ArithmeticError):
    """The ODE of a continuous flow cannot be solved: its state is not finite, or it takes too many or too small steps.

    Attributes:
        time: The time that the solution had reached.
    """

    def __init__(self, time: float, why: str):
        self.time = time
        super().__init__(
            f"the ODE diverged at t = {time:.4g}: {why}; train with a lower learning rate, or solve it with another "
            "solver, more steps or a wider tolerance"
        )
