"""Pictures of a model: density beside samples in the plane, on the torus and on the sphere; images in a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ArgumentError
from ..files import PathLike, check_path, replacing
from ..images import PICTURE_SUFFIXES, save_grid
from .base import FamilyFlow

SIDE, ZOOM = 128, 3  # points along the side of a density's grid, and pixels along the side of a point
GAP = 8  # pixels between density and samples
SAMPLES = 20_000
COLUMNS = 8  # of a grid of images without classes
BATCH = 4096
MARGIN = 1.15  # how far beyond the farthest samples (but one in a thousand) the plane is shown
MOST_SMALL = 64  # pixels; smaller images are enlarged
COLOURS = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))

Projection = Callable[[Tensor], Tensor]


def draw_picture(
    model: FamilyFlow,
    path: PathLike,
    *,
    seed: int = 0,
    rows: int = 4,
    columns: int | None = None,
    samples: Tensor | None = None,
) -> None:
    """Writes a picture of a model: its density beside its samples, or a grid of images, a class a column.

    Args:
        model: A model whose data are 2-D vectors, points of the sphere or the torus, or images of 1 or 3 channels.
        path: A `.png` or `.jpg` file.
        seed: The seed of the samples.
        rows: The number of rows of a grid of images.
        columns: The number of its columns, by default one for each class, or 8.
        samples: Samples that are there already, or None.

    Raises:
        ArgumentError: The data of the model make no picture, or the path cannot be written.
    """
    file = check_path("path", path, PICTURE_SUFFIXES)
    kind = kind_of_data(model)
    random = torch.Generator(model.place.device).manual_seed(seed)
    if kind == "images":
        columns = columns or model.num_classes or COLUMNS
        x = drawn(model, columns * rows, random) if samples is None else samples
        _draw_images(model, file, x.cpu(), columns)
        return
    x = drawn(model, SAMPLES, random) if samples is None else samples
    x = x.cpu().float()
    inside, points, projection = _chart(kind, x)
    density = np.zeros(SIDE * SIDE)
    density[inside] = _density(model, points, random)
    panels = [_coloured(density.reshape(SIDE, SIDE)), _coloured(_counts(projection(x)))]
    gap = np.full((SIDE * ZOOM, GAP, 3), 255, np.uint8)
    with replacing(file) as partial:
        Image.fromarray(np.concatenate([panels[0], gap, panels[1]], axis=1)).save(partial)


def kind_of_data(model: FamilyFlow) -> str:
    """Returns the kind of data that a picture can be made of. Raises ArgumentError where there is none."""
    shape = model.data_shape
    kind = str(model.metadata.get("kind", "images" if len(shape) == 3 else "vectors"))
    shown = {"vectors": shape == (2,), "torus": shape == (2,), "sphere": shape == (3,)}
    shown["images"] = len(shape) == 3 and shape[0] in (1, 3)
    if not shown.get(kind, False):
        raise ArgumentError("model", "2-D vectors, points on sphere or torus, or pictures", f"{kind} of shape {shape}")
    return kind


def drawn(model: FamilyFlow, n: int, random: torch.Generator, labels: Any = None) -> Tensor:
    """Returns n samples, in batches, of the classes in turn where no labels are given."""
    if labels is None and model.num_classes:
        labels = torch.arange(n) % model.num_classes
    parts = []
    for first in range(0, n, BATCH):
        count = min(BATCH, n - first)
        y = labels[first : first + count] if isinstance(labels, Tensor) else labels
        parts.append(model.sample(count, y, generator=random))
    return torch.cat(parts)


def _draw_images(model: FamilyFlow, path: Path, x: Tensor, columns: int) -> None:
    """Writes a grid of images: of levels as they are, of other values with the largest in white or black."""
    images = x.to(torch.uint8) if getattr(model, "levels", False) else x / x.abs().amax().clamp(min=1e-6)
    save_grid(images, path, columns, scale=max(1, MOST_SMALL // model.data_shape[1]))


def _chart(kind: str, x: Tensor) -> tuple[NDArray[Any], Tensor, Projection]:
    """Returns which of the SIDE² points are data, these data, and what puts data at [0, 1)² of the picture."""
    u, v = ((torch.arange(SIDE) + 0.5) / SIDE for _ in range(2))
    v, u = torch.meshgrid(v.flip(0), u, indexing="ij")  # the first row is the highest
    unit = torch.stack([u, v], -1).reshape(-1, 2)
    if kind == "sphere":
        return _mollweide(unit)
    if kind == "torus":
        low, high = torch.zeros(2), torch.full((2,), 2 * math.pi)
    else:
        extent = MARGIN * torch.quantile(x.abs().amax(1), 0.999)
        low, high = (-extent).expand(2), extent.expand(2)
    every = np.ones(SIDE * SIDE, dtype=bool)
    return every, low + unit * (high - low), lambda x: (x - low) / (high - low)


def _mollweide(unit: Tensor) -> tuple[NDArray[Any], Tensor, Projection]:
    """Returns what `_chart` does, of the sphere in Mollweide's projection, which keeps areas."""
    x, y = 2 * unit[:, 0] - 1, 2 * unit[:, 1] - 1
    inside = (x.square() + (2 * y).square() < 1).numpy()  # an ellipse, twice as wide as it is high
    theta = torch.asin((2 * y).clamp(-1, 1))
    latitude = torch.asin(((2 * theta + torch.sin(2 * theta)) / math.pi).clamp(-1, 1))
    longitude = math.pi * x / torch.cos(theta).clamp(min=1e-6)
    flat = torch.cos(latitude)
    points = torch.stack([flat * torch.cos(longitude), flat * torch.sin(longitude), torch.sin(latitude)], 1)

    def project(p: Tensor) -> Tensor:
        latitude, longitude = torch.asin(p[:, 2].clamp(-1, 1)), torch.atan2(p[:, 1], p[:, 0])
        theta = latitude.clone()
        for _ in range(20):  # Newton's method for 2θ + sin 2θ = π sin(latitude)
            slope = (2 + 2 * torch.cos(2 * theta)).clamp(min=1e-3)
            theta = theta - (2 * theta + torch.sin(2 * theta) - math.pi * torch.sin(latitude)) / slope
        across = longitude / math.pi * torch.cos(theta)
        return torch.stack([(across + 1) / 2, (torch.sin(theta) / 2 + 1) / 2], 1)

    return inside, points[torch.from_numpy(inside)], project


@torch.no_grad()
def _density(model: FamilyFlow, points: Tensor, random: torch.Generator) -> NDArray[Any]:
    """Returns p at points, the mean over classes where there are any."""
    classes = range(model.num_classes) if model.num_classes else [None]
    total = np.zeros(len(points))
    for y in classes:
        parts = points.to(model.place.device, model.place.dtype).split(BATCH)
        found = torch.cat([model.log_prob(part, y, generator=random).cpu() for part in parts])
        total += found.double().exp().numpy() / len(classes)
    return total


def _counts(unit: Tensor) -> NDArray[Any]:
    """Returns how many points of [0, 1)² are in each field of the picture, the highest first."""
    found, _, _ = np.histogram2d(1 - unit[:, 1].numpy(), unit[:, 0].numpy(), bins=SIDE, range=[[0, 1], [0, 1]])
    return found


def _coloured(values: NDArray[Any]) -> NDArray[Any]:
    """Returns a picture of values >= 0, (SIDE · ZOOM, SIDE · ZOOM, 3) uint8: black is 0, light the 99.5 % quantile."""
    top = np.quantile(values[values > 0], 0.995) if (values > 0).any() else 1.0
    share = np.clip(np.nan_to_num(values) / top, 0, 1) ** 0.7
    anchors = np.linspace(0, 1, len(COLOURS))
    picture = np.stack([np.interp(share, anchors, [colour[k] for colour in COLOURS]) for k in range(3)], -1)
    return np.rint(picture).astype(np.uint8).repeat(ZOOM, 0).repeat(ZOOM, 1)
