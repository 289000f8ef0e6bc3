"""The features of images at several denoising rates may be written in shards, in the place of the images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..devices import torch_threads
from ..errors import ArgumentError
from ..files import PathLike, replacing
from ..images import to_uint8
from ..sampling.report import Samples
from ..sampling.sharded import Format, shard_files
from ..sampling.sharded.formats import SWEEP, Add, Shard
from .fid import Extractor, FeatureSums, Gaussian, check_size


@dataclass(frozen=True)
class Rates:
    """`Rates` make the features of images at several denoising rates.

    rates: the rates. extractor: what makes features. reference: what they will be compared to.
    """

    rates: Sequence[float]
    extractor: Extractor
    reference: Gaussian

    def features(self, part: Samples) -> list[Tensor]:
        """Returns the features (B, d) of images at each rate.

        part: the images at rate 1, with their trajectory, which ends with those at rate 0; or, without one, at rate 0.
        Raises ArgumentError for features of another size than the reference's.
        """
        y = part.images
        x = y if part.trajectory is None else part.trajectory[-1]
        found = [self.extractor(to_uint8(x if rate == 0 else x + rate * (y - x))) for rate in self.rates]
        check_size(found[0].shape[1], self.reference)
        return found

    def format(self, denoised: bool, told: Callable[[int], object]) -> Format:
        """Returns the format of shards that hold these features, for `draw_shards`.

        A shard is a `.npz` file with `features` (k, rates, d) fp32. On a CPU they are computed on one thread of each
        process. denoised: whether the images are. told: called with the number of images that have just been drawn.
        Raises ArgumentError for an extractor without a name.
        """
        extractor: Any = self.extractor
        if not hasattr(type(extractor), "name") and not hasattr(extractor, "name"):
            raise ArgumentError("extractor", "one with a name, which tells its features from others'", repr(extractor))

        @contextlib.contextmanager
        def writing(shard: Shard) -> Iterator[Add]:
            held: list[NDArray[np.float32]] = []

            def add(part: Samples) -> None:
                with torch_threads(1):
                    features = self.features(part)
                held.append(torch.stack(features, 1).detach().float().cpu().numpy())
                told(len(part.images))

            with replacing(shard.out / f"{shard.name}.npz", sweep=SWEEP) as partial:
                yield add
                with partial.open("wb") as file:
                    np.savez(file, features=np.concatenate(held))

        def made_by() -> str:
            return f"{extractor.name} at denoising rates {', '.join(f'{float(rate)!r}' for rate in self.rates)}"

        return Format("features", writing, ".npz", made_by, trajectory=denoised)

    def read(self, out: PathLike) -> list[FeatureSums]:
        """Returns the sums of the features of a run that is done, for each rate. Raises as `shard_files` does."""
        sums: list[FeatureSums] = []
        for path in shard_files(out)[1]:
            with np.load(path, allow_pickle=False) as file:
                features = torch.from_numpy(file["features"])
            sums = sums or [FeatureSums(features.shape[2]) for _ in self.rates]
            for total, each in zip(sums, features.unbind(1), strict=True):
                total.add(each)
        return sums
