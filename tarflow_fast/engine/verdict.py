"""The verdict on a backend: whether its engines may serve on this device, and how quick they are there.

`probe/` gives verdicts, and `autotune.py` goes by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol


class Size(NamedTuple):
    """The size of a batch: its number of samples, and whether they are guided."""

    batch: int
    guided: bool

    def __str__(self) -> str:
        return f"batch {self.batch}, guided" if self.guided else f"batch {self.batch}"

    @property
    def bucket(self) -> Size:
        """Returns the largest size that shares a verdict with this one: batches between two powers of two have one."""
        return Size(1 << (self.batch - 1).bit_length(), self.guided)


@dataclass(frozen=True)
class Row:
    """One check of a probe, as it came out.

    Attributes:
        check: The name of the check, with the size of batch that it was made at.
        error: The largest error that was found, or None where the check is not of numbers.
        allowed: The largest error that would do.
        seconds: The time that the check took.
        fault: What is wrong, or None.
    """

    check: str
    error: float | None = None
    allowed: float | None = None
    seconds: float = 0.0
    fault: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a probe found of a backend for one model, device and bucket of sizes.

    Attributes:
        proven: Whether all checks passed.
        reason: What is wrong, or in a few words what was checked.
        seconds: By the name of a backend, the time of a piece of the sequential pass at the size of batch that was
            asked for; the backend itself is among them where it is proven, and what it is held against.
        rows: The checks, in the order in which they were made.
        lasting: Whether the verdict is kept for later processes. A probe that could not be made says nothing of
            the backend.
    """

    proven: bool
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    lasting: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes as a dictionary of plain values."""
        return {**asdict(self), "seconds": dict(self.seconds), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """Returns the verdict that `to_dict` told of.

        Raises KeyError, TypeError or ValueError where the values are not those of a verdict.
        """
        if type(values["proven"]) is not bool:
            raise TypeError("proven")
        seconds = {str(name): float(taken) for name, taken in dict(values["seconds"]).items()}
        rows = tuple(Row(**row) for row in values["rows"])
        return cls(values["proven"], str(values["reason"]), seconds, rows, bool(values["lasting"]))


class Gate(Protocol):
    """What an `AutotunedEngine` asks before it uses an engine."""

    def look(self, size: Size) -> Mapping[str, Verdict | None]:
        """Returns the verdict on each candidate for batches of this size, or None where it is still being probed."""
        ...

    def revoke(self, name: str, why: str) -> None:
        """Take back all verdicts on this backend for the model, in this process and in later ones."""
        ...
