"""The rational-quadratic spline of `tarflow_fast/spline.py` and its gradient, each in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..native import address, load_native
from ..spline import SplineLaw, native_law, spline
from .function import Way, apply, native_settings


@dataclass(frozen=True)
class _Spline:
    """The spline as `function.apply` takes it: parameters (n, P), and values (n,).

    law: what the parameters mean. inverse: whether the map is x of y.
    """

    law: SplineLaw
    inverse: bool
    passes: ClassVar[int] = 60

    @classmethod
    def example(cls, device: torch.device, dtype: torch.dtype, inverse: bool) -> tuple[Any, ...]:
        """Returns an operation and inputs, by which a device is tried."""
        law = SplineLaw.zuko(8)
        parameters = torch.linspace(-9, 9, 70 * law.parameters, device=device, dtype=dtype).sin()
        return cls(law, inverse), parameters.view(70, -1), torch.linspace(-6, 6, 70, device=device, dtype=dtype)

    def plain(self, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return spline(parameters, value, self.law, inverse=self.inverse)

    def run(self, way: Way, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if way == "triton":
            from ..kernels import spline as kernel  # this imports triton, which nothing else here needs

            return kernel.spline_forward(parameters, value, self.law, self.inverse)
        image, log_derivative = torch.empty_like(value), torch.empty_like(value)
        self._native(parameters=parameters, value=value, image=image, log_derivative=log_derivative)
        return image, log_derivative

    def back(
        self, way: Way, d_image: Tensor, d_log_det: Tensor, parameters: Tensor, value: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        if way == "triton":
            from ..kernels import spline as kernel

            return kernel.spline_backward(d_image, d_log_det, parameters, value, image, self.law, self.inverse)
        of_parameters, of_value = torch.empty_like(parameters), torch.empty_like(value)
        self._native(
            parameters=parameters,
            value=value,
            image=d_image,
            log_derivative=d_log_det,
            at=image if self.inverse else value,
            d_parameters=of_parameters,
            d_value=of_value,
        )
        return of_parameters, of_value

    def _native(self, **tensors: Tensor) -> None:
        value = tensors["value"]
        load_native().spline(
            law=native_law(self.law),
            **{name: address(name, tensor, value.dtype) for name, tensor in tensors.items()},
            count=value.numel(),
            inverse=self.inverse,
            **native_settings(value),
        )


def fused_spline(parameters: Tensor, value: Tensor, law: SplineLaw, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Returns what `tarflow_fast.spline.spline` does, by the code that serves these tensors.

    It is differentiable any number of times.

    Args:
        parameters: (…, P), P = law.parameters, those of each value.
        value: (…), of the parameters' dtype.
        law: What the parameters mean.
        inverse: Whether the map is x of y.

    Raises:
        ArgumentError: The shapes or dtypes do not fit each other.
    """
    if parameters.shape != (*value.shape, law.parameters) or parameters.dtype != value.dtype:
        wanted = f"{value.dtype} of shape {(*value.shape, law.parameters)}"
        raise ArgumentError("parameters", wanted, f"{parameters.dtype} of shape {tuple(parameters.shape)}")
    image, log_derivative = apply(_Spline(law, inverse), parameters.reshape(-1, law.parameters), value.reshape(-1))
    return image.view(value.shape), log_derivative.view(value.shape)
