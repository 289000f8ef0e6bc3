"""Items are read by as many threads as there are cores, a few ahead of whoever takes them."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .checks import environment_count
from .devices import usable_cores

Item = TypeVar("Item")

IN_A_TASK = 4  # items: a task of one would cost as much as a small picture
AHEAD = 4  # tasks for each thread


def own_cores() -> int:
    """Returns how many cores this process has, of those that torchrun's processes on this machine share."""
    return max(1, (usable_cores() or os.cpu_count() or 1) // environment_count("LOCAL_WORLD_SIZE", 1, 1))


def read_ahead(
    read: Callable[[range], Iterable[Item]], numbers: range, in_a_task: int = IN_A_TASK
) -> Generator[Item, None, None]:
    """Yields the items of these numbers, in their order.

    No more than 4 · in_a_task items a core are held, whatever their number.

    Args:
        read: The function that yields the items of some numbers, and leaves Python's lock to other threads for the most
            part, as decoding does.
        numbers: The numbers, which are divided among tasks.
        in_a_task: How many a task has at most; there are some tasks for each thread.

    Raises:
        Exception: What `read` raises, when the turn of its task comes.
    """
    threads = min(own_cores(), max(1, len(numbers)))
    in_a_task = max(1, min(in_a_task, len(numbers) // (AHEAD * threads)))
    tasks: deque[Future[list[Item]]] = deque()
    left = threading.Event()

    def work(part: range) -> list[Item]:
        return list(itertools.takewhile(lambda _: not left.is_set(), read(part)))

    with ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, len(numbers), in_a_task):
                tasks.append(pool.submit(work, numbers[start : start + in_a_task]))
                if len(tasks) == AHEAD * threads:
                    yield from tasks.popleft().result()
            while tasks:
                yield from tasks.popleft().result()
        finally:
            left.set()
            for task in tasks:
                task.cancel()
