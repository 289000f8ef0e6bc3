"""`LibraryTransform` is a transform of zuko's as a bijection, whose slow direction is this project's engine.

A masked autoregressive transform of D values has one direction that is a single pass, and one that zuko makes in D
passes. Where autograd records nothing, `tarflow_fast.accelerate` serves both directions: each unit of the networks is
evaluated once. Where it records, zuko's own networks are used, through which gradients reach the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import zuko
from torch import Tensor, nn

from ..adapters import accelerate
from ..checks import check_count
from ..errors import ArgumentError
from .base import Bijection


class LibraryTransform(Bijection):
    """z = f(x; c) with a lazy transform of zuko's; images are read as vectors.

    transform: The lazy transform from data to latents, whose context has as many features as there are classes.
    """

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform
        self._snapshot: tuple[Any, Any] | None = None  # the accelerated flow, and the weights that it was made of

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverted=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverted=True)

    def _run(self, values: Tensor, context: Tensor | None, *, inverted: bool) -> tuple[Tensor, Tensor]:
        flat = values.flatten(1)
        recorded = torch.is_grad_enabled() and (values.requires_grad or any(p.requires_grad for p in self.parameters()))
        if recorded or flat.shape[1] == 1:  # one value depends on no other, so that there is nothing to be cached
            transform = self.transform(context)
        else:
            transform = self._accelerated(flat)(context).transform
        image, log_det = (transform.inv if inverted else transform).call_and_ladj(flat)
        return image.reshape(values.shape), log_det

    def _accelerated(self, like: Tensor) -> Any:
        """Returns the accelerated flow of the weights as they are now; it is made again only after these have changed.

        An optimizer's step and `load_state_dict` write in place, which raises a tensor's version; `to` makes others.
        """
        weights = [*self.transform.parameters(), *self.transform.buffers()]
        key = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
        if self._snapshot is None or self._snapshot[1] != key:
            zero = like.new_zeros(like.shape[1])  # zuko's flows have a base, which nothing here uses
            base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zero, zero + 1, buffer=True)
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
