"""This module writes images as PNG files for the other examples."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images, (n, 1 or 3, H, W) on the scale -1 to 1, to one PNG, `columns` of them in a row."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    blank = pixels.new_full((-len(pixels) % columns, *pixels.shape[1:]), 255)  # what is left of the last row
    rows = [torch.cat(list(row), dim=2) for row in torch.cat([pixels, blank]).split(columns)]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0)  # (ch, height, width) to (height, width, ch)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.squeeze(2).numpy()).save(path)
