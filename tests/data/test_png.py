"""A plain PNG is read as Pillow reads it, and whatever is odd about a file leaves it to Pillow."""

from __future__ import annotations

import itertools
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tarflow_fast.data import centre_crops, load_images, open_pictures
from tarflow_fast.data import png as module
from tarflow_fast.data.centre_crops import centre_crop, levels
from tarflow_fast.data.load import read_folder
from tarflow_fast.data.pictures import read_picture, reading_pictures
from tarflow_fast.data.png import read_plain_pngs
from tarflow_fast.errors import DataError

if module.NATIVE is None:
    pytest.skip("the reader of PNGs was not built", allow_module_level=True)

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


def read_natively(paths: list[Path], size: tuple[int, int] = (H, W), channels: int = 3) -> list[np.ndarray | None]:
    """Returns the pictures (ch, H, W) that native code reads, and None for what it leaves; no old byte is left over."""
    found = []
    for poison in (0x55, 0xAA):
        out = np.full((len(paths), channels, *size), poison, np.uint8)
        there = read_plain_pngs([str(path) for path in paths], out)
        assert len(there) == len(paths)
        found.append([picture if done else None for picture, done in zip(out, there, strict=True)])
    for once, again in zip(*found, strict=True):
        assert (once is None) == (again is None)
        assert once is None or np.array_equal(once, again)
    return found[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("filters", [[kind] * H for kind in range(5)] + [[4, 3, 1, 2, 0, 3, 4, 4, 2, 1, 3]])
def test_all_filters(tmp_path: Path, channels: int, filters: list[int]) -> None:
    path, pixels = tmp_path / "a.png", PIXELS[..., :channels]
    for width in (W, 1):
        path.write_bytes(png(pixels[:, :width], filters, before=chunk(b"gAMA", bytes(4)), pieces=3))
        wanted = pixels[:, :width].transpose(2, 0, 1)
        assert np.array_equal(read_natively([path], (H, width), channels)[0], wanted)
        assert np.array_equal(read_natively([path], (H, width))[0], np.broadcast_to(wanted, (3, H, width)))


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_several_strips(tmp_path: Path, channels: int) -> None:
    """Rows are inflated some at a time, the first of which needs the last one before; and a row may be longer."""
    for height, width in ((700, 150), (3, 2**16)):
        pixels = np.random.default_rng(2).integers(0, 256, (height, width, channels), dtype=np.uint8) // 64
        Image.fromarray(pixels.squeeze()).save(tmp_path / "a.png")
        found = read_natively([tmp_path / "a.png"], (height, width), channels)[0]
        assert np.array_equal(found, pixels.transpose(2, 0, 1))


def outcome(path: Path) -> object:
    try:
        return read(path).tobytes()
    except DataError as error:
        return str(error)


def outcome_of_pillow(path: Path) -> object:
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(module, "NATIVE", None)
        return outcome(path)


def damaged(rng: np.random.Generator, whole: bytes) -> Iterator[bytes]:
    """Yields files that are cut, with bytes that are others, and with such in chunks whose checksums are right."""
    short = chunk(b"IDAT", zlib.compress(filtered(PIXELS[:5], [4] * 5)))
    yield whole[:33] + short + chunk(b"IEND", b"")
    yield png(PIXELS, [5] * H)
    yield png(PIXELS, [0] * H).replace(b"IDAT", b"IDOT")
    yield whole + b"more"
    yield whole[:-12]
    yield b""
    for _ in range(30):
        yield whole[: rng.integers(len(whole))]
    for _ in range(300):
        other = bytearray(whole)
        other[rng.integers(len(whole)) if rng.random() < 0.5 else rng.integers(70)] = rng.integers(256)
        yield bytes(other)
    for i in range(150):
        levels = bytearray(filtered(PIXELS, [4] * H))
        levels[(i % H) * (1 + 3 * W) if i % 2 else rng.integers(len(levels))] = rng.integers(7)  # perhaps a filter
        packed = zlib.compress(levels[: -1 if i % 9 == 0 else None] + bytes(i % 15 == 0))  # perhaps too few or many
        parts = [(b"IHDR", whole[16:29]), (b"sRGB", b"\0"), (b"IDAT", packed), (b"IEND", b"")]
        if i % 3:
            which = rng.choice(3, p=[0.4, 0.1, 0.5])
            content = bytearray(parts[which][1])
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            parts[which] = parts[which][0], bytes(content)
        yield whole[:8] + b"".join(itertools.starmap(chunk, parts))
    for length in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF):  # sizes that lie
        for at in (8, whole.index(b"sRGB") - 4, whole.index(b"IDAT") - 4, len(whole) - 12):
            yield whole[:at] + struct.pack(">I", length) + whole[at + 4 :]


def test_damage_is_what_pillow_says(tmp_path: Path) -> None:
    """Broken files give the pixels, or the error, that Pillow has for them, one by one and all in one call."""
    whole = png(PIXELS, [0, 1, 2, 3, 4] * 2 + [4], before=chunk(b"sRGB", b"\0"), pieces=2)
    paths, wanted = [], []
    for i, content in enumerate(damaged(np.random.default_rng(1), whole)):
        paths.append(tmp_path / f"{i:03d}.png")
        paths[-1].write_bytes(content)
        wanted.append(outcome_of_pillow(paths[-1]))
        assert outcome(paths[-1]) == wanted[-1], content
    found = read_natively(paths)
    assert 20 < sum(picture is not None for picture in found) < len(found) / 2
    for picture, pixels in zip(found, wanted, strict=True):
        assert picture is None or picture.tobytes() == pixels


def test_what_is_not_plain_is_left_to_pillow(tmp_path: Path) -> None:
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    text.add_text("XML:com.adobe.xmp", '<a tiff:Orientation="6"/>')
    picture, path = Image.fromarray(PIXELS), tmp_path / "a.png"
    for kind, how in (("RGB", {"exif": exif}), ("RGB", {"pnginfo": text}), ("RGB", {"transparency": (1, 2, 3)})):
        picture.convert(kind).save(path, **how)
        assert read_natively([path]) == [None]
    for kind in ("RGBA", "LA", "P", "1", "I;16"):
        (Image.fromarray(PIXELS[..., 0].astype(np.uint16)) if kind == "I;16" else picture.convert(kind)).save(path)
        assert read_natively([path]) == [None]
    picture.save(path, save_all=True, append_images=[Image.new("RGB", (W, H))])
    assert read_natively([path]) == [None]
    levels = zlib.compress(filtered(PIXELS, [4] * H))
    for pieces in ([levels + b"more"], [levels, b"more"]):  # after the end of the levels
        parts = [chunk(b"IDAT", piece) for piece in pieces]
        path.write_bytes(png(PIXELS, [4] * H)[:33] + b"".join(parts) + chunk(b"IEND", b""))
        assert read_natively([path]) == [None]
    picture.save(path)
    picture.save(tmp_path / "a.jpg", "PNG")  # a JPEG would be read twice
    assert read_natively([path, tmp_path / "a.jpg"])[1] is None
    assert read_natively([path], channels=1) == read_natively([path], (W, H)) == [None]


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """A hundred pictures: every fifth is grey, every seventh of another size, every eleventh transparent or no PNG."""
    folder, rng = tmp_path / "mixed", np.random.default_rng(3)
    folder.mkdir()
    for i in range(100):
        pixels = rng.integers(0, 256, (H + (i % 7 == 0), W, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels[..., 0] if i % 5 == 0 else pixels)
        picture = picture.convert("RGBA") if i % 22 == 0 else picture
        picture.save(folder / f"{i:03d}.{'bmp' if i % 22 == 11 else 'png'}")
    return sorted(folder.iterdir())


def test_all_ways_read_a_mixed_folder_as_pillow_does(mixed: list[Path]) -> None:
    def everything() -> list[np.ndarray]:
        pictures = open_pictures(mixed[0].parent)
        assert pictures is not None
        names = [str(path) for path in mixed]
        crops = [np.stack(list(centre_crops(names, H, numbers))) for numbers in (range(100), range(70, 90))]
        streamed = [np.stack(list(pictures.read(numbers, (H, W)))) for numbers in (range(100), range(3, 93))]
        return [load_images(mixed[0].parent, size=(H, W)).images.numpy(), *streamed, *crops]

    plain = [found is not None for found in read_natively(mixed)]
    assert plain == [i % 7 != 0 and i % 11 != 0 for i in range(100)]
    found = everything()
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(module, "NATIVE", None)
        for ours, theirs in zip(found, everything(), strict=True):
            assert np.array_equal(ours, theirs)
    assert np.array_equal(found[1], found[0])
    assert np.array_equal(found[2], found[0][3:93])
    assert np.array_equal(found[4], found[3][70:90])


def test_plain_squares_are_cropped_to_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(PIXELS[:, :H], [4] * H))
    (found,) = centre_crops([str(path)], H, range(1))
    wanted = levels().numpy()[PIXELS[:, :H].transpose(2, 0, 1)]
    assert np.array_equal(found, wanted) or np.array_equal(found, wanted[..., ::-1])
    assert np.array_equal(centre_crop(str(path), H), PIXELS[:, :H].transpose(2, 0, 1))


@pytest.mark.parametrize("first", ["gone", "loop", "damaged", "folder", "pipe"])
def test_the_first_that_cannot_be_read_is_named(mixed: list[Path], first: str) -> None:
    """Among good pictures there are two that nobody can read; nobody waits for the end of a pipe."""
    if first == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes that have names")
    for path in (mixed[41], mixed[78]):
        path.unlink()
        if first == "loop":
            path.symlink_to(path)
        elif first == "damaged":
            path.write_bytes(png(PIXELS, [4] * H)[:-40])
        elif first == "folder":
            path.mkdir()
        elif first == "pipe":
            os.mkfifo(path)
    names = [str(path) for path in mixed]
    assert [i for i, found in enumerate(read_natively(mixed[36:48]), 36) if found is None and i % 7 and i % 11] == [41]
    with pytest.raises(DataError, match=rf"{mixed[41].name}': no"):
        list(centre_crops(names, H, range(100)))
    with pytest.raises(DataError, match=rf"{mixed[78].name}': no"):
        list(centre_crops(names, H, range(42, 100)))
    with pytest.raises(DataError, match=rf"{mixed[41].name}': not a whole picture"), reading_pictures():
        read_folder(names, np.empty((100, 3, H, W), np.uint8))


def test_levels_without_end_take_no_memory(tmp_path: Path) -> None:
    """A file of a megabyte that inflates to a gigabyte."""
    resource = pytest.importorskip("resource")
    packer = zlib.compressobj(9)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    head, path = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0), tmp_path / "a.png"
    levels = block + block[2:] * 1023  # after the zlib header, blocks that stand for themselves
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", levels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_natively([path]) == [None]
    assert not read(path).any()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 2**26


def test_without_the_native_reader_pillow_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(module, "NATIVE", None)
    assert read_plain_pngs([str(tmp_path / "a.png")], np.empty((1, 3, H, W), np.uint8)) == [False]
    assert np.array_equal(read(tmp_path / "a.png"), PIXELS.transpose(2, 0, 1))
