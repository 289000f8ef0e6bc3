"""Items are read by as many threads as there are cores, a few ahead of whoever takes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .checks import environment_count
from .devices import usable_cores

Key = TypeVar("Key")
Item = TypeVar("Item")

IN_A_TASK = 4  # items: a task of one would cost as much as a small picture
AHEAD = 4  # tasks for each thread


def own_cores() -> int:
    """Returns how many cores this process has, of those that torchrun's processes on this machine share."""
    return max(1, (usable_cores() or os.cpu_count() or 1) // environment_count("LOCAL_WORLD_SIZE", 1, 1))


def read_ahead(read: Callable[[Key], Item], keys: Sequence[Key]) -> Iterator[Item]:
    """Yields read(key) of each key, in their order.

    No more than 16 items a core are held, whatever their number. read: a function that leaves Python's lock to other
    threads for the most part, as decoding does. keys: what it is called with. Raises what `read` raises, when the
    item's turn comes.
    """
    threads = min(own_cores(), max(1, len(keys)))
    tasks: deque[Future[list[Item]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, len(keys), IN_A_TASK):
                part = keys[start : start + IN_A_TASK]
                tasks.append(pool.submit(lambda part: [read(key) for key in part], part))
                if len(tasks) == AHEAD * threads:
                    yield from tasks.popleft().result()
            while tasks:
                yield from tasks.popleft().result()
        finally:
            for task in tasks:
                task.cancel()
