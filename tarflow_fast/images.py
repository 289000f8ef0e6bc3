"""Pictures of images: 8-bit conversion, grids, PNG and GIF files. Batches are (N, ch, H, W), ch = 1 or 3."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .checks import check_count, check_dense, check_number, short
from .devices import free_memory
from .errors import ArgumentError
from .files import PathLike, check_path, replacing
from .limits import MOST_SIZE

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
PAD_VALUE = 255
MOST_PIXELS = {".png": 2**31 - 1, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535}
"""The most pixels along a side, by the kind of file: the format's limit, or for JPEG that of the usual library."""
INFO_KEY = "tarflow_fast"  # the keyword of the text chunk that says how a PNG was made


def to_uint8(images: Tensor) -> Tensor:
    """v = round((x + 1) · 127.5), saturated to 0..255.

    images: any shape, floating point, where -1 is black and 1 is white. An 8-bit picture holds no more than that, so
    values outside become black or white. A uint8 tensor comes back as it is. Returns uint8 of the same shape, on the
    CPU. Raises ArgumentError for other dtypes, infinities and NaNs.
    """
    if not isinstance(images, Tensor):
        raise ArgumentError("images", "a tensor", type(images).__name__)
    check_dense("images", images)
    if images.dtype == torch.uint8:
        return images.detach().cpu()
    if not images.is_floating_point():
        raise ArgumentError("images", "a floating-point or uint8 tensor", short(images.dtype))
    x = images.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(x).all():
        raise ArgumentError("images", "finite values", "a tensor with infinities or NaNs")
    return torch.from_numpy(np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8))


def grid_size(count: int, height: int, width: int, columns: int, pad: int, scale: int) -> tuple[int, int]:
    """Returns (height, width) in pixels of the `grid` of so many images."""
    rows = -(-count // columns)
    return rows * (height * scale + pad) + pad, columns * (width * scale + pad) + pad


def check_grid(
    argument: str,
    path: PathLike,
    count: int,
    image_shape: tuple[int, ...],
    columns: int,
    *,
    pad: int = 2,
    scale: int = 1,
    frames: int = 1,
) -> None:
    """Raises ArgumentError, which names the argument, unless a grid of so many images can be made and saved.

    The limits are those of memory and of that kind of file. image_shape: (ch, H, W). frames: the number of frames of an
    animation.
    """
    ch, *size = image_shape
    if ch not in (1, 3):
        raise ArgumentError(argument, "images of 1 or 3 channels, which a picture can show", f"{ch} channels")
    height, width = grid_size(count, size[0], size[1], columns, pad, scale)
    kind = Path(path).suffix.lower()
    what = f"{count} images, {columns} in a row, {width} × {height} pixels"
    if max(height, width) > MOST_PIXELS[kind]:
        raise ArgumentError(argument, f"at most {MOST_PIXELS[kind]} pixels along a side of a {kind} file", what)
    needed = (3 + frames) * ch * height * width  # `grid` makes three copies on the way
    free = free_memory(torch.device("cpu"))
    if needed > free:
        lacking = f"{what}, for which {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} are free"
        raise ArgumentError(argument, "a picture that memory can hold", lacking)


def grid(images: Tensor, columns: int | None = None, pad: int = 2, scale: int = 1) -> NDArray[np.uint8]:
    """Returns images side by side, row after row, with a white frame around each: (height, width, ch) uint8.

    images: (N, ch, H, W) as for `to_uint8`, N >= 1, ch 1 or 3. columns: the number of images in a row, ⌈√N⌉ unless
    given; cells left over are white. pad: the width of the frame in pixels. scale: how many times each image is
    enlarged, its pixels becoming squares. The height is rows · (H · scale + pad) + pad. Raises ArgumentError.
    """
    pixels = to_uint8(images).numpy()
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape:
        raise ArgumentError("images", "shape (N, 1 or 3, H, W), none of them 0", tuple(pixels.shape))
    count = pixels.shape[0]
    columns = math.ceil(math.sqrt(count)) if columns is None else check_count("columns", columns, high=MOST_SIZE)
    pad, scale = check_count("pad", pad, 0, MOST_SIZE), check_count("scale", scale, high=MOST_SIZE)
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    _, ch, height, width = pixels.shape
    rows = math.ceil(count / columns)
    cells = np.full((rows, columns, height + pad, width + pad, ch), PAD_VALUE, np.uint8)
    flat = cells.reshape(rows * columns, *cells.shape[2:])
    flat[:count, pad:, pad:] = pixels.transpose(0, 2, 3, 1)
    sheet = cells.transpose(0, 2, 1, 3, 4).reshape(rows * (height + pad), columns * (width + pad), ch)
    return np.pad(sheet, ((0, pad), (0, pad), (0, 0)), constant_values=PAD_VALUE)


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Returns the picture of pixels (height, width, 1 or 3)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _how(info: Mapping[str, Any] | None) -> PngInfo | None:
    """Returns a PNG's text chunk with `info` as JSON, which is ASCII, as the chunk has to be. Raises ArgumentError."""
    if info is None:
        return None
    chunks = PngInfo()
    try:
        chunks.add_text(INFO_KEY, json.dumps(info))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError("info", "what JSON can hold", str(error)) from error
    return chunks


def save_grid(
    images: Tensor,
    path: PathLike,
    columns: int | None = None,
    *,
    pad: int = 2,
    scale: int = 1,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write images side by side, row after row, to a PNG or JPEG file, replacing it.

    Args:
        images: (N, ch, H, W), N >= 1, ch = 1 or 3. Floating-point values of -1 are black and 1 white, and values
            outside become black or white; uint8 values are pixels already.
        path: A file name that ends in .png, .jpg or .jpeg, in an existing folder.
        columns: The number of images in a row, ⌈√N⌉ unless given. Cells left over are white.
        pad: The width in pixels of the white frame around each image.
        scale: How many times each image is enlarged, its pixels becoming squares.
        info: How the images were made. A PNG holds it as JSON in its text chunk "tarflow_fast"; a JPEG leaves it out.

    Returns:
        The path of the file.

    Raises:
        ArgumentError: An argument has the wrong type, shape or range, the images have infinities or NaNs, the picture
            is too large for that kind of file, or `info` cannot be written as JSON.
        OSError: The system refuses to write.
    """
    out = check_path("path", path, PICTURE_SUFFIXES)
    picture = _picture(grid(images, columns, pad, scale))
    _check_side(picture, out)
    options: dict[str, Any] = {"pnginfo": _how(info)} if out.suffix.lower() == ".png" else {"quality": 95}
    with replacing(out) as partial:
        picture.save(partial, **options)
    return out


def save_png(
    image: Tensor, path: PathLike, *, scale: int = 1, info: Mapping[str, Any] | None = None, sweep: bool = True
) -> Path:
    """Write one image without a frame to a PNG file, replacing it, and return its path.

    image: (ch, H, W) as for `to_uint8`. scale: see `grid`. info: see `save_grid`. sweep: see `files.replacing`. Raises
    ArgumentError.
    """
    out = check_path("path", path, (".png",))
    if not isinstance(image, Tensor) or image.dim() != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ArgumentError("image", "a tensor (1 or 3, H, W)", got)
    picture = _picture(grid(image[None], 1, 0, scale))
    with replacing(out, sweep=sweep) as partial:
        picture.save(partial, pnginfo=_how(info))
    return out


def encode_png(image: Tensor, info: Mapping[str, Any] | None = None) -> bytes:
    """Returns the PNG file of one image. image: (ch, H, W) as for `to_uint8`. info: see `save_grid`."""
    file = io.BytesIO()
    _picture(grid(image[None], 1, 0)).save(file, "png", pnginfo=_how(info))
    return file.getvalue()


def _check_side(picture: Image.Image, path: Path) -> None:
    """Raises ArgumentError where that kind of file cannot hold the picture."""
    kind = path.suffix.lower()
    if max(picture.size) > MOST_PIXELS[kind]:
        got = f"{picture.width} × {picture.height} pixels"
        raise ArgumentError("path", f"at most {MOST_PIXELS[kind]} pixels along a side of a {kind} file", got)


def save_gif(
    frames: Sequence[Tensor],
    path: PathLike,
    columns: int | None = None,
    *,
    pad: int = 2,
    scale: int = 1,
    seconds: float = 0.25,
    hold: float = 2.0,
) -> Path:
    """Write an endless animation, one grid a frame, to a GIF file, replacing it, and return its path.

    frames: batches (N, ch, H, W) of one shape, the first shown first. columns, pad, scale: see `grid`. seconds: how
    long each frame shows. hold: how many seconds the last frame shows. Raises ArgumentError.
    """
    out = check_path("path", path, (".gif",))
    seconds, hold = check_number("seconds", seconds, 0.01), check_number("hold", hold, 0.01)
    if not isinstance(frames, Sequence) or not frames:
        raise ArgumentError("frames", "a sequence of at least one batch of images", type(frames).__name__)
    if any(not isinstance(f, Tensor) or f.shape != frames[0].shape for f in frames):
        shapes = [tuple(getattr(f, "shape", ())) for f in frames]
        raise ArgumentError("frames", "tensors of one shape", shapes)
    pictures = [_picture(grid(f, columns, pad, scale)) for f in frames]
    _check_side(pictures[0], out)
    durations = [round(seconds * 1000)] * (len(pictures) - 1) + [round(hold * 1000)]
    with replacing(out) as partial:
        pictures[0].save(partial, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return out
