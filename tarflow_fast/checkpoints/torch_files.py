"""torch.save to a file that may not be finished."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch


class _Sink:
    """A file for torch.save that keeps an error until torch is done: on one its writer in C++ ends the process."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None: ...


def save_torch(content: Any, path: Path) -> None:
    """As torch.save. Raises OSError where the system refuses, as it does when a disk is full."""
    with path.open("wb") as file:
        sink = _Sink(file)
        torch.save(content, sink)  # type: ignore[arg-type]
    if sink.error is not None:
        raise OSError(sink.error.errno, sink.error.strerror, str(path)) from sink.error
