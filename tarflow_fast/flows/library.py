"""`LibraryFlow` is a family whose transforms are zuko's, and whose slow direction is this project's engine.

A masked autoregressive transform of D values has one direction that is a single pass, and one that zuko makes in D
passes. Where autograd records nothing, `tarflow_fast.accelerate` serves both directions: each unit of the networks is
evaluated once. Where it records, zuko's own operations are used, through which gradients reach the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import zuko
from torch import Tensor, nn

from ..adapters import accelerate
from ..checks import Labels, check_count
from ..errors import ArgumentError
from .base import FamilyFlow


class LibraryFlow(FamilyFlow):
    """z = f(x; y) with a transform of zuko's; images are read as vectors, and classes are a one-hot context.

    A subclass says in `make` what the transform is.
    """

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Any = None):
        super().__init__(data_shape, num_classes, options)
        self.transform = self.make(self.dims, num_classes)
        self._snapshot: tuple[Any, Any] | None = None  # the accelerated flow, and the weights that it was made of

    def make(self, dims: int, classes: int) -> nn.Module:
        """Returns zuko's lazy transform from data to latents.

        dims: D, the number of values in one sample. classes: the number of context features, 0 for none.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """Returns z, (B, *data_shape), and log|det dz/dx|, (B,), of x, (B, *data_shape), and its labels y."""
        return self._run(x, y, inverted=False)

    def inverse(self, z: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """Returns x, (B, *data_shape), and log|det dx/dz|, (B,), of z, (B, *data_shape), and labels y."""
        return self._run(z, y, inverted=True)

    def _run(self, values: Tensor, y: Labels, *, inverted: bool) -> tuple[Tensor, Tensor]:
        context, flat = self.context(y, len(values)), values.flatten(1)
        recorded = torch.is_grad_enabled() and (values.requires_grad or any(p.requires_grad for p in self.parameters()))
        transform = self.transform(context) if recorded or self.dims == 1 else self._fast()(context).transform
        image, log_det = (transform.inv if inverted else transform).call_and_ladj(flat)
        return image.reshape(values.shape), log_det

    def _fast(self) -> Any:
        """Returns the accelerated flow of the weights as they are now; it is made again only after these have changed.

        An optimizer's step and `load_state_dict` write in place, which raises a tensor's version; `to` makes others.
        """
        weights = [*self.transform.parameters(), *self.transform.buffers()]
        key = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
        if self._snapshot is None or self._snapshot[1] != key:
            zeros = torch.zeros(self.dims, device=self.place.device, dtype=self.place.dtype)
            base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, zeros + 1, buffer=True)
            self._snapshot = accelerate(zuko.lazy.Flow(self.transform, base), check=False), key
        return self._snapshot[0]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is copied and pickled of the module: all but the accelerated flow, which is made anew."""
        return {**self.__dict__, "_snapshot": None}


def check_sizes(transforms: int, hidden: tuple[int, ...]) -> None:
    """Raises ArgumentError unless there are transforms, and networks of one or more hidden layers."""
    check_count("transforms", transforms)
    if not hidden:
        raise ArgumentError("hidden", "the widths of one or more hidden layers", hidden)
    for width in hidden:
        check_count("hidden", width)
