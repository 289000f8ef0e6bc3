"""The Fréchet distance between the features of two sets of images: FID, with the features of Inception-v3."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.stored import StoredTensor, open_content
from ..errors import ArgumentError, CheckpointError, DataError
from ..files import PathLike, check_path, replacing

Extractor = Callable[[Tensor], Tensor]
"""An extractor is a function of images (B, ch, H, W) uint8 that returns their features (B, d)."""


@dataclass(frozen=True)
class Gaussian:
    """A `Gaussian` is the normal distribution that stands for the features of a set of images.

    Attributes:
        mean: (d,) fp64.
        covariance: (d, d) fp64.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.dim() != 1 or tuple(self.covariance.shape) != (d, d):
            got = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ArgumentError("statistics", "a mean (d,) and a covariance (d, d)", got)
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ArgumentError("statistics", "finite values", "infinities or NaNs")

    def save(self, path: PathLike, spatial: Gaussian | None = None) -> None:
        """Writes a `.npz` file with `mu` and `sigma`, as ADM's evaluation suite and pytorch-fid read it.

        Args:
            path: A file name that ends in `.npz`, in an existing folder.
            spatial: The features of sFID, if any, which ADM's suite reads as `mu_s` and `sigma_s`.

        Raises:
            ArgumentError: The path is not a place where such a file can be written.
            OSError: The system refuses to write.
        """
        out = check_path("path", path, (".npz",))
        with replacing(out) as partial, partial.open("wb") as file:
            arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
            if spatial is not None:
                arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
            np.savez(file, **arrays)


class FeatureSums:
    """A `FeatureSums` sums up features f: n, Σ f and Σ f fᵀ, in fp64, whatever their number. d: the size of one."""

    def __init__(self, d: int):
        self.n = 0
        self.sum = torch.zeros(d, dtype=torch.float64, device="cpu")
        self.outer = torch.zeros(d, d, dtype=torch.float64, device="cpu")

    def add(self, features: Tensor) -> None:
        """Adds features (B, d). Raises ArgumentError for another shape, and for infinities and NaNs."""
        if features.dim() != 2 or features.shape[1] != len(self.sum):
            raise ArgumentError("features", f"shape (B, {len(self.sum)})", tuple(features.shape))
        f = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(f).all():
            raise ArgumentError("features", "finite values", "infinities or NaNs")
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def merge(self, other: FeatureSums) -> None:
        """Adds the features that another process has summed up."""
        self.n += other.n
        self.sum += other.sum
        self.outer += other.outer

    def gaussian(self) -> Gaussian:
        """Returns their mean and covariance, with n − 1 below. Raises ArgumentError for fewer than two features."""
        if self.n < 2:
            raise ArgumentError("images", "at least two, to have a covariance", self.n)
        mean = self.sum / self.n
        return Gaussian(mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1))


def feature_sums(images: Iterable[Tensor], extractor: Extractor) -> FeatureSums:
    """Returns the sums of the features of images, of which no more than a batch is held.

    Args:
        images: Batches (B, ch, H, W) uint8.
        extractor: What makes features of them.

    Raises:
        ArgumentError: There are no images, or features are not finite.
    """
    sums: FeatureSums | None = None
    for batch in images:
        with torch.inference_mode():
            features = extractor(batch)
        if sums is None:
            sums = FeatureSums(features.shape[-1])
        sums.add(features)
    if sums is None:
        raise ArgumentError("images", "at least two, to have a covariance", 0)
    return sums


def check_size(d: int, statistics: Gaussian) -> None:
    """Raises ArgumentError unless statistics are of features of d values."""
    if len(statistics.mean) != d:
        raise ArgumentError("statistics", f"features of {d} values, as the images have", len(statistics.mean))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), in fp64, as torchmetrics computes it.

    The trace of the root is the sum of the roots of the eigenvalues of Σ_a Σ_b, whose rounding may make some of them
    negative or complex: these count by the real part of their root.

    Args:
        a: The features of one set of images.
        b: Those of the other set.

    Raises:
        ArgumentError: Their features have different sizes.
    """
    check_size(len(a.mean), b)
    between = (a.mean - b.mean).square().sum()
    within = a.covariance.trace() + b.covariance.trace()
    root = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    return float(between + within - 2 * root)


def read_spatial_statistics(path: PathLike) -> Gaussian | None:
    """Returns the features of sFID in a file of statistics as `read_statistics` takes it, or None if it has none.

    Raises ArgumentError and DataError as `read_statistics` does.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        return None
    return _from_npz(path, ("mu_s", "sigma_s"), needed=False)


def read_statistics(path: PathLike) -> Gaussian:
    """Reads the features of a reference set.

    Args:
        path: A `.npz` file with `mu` and `sigma`, as ADM's references have, or what `Gaussian.save` writes; or a `.pth`
            file of ml-tarflow's or GS-Jacobi's `*_fid_stats.pth`, which is read as data, no pickle running.

    Raises:
        ArgumentError: The statistics are not finite, or their shapes do not go together.
        DataError: The file is missing, damaged, or holds no statistics.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{str(path)!r}: no such file")
    found = _from_npz(path, ("mu", "sigma")) if path.suffix.lower() == ".npz" else _from_torch(path)
    assert found is not None
    return found


def _from_npz(path: Path, names: tuple[str, str], needed: bool = True) -> Gaussian | None:
    """Returns the statistics that a file has under these names, or None where it may lack them and does."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not set(names) <= set(file.files):
                if not needed:
                    return None
                raise DataError(f"{str(path)!r}: no statistics, which are called {' and '.join(names)}")
            mean, covariance = (np.asarray(file[name], np.float64) for name in names)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(path)!r}: no readable .npz file") from error
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))


def _from_torch(path: Path) -> Gaussian:
    names = ("real_features_num_samples", "real_features_sum", "real_features_cov_sum")
    try:
        with ExitStack() as stack:
            tree: Any = open_content(path, stack).tree
            held = [tree.get(name) for name in names] if isinstance(tree, dict) else []
            found = [each for each in held if isinstance(each, StoredTensor) and each.broken is None]
            if len(found) < len(names):
                raise DataError(f"{str(path)!r}: no statistics of torchmetrics' FID, which has {', '.join(names)}")
            count, total, outer = (each.read().double() for each in found)
    except CheckpointError as error:
        raise DataError(f"{str(path)!r}: {error}") from error
    sums = FeatureSums(total.numel())
    if total.dim() != 1 or outer.shape != sums.outer.shape or count.numel() != 1:
        raise DataError(f"{str(path)!r}: statistics whose shapes do not go together")
    sums.n, sums.sum, sums.outer = int(count), total, outer
    return sums.gaussian()
