"""Precision tells how many images look like the reference's, recall how many of the reference's look like an image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError
from .features import check_features

NEIGHBOURS = 3  # that of the paper, of torch-fidelity and of ADM
BYTES = 2**27  # of the distances that are held at once


def precision_recall(images: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """The improved precision and recall of arXiv 1904.06991, in fp64.

    A set's manifold is the union of the balls around its features, each of which reaches to its k-th nearest neighbour
    in the set. Precision is the share of the images' features in the reference's manifold; recall is the share of the
    reference's in the images'.

    Args:
        images: (n, d), the features of the images.
        reference: (k, d), those of the reference.
        neighbours: The number k of neighbours.

    Returns:
        Precision and recall.

    Raises:
        ArgumentError: Features have different sizes or are not finite, or a set has no more than k.
    """
    neighbours = check_count("neighbours", neighbours)
    check_features("images", images, neighbours + 1)
    check_features("reference", reference, neighbours + 1)
    if images.shape[1] != reference.shape[1]:
        raise ArgumentError("reference", f"features of {images.shape[1]} values, as images has", reference.shape[1])
    a, b = images.detach().double(), reference.detach().to(images.device, torch.float64)
    return _share_within(a, b, _radii(b, neighbours)), _share_within(b, a, _radii(a, neighbours))


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Returns x in parts whose distances to all of y are few enough to be held."""
    return x.split(max(1, BYTES // (8 * len(y))))


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Returns the distance of each row to its k-th nearest neighbour; the nearest of all is the row itself."""
    return torch.cat([torch.cdist(part, x).kthvalue(neighbours + 1).values for part in _rows(x, x)])


def _share_within(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Returns the share of rows that lie in any of the balls."""
    return sum(int((torch.cdist(p, centres) <= radii).any(1).sum()) for p in _rows(x, centres)) / len(x)
