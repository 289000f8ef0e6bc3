"""A plain PNG is read as Pillow reads it, and whatever is odd about a file leaves it to Pillow."""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tarflow_fast.data import pictures
from tarflow_fast.data.centre_crops import centre_crop
from tarflow_fast.data.pictures import read_picture, reading_pictures
from tarflow_fast.data.png import open_plain_png
from tarflow_fast.errors import BackendError, DataError
from tarflow_fast.native import load_native

try:
    load_native()
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)

H, W = 11, 13
PIXELS = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
PIXELS[::2] //= 16  # smooth and noisy rows, for which other predictions are near


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def filtered(pixels: np.ndarray, filters: list[int]) -> bytes:
    """Returns the rows of a picture (H, W, ch) as PNG stores them; the predictions are as its standard has them."""
    channels, rows = pixels.shape[2], b""
    x = np.pad(pixels.astype(int), ((1, 0), (1, 0), (0, 0)))
    for y, kind in enumerate(filters, 1):
        left, up, corner = x[y, :-1], x[y - 1, 1:], x[y - 1, :-1]
        near = np.stack([left, up, corner])
        paeth = np.take_along_axis(near, np.abs(left + up - corner - near).argmin(0)[None], 0)[0]
        predicted = [0 * left, left, up, (left + up) // 2, paeth, 0 * left][kind]
        rows += bytes([kind]) + ((x[y, 1:] - predicted) % 256).astype(np.uint8).tobytes()
    assert len(rows) == len(pixels) * (1 + pixels.shape[1] * channels)
    return rows


def png(pixels: np.ndarray, filters: list[int], before: bytes = b"", after: bytes = b"", pieces: int = 1) -> bytes:
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0 if pixels.shape[2] == 1 else 2, 0, 0, 0)
    packed = zlib.compress(filtered(pixels, filters))
    cuts = np.linspace(0, len(packed), pieces + 1).astype(int).tolist()
    parts = [chunk(b"IDAT", packed[i:j]) for i, j in itertools.pairwise(cuts)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + b"".join(parts) + after + chunk(b"IEND", b"")


def read(path: Path, size: tuple[int, int] = (H, W), channels: int = 3) -> np.ndarray:
    with reading_pictures():
        return read_picture(str(path), size, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("filters", [[kind] * H for kind in range(5)] + [[4, 3, 1, 2, 0, 3, 4, 4, 2, 1, 3]])
def test_all_filters(tmp_path: Path, channels: int, filters: list[int]) -> None:
    path, pixels = tmp_path / "a.png", PIXELS[..., :channels]
    for width in (W, 1):
        path.write_bytes(png(pixels[:, :width], filters, before=chunk(b"gAMA", bytes(4)), pieces=3))
        assert open_plain_png(str(path)) is not None
        wanted = pixels[:, :width].transpose(2, 0, 1)
        assert np.array_equal(read(path, (H, width), channels), wanted)
        assert np.array_equal(read(path, (H, width)), np.broadcast_to(wanted, (3, H, width)))
    for size, depth in (((8, 8), 3), ((20, 9), 1)):  # resized, and in other channels, as Pillow does it
        path.write_bytes(png(pixels, filters))
        found, crop = read(path, size, depth), centre_crop(str(path), size[0])
        path.write_bytes(png(pixels, filters, after=chunk(b"tEXt", b"a\0b")))  # left to Pillow
        assert open_plain_png(str(path)) is None
        assert np.array_equal(found, read(path, size, depth))
        assert np.array_equal(crop, centre_crop(str(path), size[0]))


def test_a_square_is_cropped_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(PIXELS[:, :H], [4] * H))
    assert np.array_equal(centre_crop(str(tmp_path / "a.png"), H), PIXELS[:, :H])


def outcome(path: Path) -> object:
    try:
        return read(path).tobytes()
    except DataError as error:
        return str(error)


def test_damage_is_what_pillow_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are cut, and with bytes that are others, give the same pixels, or the same error."""
    rng, path, plain = np.random.default_rng(1), tmp_path / "a.png", 0
    whole = png(PIXELS, [0, 1, 2, 3, 4] * 2 + [4], before=chunk(b"sRGB", b"\0"), pieces=2)
    short = chunk(b"IDAT", zlib.compress(filtered(PIXELS[:5], [4] * 5)))
    bad = [
        whole[:33] + short + chunk(b"IEND", b""),
        png(PIXELS, [5] * H),
        png(PIXELS, [0] * H).replace(b"IDAT", b"IDOT"),
        whole + b"more",
        whole[:-12],
    ]
    bad += [whole[: rng.integers(len(whole))] for _ in range(30)]
    for _ in range(300):
        other = bytearray(whole)
        other[rng.integers(len(whole)) if rng.random() < 0.5 else rng.integers(70)] = rng.integers(256)
        bad.append(bytes(other))
    for content in bad:
        path.write_bytes(content)
        plain += open_plain_png(str(path)) is not None
        found = outcome(path)
        with monkeypatch.context() as without:
            without.setattr(pictures, "open_plain_png", lambda path: None)
            assert outcome(path) == found, content
    assert 20 < plain < 300


def test_what_is_not_plain_is_left_to_pillow(tmp_path: Path) -> None:
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    text.add_text("XML:com.adobe.xmp", '<a tiff:Orientation="6"/>')
    picture, path = Image.fromarray(PIXELS), tmp_path / "a.png"
    for kind, how in (("RGB", {"exif": exif}), ("RGB", {"pnginfo": text}), ("RGB", {"transparency": (1, 2, 3)})):
        picture.convert(kind).save(path, **how)
        assert open_plain_png(str(path)) is None
    for kind in ("RGBA", "LA", "P", "1", "I;16"):
        (Image.fromarray(PIXELS[..., 0].astype(np.uint16)) if kind == "I;16" else picture.convert(kind)).save(path)
        assert open_plain_png(str(path)) is None
    picture.save(path, save_all=True, append_images=[Image.new("RGB", (W, H))])
    assert open_plain_png(str(path)) is None


def test_a_stream_that_never_ends_takes_no_memory(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)
    endless = zlib.compress(bytes(2**26))
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", endless) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert not read(tmp_path / "a.png").any()


def test_rows_have_to_be_whole() -> None:
    with pytest.raises(ValueError, match="rows: not as many bytes as the sizes say"):
        load_native().unfilter_png(rows=bytes(9), height=1, width=3, channels=3, planar=True, out=0)
