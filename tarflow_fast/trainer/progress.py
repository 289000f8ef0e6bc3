"""A run shows on standard error a bar on a terminal, elsewhere a line for each row of metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm

from ..checks import check_choice

KINDS = ("bar", "lines", "none")


def progress_kind(progress: object) -> str:
    """Returns the one of KINDS that is meant: for True a bar where standard error is a terminal, else lines; for False
    none. Raises ArgumentError for what is none of these."""
    if progress is True:
        return "bar" if sys.stderr.isatty() else "lines"
    return "none" if progress is False else check_choice("progress", progress, KINDS)


class Progress:
    """A `Progress` shows how far a run is.

    kind: one of KINDS. done: the number of steps that are behind when it starts. steps: the number of all steps.
    batch_size: the number of images in a step. unit: what the data are called.
    """

    def __init__(self, kind: str, done: int, steps: int, batch_size: int, unit: str):
        self.shown = kind != "none"
        self._lines = kind == "lines"
        self._bar = tqdm(total=steps, initial=done, disable=kind != "bar", unit="step", dynamic_ncols=True)
        self._steps, self._batch_size, self._unit = steps, batch_size, unit
        self._started = self._last = (time.perf_counter(), done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self) -> None:
        """Tells that a step is done."""
        self._bar.update()

    def row(self, step: int, values: Mapping[str, str]) -> None:
        """Shows the figures of the steps up to this one. values: their texts, by name."""
        self._bar.set_postfix(values)
        if self._lines:
            now = (time.perf_counter(), step)
            rate, since_last = (_rate(then, now) for then in (self._started, self._last))
            self._last = now
            left = timedelta(seconds=round((self._steps - step) / rate))
            shown = "  ".join(f"{name}={value}" for name, value in values.items())
            speed = f"{since_last * self._batch_size:.4g} {self._unit}/s"
            print(f"step {step}/{self._steps}  {shown}  {speed}  {left} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Shows a line of its own."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def _rate(then: tuple[float, int], now: tuple[float, int]) -> float:
    """Returns the steps a second between two moments, each (seconds, step)."""
    return (now[1] - then[1]) / max(now[0] - then[0], 1e-9)
