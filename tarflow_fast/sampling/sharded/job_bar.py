"""The bar of a job shows what all its processes have done."""

from __future__ import annotations

import time

from ...progress import Bar
from .job import Job


class JobBar:
    """A `JobBar` shows on one bar how many images all processes are done with.

    shown: whether it is shown at all. desc: the text before it. seconds: the least time between two looks.
    """

    def __init__(self, job: Job, shown: bool, desc: str, seconds: float):
        self._job, self._shown, self._seconds, self._next = job, shown, seconds, 0.0
        initial = job.images() if shown else 0
        self._bar = Bar(total=job.plan.n, initial=initial, unit="image", desc=desc, disable=not shown, smoothing=0)

    def __enter__(self) -> JobBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._next = 0.0
            self.update()
        self._bar.close()

    def update(self) -> None:
        """Looks at what is there, if the last look was some time ago."""
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._seconds
            self._bar.n = max(self._bar.n, self._job.images())
            self._bar.refresh()
