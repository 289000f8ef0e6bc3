"""A picture is read as a viewer shows it, with 8 bits, upright, on white, or refused by name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError, printable
from ..sizes import Size, pair
from .png import read_plain_pngs

PICTURES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"}
)
# These are pictures too, which nothing here reads: left out in silence they would be missed.
OTHER_PICTURES = frozenset(
    {".heic", ".heif", ".jxl", ".j2k", ".exr", ".hdr", ".psd", ".tga", ".svg", ".pfm", ".dds", ".ico"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
PLUGINS = {"Png": "PNG", "Jpeg": "JPEG", "WebP": "WEBP", "Bmp": "BMP", "Gif": "GIF", "Tiff": "TIFF", "Ppm": "PPM"}
LATER_PLUGINS = {"Avif": "AVIF", "Jpeg2K": "JPEG2000"}
STRIP = 256  # rows of pixels
BLOCK_BYTES = 2**28  # Pillow takes memory by such blocks: its own, of 16 MiB, stay with the thread that had them
LONGEST_STRIP = 32  # a strip is no longer than so many times its shorter side
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # these are tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Refused(Exception):
    """A `_Refused` says why a whole picture is not taken."""


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns the formats that Pillow may take a file for: not all that it knows, as some run other programs."""
    for plugin in (*PLUGINS, *LATER_PLUGINS):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in (*PLUGINS.values(), *LATER_PLUGINS.values()) if name in Image.OPEN)


@contextlib.contextmanager
def reading_pictures() -> Iterator[None]:
    """Makes Pillow's warnings errors or nothing, and the memory of a large picture go back to the system with it.

    Both settings are the whole process's, so that this block goes around all threads.
    """
    _formats()
    blocks = Image.core.get_block_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.core.set_block_size(max(blocks, BLOCK_BYTES))
        try:
            yield
        finally:
            Image.core.set_block_size(blocks)


class Room:
    """A `Room` is memory that decoded pictures share.

    A picture that finds too little waits for others to go; alone it always has enough. nbytes: the bytes that all may
    take at once.
    """

    def __init__(self, nbytes: int):
        self._nbytes, self._taken, self._changed = nbytes, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


def read_picture(path: str, size: Size, channels: int) -> NDArray[np.uint8]:
    """Returns a picture, (channels, H, W) uint8, as `read_picture_into` reads it. size: (H, W), or one number."""
    out = np.empty((channels, *pair(size)), np.uint8)
    return next(read_pictures([path], out[None], functools.partial(read_picture_into, room=Room(0))))


def read_pictures(
    paths: Sequence[str], out: NDArray[np.uint8], read: Callable[[str, NDArray[np.uint8]], None]
) -> Iterator[NDArray[np.uint8]]:
    """Yields out[i] when it holds picture i: native code puts plain PNGs of that size there, and `read` all others.

    paths: the N pictures. out: contiguous, (N, channels, H, W) uint8. read: reads a path into an array.
    """
    plain = [False] * len(paths) if _why_refused(out.shape[:1:-1]) else read_plain_pngs(paths, out)
    for path, picture, is_there in zip(paths, out, plain, strict=True):
        if not is_there:
            read(path, picture)
        yield picture


def read_picture_into(path: str, out: NDArray[np.uint8], room: Room) -> None:
    """Reads a picture into `out`: resized until it just covers H×W, then cropped to the centre.

    The picture is as a viewer shows it: the first frame of an animation, turned by its EXIF orientation, transparent
    parts white. 16 bits lose the lower 8; floats are 0 (black) to 1. Colours are taken as sRGB, whatever profile is
    embedded. out: (channels, H, W) uint8. room: the memory for decoded pictures. Raises DataError that names the file
    for anything else, for more pixels than PIL.Image.MAX_IMAGE_PIXELS, and for strips that are more than 32 times as
    long as wide.
    """
    mode = "L" if out.shape[0] == 1 else "RGB"
    try:
        check_is_file(path)
        with Image.open(path, formats=_formats()) as file:
            if why := _why_refused(file.size):  # before anything is decoded
                raise _Refused(why)
            # Pillow takes four bytes a pixel, one if it is grey, and holds two pictures where one is converted.
            nbytes = file.width * file.height * (1 if file.mode == mode == "L" else 4 if file.mode == mode else 8)
            with room.take(nbytes):
                _put(out, _shown(file, mode))
    except _Refused as error:
        raise DataError(f"{path!r}: {error}") from error
    except Exception as error:  # a decoder may raise anything
        raise DataError(f"{path!r}: not a whole picture ({printable(error)})") from error


def _put(out: NDArray[np.uint8], picture: Image.Image) -> None:
    """Puts the picture, resized and cropped, into `out` strip by strip: an array of all of it would be a copy, and be
    made by way of another."""
    channels, height, width = out.shape
    scale = max(width / picture.width, height / picture.height)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    whole = size == (width, height) and height <= STRIP
    for row in range(0, height, STRIP):
        rows = min(STRIP, height - row)
        strip = np.asarray(picture if whole else picture.crop((left, top + row, left + width, top + row + rows)))
        out[:, row : row + rows] = strip.reshape(rows, width, channels).transpose(2, 0, 1)


def check_is_file(path: str) -> None:
    """Raises OSError for a pipe or a device, whose end might never come, and where there is nothing of that name."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a folder is an error in any case
        raise OSError("a pipe or a device, no file")


def _why_refused(size: Sequence[int]) -> str | None:
    """Returns why a picture is too large or too long, or None if it is neither. size: (W, H)."""
    width, height = size
    if max(size) > LONGEST_STRIP * min(size):
        return f"a strip of {width} x {height} pixels, longer than {LONGEST_STRIP} times its shorter side"
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        return f"{width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}"
    return None


def _shown(file: Image.Image, mode: str) -> Image.Image:
    """Returns the picture in `mode`, "L" or "RGB"."""
    stored = str(getattr(file, "tile", None) or "")  # load() forgets how many bits it has in the file
    file.load()
    if file.mode in ("I", "F") or file.mode.startswith("I;16"):
        picture = Image.fromarray(_grey(file))
    elif file.mode == "RGBX":
        picture = file.convert("RGB")
    else:
        picture = file
    alpha = _colour_key(file, stored)
    if alpha is not None:
        picture = picture.convert("RGB")
        picture.putalpha(Image.fromarray(alpha))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        if picture.mode == "La":
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    picture = picture if picture.mode == mode else picture.convert(mode)  # convert would copy it
    turn = TURNS.get(_orientation(file))
    return picture if turn is None else picture.transpose(turn)


def _orientation(file: Image.Image) -> int:
    """Returns the orientation by EXIF, or 1, upright, where that cannot be read."""
    try:
        found = file.getexif().get(ORIENTATION, 1)
    except Exception:  # a decoder may raise anything
        return 1
    return found if isinstance(found, int) else 1


def _grey(file: Image.Image) -> NDArray[np.uint8]:
    """Returns a grey picture of more than 8 bits with 8."""
    tags = getattr(file, "tag_v2", {})
    values = np.asarray(file)
    if file.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # NaN is refused too
            raise _Refused(f"floats from {low:g} to {high:g}, where 0 is to be black and 1 white")
        grey = np.rint(values * np.float32(255)).astype(np.uint8)
    elif file.mode == "I" and file.format not in ("PNG", "PPM"):
        raise _Refused("whole numbers of 32 bits or with a sign, of which nothing says what is white")
    else:
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0] if file.mode != "I" else 16
        grey = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == 0 else grey


def _colour_key(file: Image.Image, stored: str) -> NDArray[np.uint8] | None:
    """Returns alpha, 0 or 255, where one colour of a picture without a palette is transparent, else None."""
    key = file.info.get("transparency")
    if key is None or not (file.mode in ("1", "L", "RGB") or file.mode.startswith("I;16")):
        return None
    wanted = np.atleast_1d(np.asarray(key))
    if file.mode == "RGB" and ";16" in stored:
        wanted = wanted >> 8
    elif "'L;2'" in stored or "'L;4'" in stored:
        wanted = wanted * (85 if "'L;2'" in stored else 17)
    values = np.asarray(file.convert("L") if file.mode == "1" else file)
    same = values.reshape(*values.shape[:2], -1) == wanted
    return np.where(same.all(-1), 0, 255).astype(np.uint8)
