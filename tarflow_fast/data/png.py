"""A plain PNG is read in a part of the time that Pillow takes; all others are left to Pillow.

Plain are 8 bits of grey or RGB without interlacing, animation, transparency, text or EXIF, where the native module was
built. Whatever is odd about a file makes it one that Pillow reads, or refuses.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import BackendError
from ..native import address, load_native

HEADER, CHUNK, CRC = struct.Struct(">8sI4sIIBBBBB"), struct.Struct(">I4s"), struct.Struct(">I")
CHANNELS = {0: 1, 2: 3}  # by the type of colour
IGNORED = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}  # the bytes of chunks that change no level
MOST_BYTES = 2**22  # a larger file is not held in memory
BINARY = getattr(os, "O_BINARY", 0)  # of Windows


@dataclass(frozen=True)
class PlainPng:
    """A `PlainPng` is a picture whose levels are still packed. packed: its deflate stream."""

    height: int
    width: int
    channels: int
    packed: bytes

    def put(self, out: NDArray[np.uint8], planar: bool) -> bool:
        """Puts the levels into `out`, unless they are broken, and returns whether they are there.

        out: contiguous, (channels, H, W) if planar, else (H, W, channels).
        """
        nbytes = self.height * (1 + self.width * self.channels)
        try:
            rows = zlib.decompressobj().decompress(self.packed, nbytes)
        except zlib.error:
            return False
        if len(rows) < nbytes:
            return False
        target = address("out", torch.from_numpy(out), torch.uint8, count=self.height * self.width * self.channels)
        sizes = {"height": self.height, "width": self.width, "channels": self.channels}
        done: bool = load_native().unfilter_png(rows=rows, **sizes, planar=planar, out=target)
        return done

    def picture(self) -> Image.Image | None:
        """Returns the picture, or None where its levels are broken."""
        out = np.empty((self.height, self.width, self.channels), np.uint8)
        return Image.fromarray(out.squeeze(2) if self.channels == 1 else out) if self.put(out, planar=False) else None


def open_plain_png(path: str) -> PlainPng | None:
    """Returns the picture of a file, or None where that is not a plain PNG, named so. Raises OSError as `open` does."""
    if not path.lower().endswith(".png"):
        return None  # a JPEG would be read twice
    handle = os.open(path, os.O_RDONLY | BINARY)
    try:
        size = os.fstat(handle).st_size
        content = os.read(handle, size) if size <= MOST_BYTES else b""
    finally:
        os.close(handle)
    try:
        return _parsed(content)
    except (struct.error, BackendError):
        return None


def _parsed(content: bytes) -> PlainPng | None:
    """Returns the picture of a file's bytes, or None. Raises struct.error where they end too early."""
    signature, length, name, width, height, depth, kind, *rest = HEADER.unpack_from(content)
    if (signature, length, name, depth, *rest) != (b"\x89PNG\r\n\x1a\n", 13, b"IHDR", 8, 0, 0, 0):
        return None
    if kind not in CHANNELS or not width or not height or not _is_whole(content, 8, 13):
        return None
    at, parts = 33, list[bytes]()
    while True:
        length, name = CHUNK.unpack_from(content, at)
        if name == b"IDAT":
            parts.append(content[at + 8 : at + 8 + length])
        elif name == b"IEND" and parts:
            break
        elif parts or IGNORED.get(name) != length or not _is_whole(content, at, length):
            return None
        at += 12 + length
    load_native()
    return PlainPng(height, width, CHANNELS[kind], parts[0] if len(parts) == 1 else b"".join(parts))


def _is_whole(content: Any, at: int, length: int) -> bool:
    """Returns whether the checksum of the chunk there is right, which Pillow asks of all before the levels."""
    return zlib.crc32(content[at + 4 : at + 8 + length]) == CRC.unpack_from(content, at + 8 + length)[0]
