"""Forked children of this process: torch's threads for CPUs do not live on in them, and are waited for without end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PROCESS = os.getpid()  # that imported this package


@contextmanager
def safe_in_forked_child() -> Iterator[None]:
    """Within it a forked child leaves torch a single thread, which works there; elsewhere nothing changes.

    Where the parent has computed with several threads, OpenMP in the child waits for those that it has not got.
    """
    threads = torch.get_num_threads()
    if os.getpid() == _PROCESS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
