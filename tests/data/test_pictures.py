"""Pictures of any depth, orientation and alpha: as a viewer shows them, or one error with the path."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from tarflow_fast import read_ahead as read_ahead_module
from tarflow_fast.data import load as load_module
from tarflow_fast.data import load_images
from tarflow_fast.data.pictures import PICTURES, Room, _formats, read_picture, reading_pictures
from tarflow_fast.errors import DataError

S = 16
GREY = np.linspace(30, 220, S, dtype=np.uint8)[None].repeat(S, 0).copy()
RGB = np.dstack([GREY, GREY.T, 255 - GREY])
ALPHA = np.linspace(0, 255, S).astype(np.uint8)[:, None].repeat(S, 1)
STORED = {  # how a picture lies in the file for each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def read(path: Path, channels: int = 3, size: int = S) -> np.ndarray:
    """(S, S, channels), as floats."""
    with reading_pictures():
        return read_picture(str(path), size, channels).transpose(1, 2, 0).astype(float)


def assert_shown(path: Path, wanted: np.ndarray, tolerance: float = 0.6) -> None:
    """Within rounding, or on average within what lossy compression loses."""
    wanted = wanted if wanted.ndim == 3 else wanted[..., None].repeat(3, 2)
    difference = np.abs(read(path) - wanted)
    assert (difference.max() if tolerance < 1 else difference.mean()) <= tolerance


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour.reshape(S, S, -1) * share + 255 * (1 - share)


def png(path: Path, depth: int, kind: int, rows: list[bytes], width: int = S, height: int = S, **chunks: bytes) -> Path:
    """A PNG of raw rows, for kinds that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + data + chunk(b"IEND", b""))
    return path


def rows(array: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in array]


def test_every_kind_has_its_reader() -> None:
    known = {*features.modules, *features.codecs, *features.features}
    missing = {name for name in ("webp", "avif", "jpg_2000") if name not in known or not features.check(name)}
    assert {"PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM"} <= set(_formats())
    assert missing or {"WEBP", "AVIF", "JPEG2000"} <= set(_formats())
    assert ".jfif" in PICTURES


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jfif", ".jpe", ".bmp", ".webp", ".tif", ".ppm"])
def test_common_kinds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"1{suffix}"
    Image.fromarray(RGB).save(path, "JPEG" if suffix in (".jfif", ".jpe") else None, quality=95, subsampling=0)
    assert_shown(path, RGB, 6 if suffix in (".jpg", ".jfif", ".jpe", ".webp") else 0.0)


@pytest.mark.parametrize("scale", [1, 257])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey(tmp_path: Path, suffix: str, scale: int) -> None:
    """v >> 8, whatever the picture's own range."""
    path = tmp_path / f"1{suffix}"
    values = GREY.astype(np.uint16) * scale
    if suffix == ".pgm":
        path.write_bytes(b"P5 %d %d 65535\n" % (S, S) + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert_shown(path, values >> 8, 0.0)


def test_sixteen_bit_colour_and_alpha(tmp_path: Path) -> None:
    deep, alpha = RGB.astype(">u2") * 257, (ALPHA.astype(">u2") * 257)[..., None]
    deep, alpha = deep.astype(">u2"), alpha.astype(">u2")
    assert_shown(png(tmp_path / "rgb.png", 16, 2, rows(deep)), RGB, 0.0)
    assert_shown(png(tmp_path / "rgba.png", 16, 6, rows(np.dstack([deep, alpha]))), on_white(RGB, ALPHA))
    grey = deep[..., :1]
    assert_shown(png(tmp_path / "la.png", 16, 4, rows(np.dstack([grey, alpha]))), on_white(GREY, ALPHA))


def test_floats_are_0_to_1(tmp_path: Path) -> None:
    path = tmp_path / "1.tif"
    Image.fromarray(GREY.astype(np.float32) / 255).save(path)
    assert_shown(path, GREY, 0.0)
    for values in (GREY.astype(np.float32), GREY / np.float32(255) - 0.5, np.full((S, S), np.nan, np.float32)):
        Image.fromarray(values.astype(np.float32)).save(path)
        with pytest.raises(DataError, match=r"1\.tif': floats from"):
            read(path)


def test_inverted_tiffs(tmp_path: Path) -> None:
    path = tmp_path / "1.tif"
    for values in (GREY.astype(np.uint16) * 257, GREY.astype(np.float32) / 255):
        Image.fromarray(values).save(path, tiffinfo={262: 0})
        with Image.open(path) as file:
            stored = file.tag_v2[262]  # type: ignore[attr-defined]
        if stored == 0:
            assert_shown(path, 255 - GREY, 0.0)


def test_integers_of_32_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.int32) * 257).save(tmp_path / "1.tif")
    with pytest.raises(DataError, match="32 bits"):
        read(tmp_path / "1.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".tiff"])
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    picture = Image.fromarray(RGB)
    picture = picture.transpose(STORED[orientation]) if orientation in STORED else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    how: dict[str, Any] = {".jpg": {"quality": 98, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    how = {"compression": "tiff_lzw"} if suffix == ".tiff" else how
    picture.save(tmp_path / f"1{suffix}", exif=exif, **how)
    assert_shown(tmp_path / f"1{suffix}", RGB, 3 if suffix == ".jpg" else 0.0)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_composited_on_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"1{suffix}"
    how = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    Image.fromarray(np.dstack([RGB, ALPHA])).save(path, **how)
    assert_shown(path, on_white(RGB, ALPHA))
    Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)])).save(path, **how)
    assert_shown(path, RGB, 0.0)


def test_grey_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([GREY, ALPHA])).save(tmp_path / "1.png")
    assert_shown(tmp_path / "1.png", on_white(GREY, ALPHA))
    assert np.abs(read(tmp_path / "1.png", channels=1) - on_white(GREY, ALPHA)).max() <= 0.6


def test_transparent_colours(tmp_path: Path) -> None:
    """A key in the file's own depth: 1, 2, 4, 8 and 16 bits of grey, and RGB."""
    path, key = tmp_path / "1.png", int(GREY[0, 4])
    wanted = np.where(key == GREY, 255, GREY)
    assert_shown(png(path, 8, 0, rows(GREY), tRNS=struct.pack(">H", key)), wanted, 0.0)
    deep = (GREY.astype(np.uint16) * 257).astype(">u2")
    assert_shown(png(path, 16, 0, rows(deep), tRNS=struct.pack(">H", key * 257)), wanted, 0.0)
    level = np.arange(S)
    four = bytes((level[0::2] << 4 | level[1::2]).tolist())
    shown = np.where(level == 5, 255, level * 17)[None].repeat(S, 0)
    assert_shown(png(path, 4, 0, [four] * S, tRNS=struct.pack(">H", 5)), shown, 0.0)
    two = bytes([0b00011011] * (S // 4))
    shown = np.tile([0, 255, 170, 255], S // 4)[None].repeat(S, 0)
    assert_shown(png(path, 2, 0, [two] * S, tRNS=struct.pack(">H", 1)), shown, 0.0)
    assert_shown(png(path, 1, 0, [b"\x0f\x0f"] * S, tRNS=struct.pack(">H", 0)), np.full((S, S), 255), 0.0)
    colour = RGB[3, 5]
    shown = np.where((colour == RGB).all(-1, keepdims=True), 255, RGB)
    assert_shown(png(path, 8, 2, rows(RGB), tRNS=struct.pack(">3H", *colour.tolist())), shown, 0.0)
    deep = (RGB.astype(np.uint16) * 257).astype(">u2")
    assert_shown(png(path, 16, 2, rows(deep), tRNS=struct.pack(">3H", *(int(v) * 257 for v in colour))), shown, 0.0)


def test_palettes(tmp_path: Path) -> None:
    colours = np.array([[i, 255 - i, i // 2] for i in range(256)], np.uint8)
    palette = colours.tobytes()
    assert_shown(png(tmp_path / "1.png", 8, 3, rows(GREY), PLTE=palette), colours[GREY], 0.0)
    path = png(tmp_path / "2.png", 8, 3, rows(GREY), PLTE=palette, tRNS=bytes(range(256)))
    assert_shown(path, on_white(colours[GREY], GREY))


def test_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(GREY > 128).save(tmp_path / "1.png")
    assert_shown(tmp_path / "1.png", np.where(GREY > 128, 255, 0), 0.0)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / f"1{suffix}", quality=98)
    assert_shown(tmp_path / f"1{suffix}", RGB, 4)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame(tmp_path: Path, suffix: str) -> None:
    first, second = np.zeros((S, S), np.uint8), np.full((S, S), 255, np.uint8)
    frames = [Image.fromarray(first), Image.fromarray(second)]
    frames[0].save(tmp_path / f"1{suffix}", save_all=True, append_images=frames[1:])
    assert_shown(tmp_path / f"1{suffix}", first, 3)


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (3, 100)])
def test_strips_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """Brought to any size they would have that many times as many pixels."""
    Image.new("L", size).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1\.png': a strip of"):
        read(tmp_path / "1.png", size=256)


@pytest.mark.parametrize("side", [9_400, 9_500, 13_000, 100_000, 2**31 - 1])
def test_headers_that_lie(tmp_path: Path, side: int) -> None:
    path = png(tmp_path / "1.png", 8, 2, [bytes(100)], side, side)
    with pytest.raises(DataError, match=r"1\.png': "):
        read(path)


def test_broken_files(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        path = tmp_path / "a\x1b[31m.jpg"
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a whole picture") as raised:
            read(path)
        assert str(raised.value).isprintable()
        assert "a\\x1b[31m.jpg" in str(raised.value)


# How many are decoded at once


@pytest.mark.parametrize(("limit", "most"), [(0, 1), (2 * 4 * S * S, 2), (8 * 4 * S * S, 4)])
def test_decoded_pictures_share_the_room_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    """One at a time where they are large, and as many as there are cores where they are not; all come out the same."""
    for i in range(9):
        Image.fromarray(RGB + np.uint8(i)).save(tmp_path / f"{i}.bmp")
    wanted = load_images(tmp_path, size=S).images
    lock, now, seen, take = threading.Lock(), 0, 0, Room.take

    @contextlib.contextmanager
    def watched(room: Room, nbytes: int) -> Any:
        nonlocal now, seen
        with take(room, nbytes):
            with lock:
                now += 1
                seen = max(seen, now)
            time.sleep(0.01)
            yield
            with lock:
                now -= 1

    monkeypatch.setattr(Room, "take", watched)
    monkeypatch.setattr(read_ahead_module, "usable_cores", lambda: 4)
    monkeypatch.setattr(load_module, "DECODED_SHARE", 0.0)
    monkeypatch.setattr(load_module, "DECODED_BYTES", limit // 4)
    assert load_images(tmp_path, size=S).images.equal(wanted)
    assert seen == most


def test_a_picture_of_more_rows_than_a_strip(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 310, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", size=300), pixels[:, 5:305])
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", channels=1, size=300), pixels[:, 5:305, :1])
