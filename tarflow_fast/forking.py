"""Forked child processes: torch's CPU threads do not live on in them, and would be waited for without end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PROCESS = os.getpid()  # the process that imported this package


@contextmanager
def safe_in_forked_child() -> Iterator[None]:
    """Leave torch a single thread within this context in a forked child; elsewhere nothing changes.

    Where the parent has computed with several threads, OpenMP in the child would wait for threads that it does not
    have.
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
