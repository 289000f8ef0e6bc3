"""Labelled 8-bit images in memory, from a folder of pictures, an `.npz` file or IDX files (MNIST's)."""

from __future__ import annotations

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .checks import check_choice, check_count
from .errors import ArgumentError, DataError

SPLITS = ("train", "test")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IDX_PREFIX = {"train": "train", "test": "t10k"}
IDX_UINT8 = 8  # the type byte of an IDX header
# What the readers raise for damaged files.
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
BROKEN_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)
BROKEN_PICTURE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageData:
    """N square images and, if they have any, their labels.

    images: (N, ch, S, S) uint8, ch 1 or 3; labels: (N,) int64 >= 0, or None; class_names: one name a
    class, or None. Raises ArgumentError for anything else.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
            raise ArgumentError("images", "uint8 (N, 1 or 3, S, S)", f"{self.images.dtype} {shape}")
        if shape[2] != shape[3]:
            raise ArgumentError("images", "square images", f"{shape[2]} x {shape[3]} pixels")
        if self.labels is not None:
            if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
                got = f"{self.labels.dtype} {tuple(self.labels.shape)}"
                raise ArgumentError("labels", f"{shape[0]} int64 labels", got)
            if int(self.labels.min()) < 0:
                raise ArgumentError("labels", "labels >= 0", int(self.labels.min()))
            named = None if self.class_names is None else len(self.class_names)
            if named is not None and int(self.labels.max()) >= named:
                raise ArgumentError("class_names", f"names for labels up to {int(self.labels.max())}", named)

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """Classes: as many as there are names, or the highest label + 1; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def spread(self, limit: int) -> ImageData:
        """`limit` images at even distances, as data may be sorted by class; all if there are no more."""
        if check_count("limit", limit) >= len(self):
            return self
        rows = torch.arange(limit, device="cpu") * len(self) // limit
        return ImageData(self.images[rows], None if self.labels is None else self.labels[rows], self.class_names)

    @property
    def fingerprint(self) -> int:
        """A checksum of images and labels."""
        crc = zlib.crc32(self.images.contiguous().numpy().data)
        return crc if self.labels is None else zlib.crc32(self.labels.contiguous().numpy().data, crc)


def load_images(
    path: str | os.PathLike[str], *, split: str = "train", size: int | None = None, channels: int = 3
) -> ImageData:
    """The images at `path`, which is one of

    - a folder with one sub-folder of pictures a class (class names: the sorted names of the sub-folders;
      hidden files and folders are passed over), or with folders `train` and `test` that hold such
      sub-folders. Pictures are resized until the shorter side is `size` (bicubic), cropped to the centre,
      and made RGB, or grey for channels = 1;
    - a `.npz` file with `images` (N, S, S) or (N, S, S, 1 or 3) uint8, and optionally `labels` (N,)
      integers and `class_names` (strings);
    - an IDX file of images (`…-images-idx3-ubyte`, perhaps `.gz`), with the labels file of the same name
      beside it if there is one; or a folder of MNIST's four files.

    split: "train" or "test", which half of a folder that has both; what has no halves is taken whole.
    size: pixels along a side, required for pictures; images of the other formats must have it already.
    channels: 1 or 3, for pictures only.

    Raises ArgumentError, and DataError for files that are truncated, foreign or at odds with each other.
    """
    check_choice("split", split, SPLITS)
    if size is not None:
        check_count("size", size)
    if channels not in (1, 3):
        raise ArgumentError("channels", "1 or 3", repr(channels))
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        idx = _idx_path(path, IDX_PREFIX[split] + "-images-idx3-ubyte")
        if idx is not None:
            data = _load_idx(idx)
        elif any(_idx_path(path, prefix + "-images-idx3-ubyte") for prefix in IDX_PREFIX.values()):
            raise DataError(f"{path}: has no {IDX_PREFIX[split]}-images-idx3-ubyte[.gz], its {split} images")
        else:
            halves = all((path / half).is_dir() for half in SPLITS)
            if size is None:
                raise ArgumentError("size", "pixels along a side, to which pictures are brought", None)
            return _load_folder(path / split if halves else path, size, channels)
    elif path.suffix == ".npz":
        data = _load_npz(path)
    else:
        data = _load_idx(path)
    if size is not None and data.images.shape[-1] != size:
        raise DataError(f"{path}: its images are {data.images.shape[-1]} pixels wide, not {size}")
    return data


def _idx_path(folder: Path, name: str) -> Path | None:
    """The IDX file of that name, packed or not."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """An IDX array of unsigned bytes: bytes 0, 0, 8, dims, then big-endian uint32 sizes, then the data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read()
    except BROKEN_GZIP as error:
        raise DataError(f"{path}: a damaged or truncated gzip file ({error})") from error
    head = 4 + 4 * dims
    if len(raw) < head or raw[:2] != b"\0\0":
        raise DataError(f"{path}: not an IDX file")
    if raw[2] != IDX_UINT8 or raw[3] != dims:
        wanted = f"unsigned bytes (type {IDX_UINT8}) in {dims} dimensions"
        raise DataError(f"{path}: expected {wanted}, got type {raw[2]} in {raw[3]} dimensions")
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, head, 4))
    if len(raw) - head != math.prod(shape):
        size = math.prod(shape)
        raise DataError(f"{path}: its header says {shape}, {size} bytes; it holds {len(raw) - head}")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _load_idx(path: Path) -> ImageData:
    images = read_idx(path, 3)
    name = path.name.removesuffix(".gz")
    beside = _idx_path(path.parent, name.replace("-images-idx3", "-labels-idx1"))
    if beside is None or "-images-idx3" not in name:
        return _image_data(path, images, None, None)
    return _image_data(path, images, read_idx(beside, 1), None)


def _load_npz(path: Path) -> ImageData:
    arrays: dict[str, NDArray[Any]] = {}
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not a .npz file")
    try:
        # NumPy leaves a file open that it has opened itself and finds broken.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            for name in ("images", "labels", "class_names"):
                if name in file.files:
                    arrays[name] = file[name]
            found = list(file.files)
    except BROKEN_NPZ as error:
        raise DataError(f"{path}: not a whole .npz file of plain arrays ({error})") from error
    if "images" not in arrays:
        raise DataError(f"{path}: expected an array 'images', found {', '.join(found) or 'none'}")
    names = arrays["class_names"].reshape(-1).tolist() if "class_names" in arrays else None
    return _image_data(path, arrays["images"], arrays.get("labels"), names)


def _image_data(
    path: Path, images: NDArray[Any], labels: NDArray[Any] | None, class_names: Sequence[Any] | None
) -> ImageData:
    """Images (N, S, S) or (N, S, S, ch) as ImageData, errors naming the file."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        got = f"{images.dtype} {images.shape}"
        raise DataError(f"{path}: expected images uint8 (N, S, S) or (N, S, S, 1 or 3), got {got}")
    if images.ndim == 3:
        images = images[..., None]
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        got = f"{labels.dtype} {labels.shape}"
        raise DataError(f"{path}: expected {images.shape[0]} integer labels, got {got}")
    try:
        return ImageData(
            torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C")),
            None if labels is None else torch.from_numpy(labels.astype(np.int64)),
            None if class_names is None else tuple(map(str, class_names)),
        )
    except ArgumentError as error:
        raise DataError(f"{path}: {error}") from error


def _load_folder(path: Path, size: int, channels: int) -> ImageData:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(f"{path}: expected one sub-folder of pictures for each class, or MNIST's IDX files")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise DataError(f"{folder}: a class without pictures")
        for file in files:
            if file.suffix.lower() not in PICTURES:
                raise DataError(f"{file}: not a picture ({', '.join(PICTURES)})")
            images.append(_load_picture(file, size, channels))
            labels.append(label)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ImageData(stacked, torch.tensor(labels, device="cpu"), tuple(folder.name for folder in folders))


def _load_picture(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """(size, size, channels): the shorter side resized to `size`, then the centre."""
    try:
        with Image.open(path) as file:
            picture = file.convert("L" if channels == 1 else "RGB")
    except BROKEN_PICTURE as error:
        raise DataError(f"{path}: not a whole picture ({error})") from error
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels: NDArray[np.uint8] = np.asarray(picture.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, channels)
