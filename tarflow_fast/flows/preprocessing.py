"""What lies between data and a flow: dequantisation of 8-bit images, the logit, and a standard scale for vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import Labels, check_number, check_tensor
from ..errors import ArgumentError
from .base import Bijection, FamilyFlow
from .composition import Chain
from .networks import Convolutions

LEVELS = 256
LOGISTIC_STD = 1.6  # a logistic-normal of this standard deviation is nearest to a uniform one
VARIATIONAL_WIDTH = 16


class Logit(Bijection):
    """z = logit(α + (1 − 2α) v / 256) of v in [0, 256]; the log-det is Σ log((1 − 2α) / (256 y (1 − y))).

    Pictures fill a box, which no flow with a Gaussian base can have for its support; the logit opens it.
    """

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha, self.slope = alpha, (1 - 2 * alpha) / LEVELS

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.alpha + self.slope * x
        logs = y.log(), (-y).log1p()
        return logs[0] - logs[1], (math.log(self.slope) - logs[0] - logs[1]).flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.sigmoid(z)
        log_det = (nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z) - math.log(self.slope)).flatten(1).sum(1)
        return (y - self.alpha) / self.slope, log_det


class Standardise(Bijection):
    """z = (x − mean) / std, value by value, with what `fit` found in the data; before that the identity.

    shape: that of one sample.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def fit(self, data: Tensor) -> None:
        """Takes mean and standard deviation from data, (N, *shape); a value that never changes keeps its scale."""
        std = data.std(0, correction=0)
        self.mean.copy_(data.mean(0))
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) / self.std, -self.std.log().sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * self.std + self.mean, self.std.log().sum().expand(len(z))


class VariationalNoise(nn.Module):
    """q(u | v): u = sigmoid(μ(v) + σ(v) ε), ε ~ N(0, I), with μ and log σ from a network (Ho et al., 2019).

    shape: (channels, H, W) of v.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.network = Convolutions(shape[0], 2, VARIATIONAL_WIDTH, 1)

    def forward(self, v: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Returns u in (0, 1), (B, *shape), and log q(u | v), (B,) in nats. v: levels. epsilon: the Gaussian draw."""
        mean, log_std = self.network(v / (LEVELS / 2) - 1).unbind(1)
        log_std = log_std + math.log(LOGISTIC_STD)
        a = mean + log_std.exp() * epsilon
        log_normal = -0.5 * (epsilon.square() + math.log(2 * math.pi)) - log_std
        slope = nn.functional.logsigmoid(a) + nn.functional.logsigmoid(-a)
        return torch.sigmoid(a), (log_normal - slope).flatten(1).sum(1)


class Preprocessed(FamilyFlow):
    """p(x) = p_flow(f(x)) |det df/dx|, and for 8-bit images log P(v) ≥ E_u[log p(v + u) − log q(u | v)].

    Its data are what people have: 8-bit levels, of which `log_prob` gives a lower bound of the log-probability in nats
    (so that −log_prob / (dims · log 2) is in bits/dim), or vectors on their own scale.

    Attributes:
        flow: The flow of the transformed data.
        options: How data are transformed.
    """

    @dataclass(frozen=True)
    class Options:
        """How data are transformed before the flow sees them.

        Attributes:
            dequantization: The noise u that makes 8-bit levels continuous: "uniform", or "variational", which is learnt
                with the flow; "none" for data that are continuous.
            logit: Whether dequantised levels go through the logit.
            alpha: α, by which the logit keeps away from 0 and 1.
        """

        dequantization: Literal["none", "uniform", "variational"] = "none"
        logit: bool = True
        alpha: float = 0.05

        def __post_init__(self) -> None:
            check_number("alpha", self.alpha, 0, 0.25, open_low=True)

    def __init__(self, flow: FamilyFlow, options: Options | None = None):
        super().__init__(flow.data_shape, flow.num_classes, options)
        self.flow, self.name = flow, flow.name
        self.levels = self.options.dequantization != "none"
        if self.levels and not self.options.logit and flow.has_inverse:
            raise ArgumentError("logit", f"True, as 8-bit data are bounded and {flow.name!r} has all of space", False)
        scale = Logit(self.options.alpha) if self.levels and self.options.logit else None
        self.steps = Chain([step for step in (scale, Standardise(self.data_shape)) if step is not None])
        variational = self.options.dequantization == "variational"
        if variational and not flow.trained_by_likelihood:
            expected = f"'uniform', as {flow.name!r} does not train by likelihood, which would teach the noise"
            raise ArgumentError("dequantization", expected, "'variational'")
        self.noise = VariationalNoise(self.data_shape) if variational else None

    @property
    def standardise(self) -> Standardise:
        """The step that `fit` sets by data."""
        step = self.steps.steps[-1]
        assert isinstance(step, Standardise)
        return step

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        x, log_q = self._dequantised(self.check_data(x, finite=False), generator)
        inner, log_det = self.steps(x)
        loss = self.flow.loss(inner, y, generator=generator)
        return loss - (log_det - log_q).mean() / self.dims if self.flow.trained_by_likelihood else loss

    def log_prob(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        x, log_q = self._dequantised(self.check_data(x), generator)
        inner, log_det = self.steps(x)
        return self.flow.log_prob(inner, y, generator=generator) + log_det - log_q

    @torch.no_grad()
    def sample(self, n: int, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        x, _ = self.steps.inverse(self.flow.sample(n, y, generator=generator))
        return x.floor().clamp(0, LEVELS - 1) if self.levels else x

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """Returns z and log|det dz/dx| of data that are dequantised already, in [0, 256], or continuous."""
        inner, log_det = self.steps(check_tensor("x", x, self.data_shape, finite=False))
        z, inner_log_det = self.flow(inner, y)
        return z, log_det + inner_log_det

    def inverse(self, z: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """Returns x, dequantised or continuous, and log|det dx/dz|."""
        inner, inner_log_det = self.flow.inverse(z, y)
        x, log_det = self.steps.inverse(inner)
        return x, log_det + inner_log_det

    def at_step(self, step: int, steps: int) -> None:
        self.flow.at_step(step, steps)

    def evaluations(self) -> int | None:
        return self.flow.evaluations()

    def figures(self, generator: torch.Generator | None = None) -> dict[str, float]:
        return self.flow.figures(generator)

    def check_data(self, x: Tensor, *, finite: bool = True) -> Tensor:
        """Returns x as floats. Raises ArgumentError for values outside 0 to 255 where they are to be levels."""
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            return check_tensor("x", x.to(self.place.dtype), self.data_shape, finite=False)
        x = check_tensor("x", x, self.data_shape, finite=finite)
        if finite and self.levels and bool(((x < 0) | (x > LEVELS - 1)).any()):
            raise ArgumentError("x", "8-bit levels, 0 to 255", f"{float(x.min()):g} to {float(x.max()):g}")
        return x

    def transformed(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the data as the flow sees them, (B, *data_shape). x: data as `log_prob` takes them."""
        return self.steps(self._dequantised(self.check_data(x), generator)[0])[0]

    def _dequantised(self, v: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Returns v + u and log q(u | v), (B,): 0 for uniform noise, and for data that need none."""
        if not self.levels:
            return v, v.new_zeros(len(v))
        place: dict[str, Any] = {"device": v.device, "dtype": v.dtype, "generator": generator}
        if self.noise is None:
            return v + torch.rand(v.shape, **place), v.new_zeros(len(v))
        u, log_q = self.noise(v, torch.randn(v.shape, **place))
        return v + u, log_q
