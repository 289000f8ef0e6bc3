"""The shards of a run are written in one of three formats, each whole or not at all.

- "npz": one file a shard, as the evaluation suite of ADM (guided-diffusion) reads it: `arr_0` (k, H, W, ch) uint8, and
  `arr_1` (k,) int64 labels where there are any; sequences are (k, T, D) float32. Beside them `log_prob` (k,) float32 in
  nats where the images are unguided.
- "png": images/CLASS/NUMBER.png, and one file a shard, NAME.csv, which lists its images: file, number, label, log_prob,
  sha256.
- "tar": one file a shard for WebDataset, with NUMBER.png, NUMBER.cls where there are labels, and NUMBER.json.

The same images make the same bytes.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError
from ...files import replacing
from ...images import encode_png, to_uint8
from ..report import Samples

Add = Callable[[Samples], None]
# What dead processes have left goes before each file; on Windows one that is about to have its name would go too.
SWEEP = sys.platform != "win32"
UNLABELLED = "unlabelled"  # the folder of images without a class
_UNFIT = re.compile(r'[\x00-\x1f<>:"/\\|?*]')  # what a file system does not take in a name
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


@dataclass(frozen=True)
class Shard:
    """A `Shard` is what is written for some images.

    out: the folder of the run. name: the shard's name. numbers: those of its images. shape: (ch, H, W) of an image, or
    (T, D) of a sequence. folders: the folder of each class, by its number.
    """

    out: Path
    name: str
    numbers: range
    shape: tuple[int, ...]
    folders: Sequence[str]


def class_folders(num_classes: int, names: Sequence[str]) -> list[str]:
    """Returns the name of a folder for each class: the class's own where file systems take all of them, else numbers.

    In a name "_" stands for a character that a file system does not take.
    """
    fit = [_UNFIT.sub("_", name).strip().rstrip(".") for name in names]
    taken = {name.casefold() for name in fit} | {UNLABELLED}
    if len(fit) == num_classes and len(taken) == num_classes + 1 and not any(map(_unusable, fit)):
        return fit
    return [f"{label:0{len(str(num_classes - 1))}d}" for label in range(num_classes)]


def _unusable(name: str) -> bool:
    return not name or name.startswith(".") or len(name.encode()) > 200 or _RESERVED.fullmatch(name) is not None


@contextlib.contextmanager
def _npz(shard: Shard) -> Iterator[Add]:
    pictures, count, done = len(shard.shape) == 3, len(shard.numbers), 0
    # one array for all batches: small ones between large ones that go would keep memory from being used again
    labels, log_prob = np.full(count, -1, np.int64), np.full(count, np.nan, np.float32)
    shape = (*shard.shape[1:], shard.shape[0]) if pictures else shard.shape
    head = {"descr": "|u1" if pictures else "<f4", "fortran_order": False, "shape": (count, *shape)}
    beside: dict[str, NDArray[Any]] = {}
    with replacing(shard.out / f"{shard.name}.npz", sweep=SWEEP) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)

            def add(part: Samples) -> None:
                nonlocal done
                if pictures:
                    values = to_uint8(part.images).permute(0, 2, 3, 1).contiguous().numpy()
                else:
                    values = part.images.float().cpu().contiguous().numpy().astype("<f4", copy=False)
                member.write(values.data.cast("B"))
                rows = slice(done, done + len(values))
                done = rows.stop
                if part.labels is not None:
                    labels[rows] = part.labels.numpy()
                    beside["arr_1"] = labels
                if part.log_prob is not None:
                    log_prob[rows] = part.log_prob.float().cpu().numpy()
                    beside["log_prob"] = log_prob

            yield add
        for name, array in beside.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _facts(shard: Shard, done: int, part: Samples) -> list[dict[str, Any]]:
    """Returns number, label and log_prob of each image of a part, those that there are. done: images before it."""
    columns: dict[str, Sequence[Any]] = {"number": shard.numbers[done : done + len(part.images)]}
    if part.labels is not None:
        columns["label"] = part.labels.tolist()
    if part.log_prob is not None:
        columns["log_prob"] = part.log_prob.float().cpu().tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@contextlib.contextmanager
def _png(shard: Shard) -> Iterator[Add]:
    with (
        replacing(shard.out / f"{shard.name}.csv", sweep=SWEEP) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, ["file", "number", "label", "log_prob", "sha256"], lineterminator="\n")
        table.writeheader()
        done = 0

        def add(part: Samples) -> None:
            nonlocal done
            for facts, image in zip(_facts(shard, done, part), to_uint8(part.images), strict=True):
                label = facts.get("label", -1)
                place = Path("images", UNLABELLED if label < 0 else shard.folders[label])
                (shard.out / place).mkdir(parents=True, exist_ok=True)
                path = place / f"{facts['number']:09d}.png"
                content = encode_png(image, facts)
                with replacing(shard.out / path, sweep=False) as picture:
                    picture.write_bytes(content)
                table.writerow({**facts, "file": path.as_posix(), "sha256": hashlib.sha256(content).hexdigest()})
            done += len(part.images)

        yield add


@contextlib.contextmanager
def _tar(shard: Shard) -> Iterator[Add]:
    with replacing(shard.out / f"{shard.name}.tar", sweep=SWEEP) as partial, tarfile.open(partial, "w") as archive:
        done = 0

        def put(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        def add(part: Samples) -> None:
            nonlocal done
            for facts, image in zip(_facts(shard, done, part), to_uint8(part.images), strict=True):
                name = f"{facts['number']:09d}"
                put(f"{name}.png", encode_png(image))
                if "label" in facts:
                    put(f"{name}.cls", str(facts["label"]).encode())
                put(f"{name}.json", json.dumps(facts).encode())
            done += len(part.images)

        yield add


@dataclass(frozen=True)
class Format:
    """A `Format` is a way to write a shard.

    name: a word for it. writing: gives a function that takes the shard's images, batch by batch; the shard has its name
    when the block ends. suffix: that of the shard's own file. made_by: gives what else the shards depend on, which is
    asked when all that can be checked without it has been, or is None. trajectory: whether it takes samples with the
    images after each block.
    """

    name: str
    writing: Callable[[Shard], AbstractContextManager[Add]]
    suffix: str
    made_by: Callable[[], str] | None = None
    trajectory: bool = False

    @functools.cached_property
    def described(self) -> str:
        """What a run records, and all its processes have to agree on."""
        return self.name if self.made_by is None else f"{self.name} of {self.made_by()}"


FORMATS = {
    form.name: form for form in (Format("npz", _npz, ".npz"), Format("png", _png, ".csv"), Format("tar", _tar, ".tar"))
}


def check_shape(format: str, shape: tuple[int, ...]) -> None:
    """Raises ArgumentError where this format cannot hold images (ch, H, W), or sequences (T, D), of this shape."""
    if format != "npz" and (len(shape) != 3 or shape[0] not in (1, 3)):
        got = f"images of {shape[0]} channels" if len(shape) == 3 else "sequences, which make no picture"
        raise ArgumentError("format", "'npz' for what is no picture of 1 or 3 channels", f"{format!r} for {got}")
