"""Every error that this package raises on purpose. Each message names the argument, what was expected, what came."""

from __future__ import annotations


class TarFlowError(Exception):
    """Base of all errors raised by tarflow_fast."""


class ArgumentError(TarFlowError, ValueError):
    """An argument has the wrong type, shape, range or name."""

    def __init__(self, argument: str, expected: str, got: object):
        self.argument = argument
        super().__init__(f"{argument}: expected {expected}, got {got}")


class CheckpointError(TarFlowError, ValueError):
    """A file is not a checkpoint that can be loaded whole."""


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
            "lower the guidance, use a wider dtype, or pass on_nonfinite='redraw' to sample()"
        )
