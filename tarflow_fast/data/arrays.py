"""Images and labels of `.npz` and `.npy` files are found under the names that people give them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError, DataError, TarFlowError, printable
from .folders import HALVES
from .image_data import ImageData
from .labels import Labels, read_labels
from .members import Member, npy_member, npz_members
from .store import Store
from .values import WITH_ALPHA, Range, channel_axis, check_sequences, converted, meaning

# These are names of images and of their labels, of which the first that is there is taken; {} is the name of a half.
OF_A_HALF = (
    ("{}_images", "{}_labels"),
    ("x_{}", "y_{}"),
    ("{}_x", "{}_y"),
    ("images_{}", "labels_{}"),
    ("{}_data", "{}_labels"),
)
OF_ALL = (("images", "labels"), ("arr_0", "arr_1"), ("x", "y"), ("data", "labels"), ("samples", "labels"))
OTHER_LABELS = ("labels", "label", "y", "targets")
CLASS_NAMES = ("class_names", "label_names")
SAMPLED = {"images", "seed", "first"}  # `tarflow-fast sample --npz` writes at least these


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns errors of readers in the block into a DataError that names the file."""
    try:
        yield
    except TarFlowError:
        raise
    except Exception as error:  # a damaged header may make NumPy's parser raise anything
        kind = ".npz file" if path.suffix.lower() == ".npz" else ".npy file"
        raise DataError(f"{str(path)!r}: not a whole {kind} of plain arrays ({printable(error)})") from error


def load_npy(path: Path, layout: str, values: str, store: Store) -> tuple[ImageData, list[str]]:
    """Returns images alone, and notes on what was decided of them. Raises DataError for a file that cannot be read."""
    with _naming(path):
        return _images_and_labels(path, npy_member(path), None, None, "train", layout, values, False, store)


def load_npz(path: Path, split: str, layout: str, values: str, store: Store) -> tuple[ImageData, list[str]]:
    """Returns images and labels, and notes on what was decided of them. Raises DataError for a file without images."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{str(path)!r}: not a .npz file")
    with _naming(path), zipfile.ZipFile(path) as archive:
        members = npz_members(path, archive)
        images, labels, notes = _pick(path, members, split)
        names = next((members[name] for name in CLASS_NAMES if name in members), None)
        sampled = members.keys() >= SAMPLED
        data, more = _images_and_labels(path, images, labels, names, split, layout, values, sampled, store)
    return data, notes + more


def _pick(path: Path, members: Mapping[str, Member], split: str) -> tuple[Member, Member | None, list[str]]:
    """Returns the arrays of images, and of labels or None, and notes. Raises DataError where there are no images."""
    lower = {name.lower(): member for name, member in members.items()}
    found: dict[str, tuple[Member, Member | None]] = {}
    for half, words in HALVES.items():
        for images, labels in OF_A_HALF:
            for word in words:
                if images.format(word) in lower:
                    found.setdefault(half, (lower[images.format(word)], lower.get(labels.format(word))))
    half = "val" if split == "test" and "test" not in found and "val" in found else split
    if half in found:
        note = [] if half == split else [f"{str(path)!r}: its {half} images are taken for the {split} half"]
        return *found[half], note
    listed = ", ".join(map(printable, members)) or "none"
    if found:
        raise DataError(f"{str(path)!r}: has no {split} images; found {listed}")
    for images, labels in OF_ALL:
        if images in lower:
            names = (labels, *(OTHER_LABELS if images != "arr_0" else ()))
            return lower[images], next((lower[name] for name in names if name in lower), None), []
    others = "arr_0, x, data, x_train, train_images and the like"
    raise DataError(f"{str(path)!r}: expected an array 'images', found {listed} (other names that are known: {others})")


def _images_and_labels(
    path: Path,
    images: Member,
    labels: Member | None,
    class_names: Member | None,
    split: str,
    layout: str,
    values: str,
    sampled: bool,
    store: Store,
) -> tuple[ImageData, list[str]]:
    where = repr(str(path))
    shape, dtype = images.header()
    # `tarflow-fast sample` writes images in four dimensions: three are of sequences.
    sequences = layout == "tokens" or (layout == "auto" and sampled and len(shape) == 3)
    axis = None if sequences else channel_axis(where, dtype, shape, layout)
    if 0 in shape:
        raise DataError(f"{where}: expected images, got none: {shape}")
    channels = 1 if axis is None else shape[axis]
    found: Range | None = None
    if dtype != np.uint8 and dtype.kind in "fiub":
        for _, rows in images.pieces():
            part = Range.of(rows)
            found = part if found is None else found | part
    if sequences:
        check_sequences(where, dtype, shape, found, values)
    what = "raw" if sequences else meaning(where, dtype, channels, found, values, sampled)
    n = shape[0]
    read = Labels(np.zeros(0, np.int64))
    if labels is not None:
        names = None if class_names is None else [_text(name) for name in class_names.whole().reshape(-1).tolist()]
        read = read_labels(where, labels.whole(), n, names, split)
    sides = [side for i, side in enumerate(shape) if i not in (0, axis)]
    size = shape if sequences else (n, channels, *sides)
    out = store.empty(size, np.float32 if what == "raw" else np.uint8)
    for first, rows in images.pieces():
        out[first : first + len(rows)] = converted(_arranged(rows, axis, sequences), what)
    notes = [] if read.note is None else [read.note]
    if dtype.kind in "iu" and channels in WITH_ALPHA and values == "auto":
        alpha = f"if they are {WITH_ALPHA[channels]}, put them on a background first; values='0..255' says they are not"
        notes.append(f"{where}: {dtype} images of {channels} channels are taken as they are; {alpha}")
    if found is not None:
        taken = "kept as they are, for data that are no pictures" if what == "raw" else f"taken as {what}"
        kind = "sequences" if sequences else "images"
        notes.append(f"{where}: {dtype} {kind} from {found.low:g} to {found.high:g} are {taken}")
    return image_data(where, out, None if labels is None else read), notes


def _arranged(rows: np.ndarray[Any, Any], axis: int | None, sequences: bool) -> np.ndarray[Any, Any]:
    """Returns rows of an array as (n, ch, H, W), or sequences as they are. axis: what `channel_axis` returned."""
    if sequences or axis == 1:
        return rows
    return rows[:, None] if axis is None else rows.transpose(0, 3, 1, 2)


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def image_data(where: str, images: np.ndarray[Any, Any], labels: Labels | None) -> ImageData:
    """Returns arrays as ImageData. Raises DataError that begins with `where`, the file, if they are none."""
    try:
        return ImageData(
            torch.from_numpy(images),
            None if labels is None else torch.from_numpy(labels.labels),
            None if labels is None else labels.names,
            None if labels is None else labels.numbers,
        )
    except ArgumentError as error:
        raise DataError(f"{where}: {error}") from error
