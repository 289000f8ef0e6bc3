"""zuko's rational-quadratic spline by one fused operation, for flows that are trained through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

from ..fused import fused_spline
from ..spline import SplineLaw


class FusedRQSTransform(MonotonicRQSTransform):
    """`zuko.transforms.MonotonicRQSTransform` whose map, inverse and gradients are one pass over memory each.

    widths, heights: (…, K), unconstrained. derivatives: (…, K − 1). bound, slope: as zuko has them. The parameters are
    joined, as the operation takes them in one tensor.
    """

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float = 5.0,
        slope: float = 1e-3,
        **options: Any,
    ):
        super(MonotonicRQSTransform, self).__init__(**options)
        self.law = SplineLaw.zuko(widths.shape[-1], bound, slope)
        self.parameters = torch.cat([widths, heights, derivatives], -1)

    @property
    def bins(self) -> int:
        """K, the number of bins."""
        return self.law.bins

    def _call(self, x: Tensor) -> Tensor:
        return self._mapped(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._mapped(y, inverse=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._mapped(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._mapped(x)

    def _mapped(self, value: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(value.shape, self.parameters.shape[:-1])
        parameters = self.parameters.expand(*shape, -1)
        return fused_spline(parameters, value.expand(shape), self.law, inverse=inverse)
