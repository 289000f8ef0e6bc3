"""z = (x − t) exp(−s) where values change, s = bound · tanh(raw / bound): the update of a coupling, and its inverse.

Elsewhere z = x. The log-determinant of a sample is −Σ s in nats, and that of the inverse Σ s. PyTorch takes a dozen
passes over memory for this, forward and back; here each is one. With gradients dz and dl of the results,

    dx = dz exp(−s),  dt = −dx,  ds = −dz z − dl,     and of the inverse  dz = dx exp(s),  dt = dx,  ds = dz z + dl

and draw = ds (1 − tanh²); where values pass, dx = dz and the other gradients are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..native import address, load_native
from .function import Way, apply, native_settings

MOST_BOUND = 64.0  # exp(±64) is a number in fp32


@dataclass(eq=False)  # one is made for every update
class _AffineCoupling:
    """The update as `function.apply` takes it: parameters (B, 2 or 1, …), and values (B, …).

    changes: (…), of the values' dtype and contiguous, 1 where values change. bound: of the log-scale. inverse: whether
    it is x of z.
    """

    changes: Tensor
    bound: float
    inverse: bool
    passes: ClassVar[int] = 12

    @classmethod
    def example(cls, device: torch.device, dtype: torch.dtype, inverse: bool) -> tuple[Any, ...]:
        """Returns an operation and inputs, by which a device is tried."""
        changes = (torch.arange(70, device=device) % 3 > 0).to(dtype)
        wave = torch.linspace(-3, 3, 5 * 3 * 70, device=device, dtype=dtype).sin()
        return cls(changes, 2.0, inverse), wave[:700].view(5, 2, 70).contiguous(), wave[700:].view(5, 70).contiguous()

    def plain(self, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        t, *raw = (parameters * self.changes).unbind(1)
        if not raw:
            return (value + t if self.inverse else value - t), value.new_zeros(len(value))
        # In the forward map this is −s, which is what it takes
        s = torch.tanh(raw[0] / self.bound) * (self.bound if self.inverse else -self.bound)
        image = torch.addcmul(t, value, s.exp()) if self.inverse else (value - t) * s.exp()
        return image, s.sum(tuple(range(1, s.dim())))

    def run(self, way: Way, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if way == "triton":
            from ..kernels import affine_coupling as kernel  # this imports triton, which nothing else here needs

            flat = parameters.flatten(2), value.flatten(1), self.changes.flatten()
            image, log_det = kernel.coupling_forward(*flat, self.bound, self.inverse)
            return image.view(value.shape), log_det
        image, log_det = torch.empty_like(value), value.new_empty(len(value))
        self._native(parameters, given=value, out=image, log_det=log_det)
        return image, log_det

    def back(
        self, way: Way, d_image: Tensor, d_log_det: Tensor, parameters: Tensor, value: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        latents = value if self.inverse else image
        if way == "triton":
            from ..kernels import affine_coupling as kernel

            flat = parameters.flatten(2), latents.flatten(1), self.changes.flatten()
            found = kernel.coupling_backward(d_image.flatten(1), d_log_det, *flat, self.bound, self.inverse)
            return found[0].view(parameters.shape), found[1].view(value.shape)
        of_parameters, of_value = torch.empty_like(parameters), torch.empty_like(value)
        self._native(
            parameters,
            latents=latents,
            out=d_image,
            log_det=d_log_det,
            d_parameters=of_parameters,
            d_given=of_value,
        )
        return of_parameters, of_value

    def _native(self, parameters: Tensor, **tensors: Tensor) -> None:
        out, scaled = tensors["out"], parameters.shape[1] == 2
        B = len(out)
        N = out.numel() // B
        every = {"parameters": parameters, "changes": self.changes, **tensors}
        sizes = {"changes": N, "log_det": B, **dict.fromkeys(("parameters", "d_parameters"), (1 + scaled) * B * N)}
        load_native().affine_coupling(
            **{name: address(name, x, out.dtype, count=sizes.get(name, B * N)) for name, x in every.items()},
            samples=B,
            values=N,
            bound=self.bound,
            scaled=scaled,
            inverse=self.inverse,
            **native_settings(out),
        )


def affine_coupling(
    parameters: Tensor, value: Tensor, changes: Tensor, *, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns z of x, or x of z with `inverse`, and the log-determinant of that map, (B,) in nats.

    It is differentiable any number of times.

    Args:
        parameters: (B, 2, …) t and the raw log-scale of each value, or (B, 1, …) t alone, with which s is 0.
        value: (B, …), x or z, of the parameters' dtype.
        changes: (…), the shape of one sample, 1 where values change and 0 where they pass, of the same dtype and
            contiguous.
        bound: The bound of s, above 0.
        inverse: Whether the map is x of z.

    Raises:
        ArgumentError: The sizes or dtypes do not fit each other, or the bound is out of range.
    """
    if not 0 < bound <= MOST_BOUND:
        raise ArgumentError("bound", f"a number above 0, at most {MOST_BOUND:g}", bound)
    return apply(_AffineCoupling(changes, bound, inverse), parameters, value)
