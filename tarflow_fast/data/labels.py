"""Arrays store labels as (N,) or (N, 1) integers from anywhere on, as one-hot rows, or as names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

MOST_LISTED = 6


@dataclass(frozen=True)
class Labels:
    """`Labels` are the labels of N images, as `ImageData` has them.

    labels: (N,) int64, 0 to classes − 1. names, numbers: the `class_names` and `numbers` of an `ImageData`. note: a
    sentence on what was decided, or None.
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...] | None = None
    numbers: tuple[int, ...] | None = None
    note: str | None = None


def read_labels(where: str, array: NDArray[Any], n: int, names: Sequence[str] | None, split: str) -> Labels:
    """Returns the labels of n images.

    names: the names of the classes, if the file has them: labels are then numbers of names. split: the data's half.

    Integers of data to train on (split "train") that leave out some below the highest are numbered anew, in order;
    other data may lack classes that the model has. Raises DataError that begins with `where`.
    """
    names = None if names is None else tuple(names)
    flat = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim == 2 and flat.shape[0] == n and flat.dtype.kind in "iufb":
        return _one_hot(where, flat, names)
    if flat.shape != (n,) or flat.dtype.kind not in "iubUS":
        raise DataError(f"{where}: expected {n} integer labels, got {array.dtype} {array.shape}")
    if flat.dtype.kind in "US":
        return _by_name(where, flat.astype(str), names)
    if flat.dtype.kind == "u" and int(flat.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{where}: expected labels of 64 bits with a sign, got {int(flat.max())}")
    labels = flat.astype(np.int64)
    if int(labels.min()) < 0:
        raise DataError(f"{where}: expected labels >= 0, got {int(labels.min())}")
    present, numbered = np.unique(labels, return_inverse=True)
    if names is not None or split != "train" or int(present[-1]) == len(present) - 1:
        return Labels(labels, names)
    numbers = tuple(present.tolist())
    shown = ", ".join(map(str, numbers[:MOST_LISTED])) + (", …" if len(numbers) > MOST_LISTED else "")
    note = f"{where}: the labels {shown} become classes 0 to {len(numbers) - 1}, in this order"
    return Labels(numbered.reshape(-1).astype(np.int64), None, numbers, note)


def _one_hot(where: str, rows: NDArray[Any], names: tuple[str, ...] | None) -> Labels:
    if not (np.isin(rows, (0, 1)).all() and (rows.sum(1) == 1).all()):
        raise DataError(f"{where}: expected a single class for each image, got {rows.dtype} labels {rows.shape}")
    if names is not None and len(names) != rows.shape[1]:
        raise DataError(f"{where}: expected {rows.shape[1]} class names, got {len(names)}")
    return Labels(rows.argmax(1).astype(np.int64), names, tuple(range(rows.shape[1])))


def _by_name(where: str, words: NDArray[Any], names: tuple[str, ...] | None) -> Labels:
    present, numbered = np.unique(words, return_inverse=True)
    known = tuple(present.tolist()) if names is None else names
    unknown = [word for word in present.tolist() if word not in known]
    if unknown:
        raise DataError(f"{where}: expected labels among its class names, got {unknown[0]!r}")
    table = np.array([known.index(word) for word in present.tolist()], np.int64)
    return Labels(table[numbered.reshape(-1)], known)
