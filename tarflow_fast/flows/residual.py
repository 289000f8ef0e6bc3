"""Residual flows: z = x + g(x), g a contraction (Behrmann et al., 2019, arXiv 1811.00995; Chen et al., 2019, arXiv
1906.02735)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Labels, check_count, check_number
from ..errors import ArgumentError
from .actnorm import ActNorm
from .base import Bijection, FamilyFlow
from .composition import Chain
from .fixed_point import FixedPoint, fixed_point
from .lipschitz import Contraction
from .roulette import roulette, signs

EXACT = 64  # values in a sample up to which a log-det is that of the whole Jacobian
ALLOWED = 1e3  # units of rounding: a larger residual is that of a map that does not contract
Map = Callable[[Tensor], Tensor]


class ResidualBlock(Bijection):
    """z = x + g(x; c) with |g(x) − g(x')| ≤ L |x − x'|, L < 1; log-det = Σ_{k ≥ 1} (−1)^{k+1} tr(J^k) / k, J = dg/dx.

    In training mode the log-det is an unbiased estimate: the first terms, and after them each with a probability, by
    whose inverse it is multiplied (Russian roulette). In evaluation mode it is log det(I + J), of the whole Jacobian,
    for samples of at most 64 values, and beyond the sum of many terms, whose traces are estimated by random signs:
    what is left out is at most D L^(n+1) / ((n + 1) (1 − L)).

    name: what an error calls the block. network: g. options: those of `ResidualFlow`.
    """

    def __init__(self, name: str, network: Contraction, options: ResidualFlow.Options):
        super().__init__()
        self.name, self.network, self.options = name, network, options
        self.found: FixedPoint | None = None  # the last inverse

    def _map(self, context: Tensor | None) -> tuple[Map, list[Tensor]]:
        """Returns g for a context, and its weights. Raises ArgumentError unless it is a contraction in evaluation mode,
        as it is with finite weights."""
        weights, bound = self.network.weights()
        if not self.training and not float(bound.detach()) < 1:
            known = f"one whose Lipschitz constant is at most {float(bound.detach()):.3g}"
            raise ArgumentError(self.name, "a contraction, whose Lipschitz constant is below 1", known)
        return lambda x: self.network(x, context, weights), weights

    def forward(
        self, x: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns z and log|det dz/dx|, (B,), or its estimate, which draws from the generator."""
        g, weights = self._map(context)
        if self.training:
            coefficients = roulette(self.options.terms, self.options.lipschitz**1.5, generator)
            return self._estimated(x, g, coefficients, 1, generator)
        if x[0].numel() <= EXACT:
            return x + g(x), self._exact(x, context, weights)
        return self._estimated(x, g, [1.0] * self.options.most_terms, self.options.probes, generator)

    def _exact(self, x: Tensor, context: Tensor | None, weights: list[Tensor]) -> Tensor:
        """Returns log det(I + J), (B,), of the whole Jacobian."""

        def one(x: Tensor, c: Tensor | None) -> Tensor:
            return self.network(x[None], None if c is None else c[None], weights)[0]

        jacobian = torch.func.vmap(torch.func.jacrev(one), in_dims=(0, None if context is None else 0))(x, context)
        D = x[0].numel()
        eye = torch.eye(D, dtype=x.dtype, device=x.device)
        log_det: Tensor = torch.linalg.slogdet(eye + jacobian.reshape(len(x), D, D)).logabsdet
        return log_det

    def _estimated(
        self, x: Tensor, g: Map, coefficients: list[float], probes: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Returns z and Σ_k (−1)^{k+1} c_k vᵀ J^k v / k, the mean over random signs v, in values and in gradients.

        Its gradient is Σ_k (−1)^{k+1} c_k vᵀ J^{k−1} dJ v (Chen et al., 2019, the Neumann series), so that autograd
        records one product with J and not a chain of them. coefficients: c_1, c_2, …
        """
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad and recorded else x.detach().requires_grad_()
            image = g(x)
            total = x.new_zeros(len(x))
            for _ in range(probes):
                v = signs(x, generator)
                term = v  # ± (Jᵀ)^{k−1} v
                value, combined = x.new_zeros(len(x)), torch.zeros_like(x)
                for k, c in enumerate(coefficients, 1):
                    combined = combined + c * term
                    (term,) = torch.autograd.grad(image, x, term, retain_graph=True)
                    value = value + c / k * (term * v).flatten(1).sum(1)
                    term = -term
                (product,) = torch.autograd.grad(image, x, combined, create_graph=recorded, retain_graph=True)
                gradient = (product * v).flatten(1).sum(1)
                total = total + (value + gradient - gradient.detach()) / probes
            z = x + image
        return (z, total) if recorded else (z.detach(), total.detach())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns x = z − g(x) and −log|det dz/dx|, (B,), as in evaluation mode. Raises what `solve` does."""
        training = self.training
        self.eval()
        try:
            x = self.solve(z, context)
            return x, -self(x, context)[1]
        finally:
            self.train(training)

    def solve(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns x = z − g(x), by iteration; gradients are those of the exact inverse, (I + J)⁻ᵀ, by iteration too.

        Raises ArgumentError that names the block where the iteration does not converge, as g is no contraction.
        """
        g, _ = self._map(context)
        with torch.no_grad():
            self.found = self._fixed_point(lambda x: z - g(x), z)
            most = ALLOWED * torch.finfo(z.dtype).eps * (1 + float(z.flatten(1).norm(dim=1).max()))
        if not self.found.residual <= most:
            known = f"a residual of {self.found.residual:.1e} after {self.found.passes} passes"
            raise ArgumentError(self.name, "a contraction, whose fixed point iteration converges", known)
        return self._recorded(self.found.x, z, g) if torch.is_grad_enabled() else self.found.x

    def _fixed_point(self, h: Map, start: Tensor) -> FixedPoint:
        return fixed_point(h, start, self.options.lipschitz, self.options.anderson)

    def _recorded(self, x: Tensor, z: Tensor, g: Map) -> Tensor:
        """Returns the inverse x of z such that autograd takes (I + J)⁻ᵀ times a gradient back to z and the weights."""
        again = z - g(x)
        if again.requires_grad:
            point = x.detach().requires_grad_()
            image = g(point)

            def solve(gradient: Tensor) -> Tensor:
                def step(u: Tensor) -> Tensor:
                    return gradient - torch.autograd.grad(image, point, u, retain_graph=True)[0]

                return self._fixed_point(step, gradient).x

            again.register_hook(solve)
        return again


class ResidualFlow(FamilyFlow):
    """z = f_n(… f_1(x)), each f an ActNorm and a residual block x + g(x) whose network g is free but for its bound.

    Samples come of an iteration, whose residual is stated in `found` of each block. Log-densities of samples of more
    than 64 values are estimates, see `ResidualBlock`.
    """

    exact: ClassVar[bool] = False
    bijection: Chain

    @classmethod
    def idle_options(cls, data_shape: tuple[int, ...], options: Options) -> dict[str, str]:
        """Returns what `FamilyFlow.idle_options` does; the log-det of few values is exact in evaluation."""
        use = f"samples of more than {EXACT} values"
        return dict.fromkeys(("most_terms", "probes"), use) if math.prod(data_shape) <= EXACT else {}

    @dataclass(frozen=True)
    class Options:
        """The options of a residual flow.

        Attributes:
            blocks: The number of residual blocks.
            hidden: The widths, or for images the channels, of the hidden layers of each block's network.
            lipschitz: L, the bound of the Lipschitz constant of each block's network.
            terms: In training, the terms of the log-det that are always computed.
            most_terms: In evaluation, the terms for samples of more than 64 values.
            probes: In evaluation, the random vectors for samples of more than 64 values.
            anderson: How many points Anderson acceleration combines in the inverse; 0 for the plain iteration.
        """

        blocks: int = 8
        hidden: tuple[int, ...] = (64, 64)
        lipschitz: float = 0.9
        terms: int = 2
        most_terms: int = 20
        probes: int = 1
        anderson: int = 2

        def __post_init__(self) -> None:
            for name in ("blocks", "terms", "most_terms", "probes"):
                check_count(name, getattr(self, name))
            check_count("anderson", self.anderson, low=0)
            if not 0 < check_number("lipschitz", self.lipschitz) < 1:
                raise ArgumentError(
                    "lipschitz", "a number above 0 and below 1, so that blocks are contractions", self.lipschitz
                )
            if not self.hidden:
                raise ArgumentError("hidden", "the widths of one or more hidden layers", self.hidden)

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        steps: list[Bijection] = []
        for k in range(self.options.blocks):
            network = Contraction(self.data_shape, self.options.hidden, num_classes, self.options.lipschitz)
            steps += [ActNorm(self.data_shape), ResidualBlock(f"residual block {k}", network, self.options)]
        self.bijection = Chain([*steps, ActNorm(self.data_shape)])
        self._passes: int | None = None  # of the last sample

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns −mean(log p(x | y)) / dims, as everywhere, with estimated log-dets whose gradient is unbiased."""
        return -self._density(self.check_data(x, finite=False), y, generator).mean() / self.dims

    def log_prob(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns log p(x | y), (B,) in nats: exact for at most 64 values in evaluation mode, else an estimate."""
        self._passes = None
        return self._density(self.check_data(x), y, generator)

    @torch.no_grad()
    def sample(self, n: int, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns n samples of p(x | y), (n, *data_shape), as everywhere, without their log-dets."""
        x = self.latents(check_count("n", n), generator)
        context, self._passes = self.context(y, n), 0
        for step in reversed(list[Any](self.bijection.steps)):
            if isinstance(step, ResidualBlock):
                x = step.solve(x, context)
                assert step.found is not None
                self._passes += step.found.passes
            else:
                x, _ = step.inverse(x, context)
        return x

    def _density(self, x: Tensor, y: Labels, generator: torch.Generator | None) -> Tensor:
        context, total = self.context(y, len(x)), x.new_zeros(len(x))
        for step in self.bijection.steps:
            more = {"generator": generator} if isinstance(step, ResidualBlock) else {}
            x, log_det = step(x, context, **more)
            total = total + log_det
        return self.prior_log_prob(x) + total

    def evaluations(self) -> int | None:
        """Returns how many passes the last `sample` took, in all blocks together; None after `log_prob`."""
        return self._passes
