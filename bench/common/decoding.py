"""Pillow alone reads pictures, in a module that a process of its own can import in no time."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def decode(paths: list[str]) -> list[int]:
    """Returns the sum of the upper row of each picture (ch, H, W), read as short as that can be written."""
    found = []
    for path in paths:
        with Image.open(path) as file:
            found.append(int(np.asarray(file).transpose(2, 0, 1)[:, 0].sum(dtype=np.int64)))
    return found


def decode_all(pool: Any, paths: list[str], in_a_task: int) -> list[int]:
    """Returns these sums of pictures that the workers of a pool read, so many in a task: they tell pictures apart."""
    tasks = [paths[i : i + in_a_task] for i in range(0, len(paths), in_a_task)]
    return [each for part in pool.map(decode, tasks) for each in part]
