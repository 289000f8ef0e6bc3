"""The kernel distance of features compares two sets of images without bias, however few they are: KID."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError
from .features import check_features

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED
) -> tuple[float, float]:
    """The unbiased MMD² of features under the kernel k(x, y) = (x·y/d + 1)³, in fp64, of random subsets.

    With k over m features of each set, MMD² = Σ_{i≠j} (k(a_i, a_j) + k(b_i, b_j)) / (m(m − 1)) − 2 Σ_{ij} k(a_i, b_j) /
    m². Subsets are torch-fidelity's, so that the results are the same.

    Args:
        a: (n, d), the features of one set of images.
        b: (k, d), those of the other set.
        subsets: The number of subsets.
        subset_size: The number of images of a subset, taken without repetition; at most as many as a set has.
        seed: The seed of the subsets.

    Returns:
        The mean and the standard deviation over the subsets, with as many as there are below.

    Raises:
        ArgumentError: Features have different sizes or are not finite, or a set has fewer than two.
    """
    subsets, subset_size = check_count("subsets", subsets), check_count("subset_size", subset_size, 2)
    check_features("a", a, 2)
    check_features("b", b, 2)
    if a.shape[1] != b.shape[1]:
        raise ArgumentError("b", f"features of {a.shape[1]} values, as a has", b.shape[1])
    a, b, m = a.detach().cpu(), b.detach().cpu(), min(subset_size, len(a), len(b))
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x, y = (each[torch.from_numpy(rng.choice(len(each), m, replace=False))].double() for each in (a, b))
        xx, yy = _kernel(x, x), _kernel(y, y)
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        found.append(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())
    result = torch.stack(found)
    return float(result.mean()), float(result.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
