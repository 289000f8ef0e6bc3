"""Discrete flow matching of sequences of tokens (Gat et al., 2024, arXiv 2407.15595; Campbell et al., 2402.04997)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from flow_matching.loss import MixturePathGeneralizedKL
from flow_matching.path import MixtureDiscreteProbPath
from flow_matching.path.scheduler import CondOTScheduler
from flow_matching.solver import MixtureDiscreteEulerSolver
from flow_matching.utils import ModelWrapper
from torch import Tensor
from torch.nn import functional as F

from ..checks import Labels, check_count, check_dense, kind_of, short
from ..errors import ArgumentError
from .base import FamilyFlow
from .token_network import TokenNetwork


class DiscreteFlowMatching(FamilyFlow):
    """A Markov chain in continuous time whose tokens jump from a source at t = 0 to data at t = 1.

    Each token of x_t is that of the data with probability t, else that of the source: the mask, or a uniform draw. In
    place i the chain jumps to a token a with rate p(x₁ⁱ = a | x_t) / (1 − t), which the network learns as
    p(x₁ⁱ = a | x_t) ∝ exp(logitᵢₐ) · p(x_tⁱ | x₁ⁱ = a): by Bayes' rule, it has to tell of place i what the other places
    say. `log_prob` is a lower bound on log p(x | y).
    """

    @dataclass(frozen=True)
    class Options:
        """The options of discrete flow matching.

        Attributes:
            vocabulary: V, the number of different tokens, which are the integers 0 to V − 1.
            source: What a sequence consists of at t = 0: "masked", or "uniform" draws of tokens.
            width: The width of the transformer.
            layers: The number of its layers.
            heads: The number of its attention heads, which divides the width.
            steps: How many steps of time sampling takes, each of one evaluation of the network.
            corrections: How many steps follow, each of one evaluation too, in which one token of each sequence, at a
                random place, is drawn again from what the others say of it.
            times: At how many times the bound of `log_prob` evaluates the network for a sequence.
        """

        vocabulary: int = 4
        source: Literal["masked", "uniform"] = "masked"
        width: int = 64
        layers: int = 2
        heads: int = 4
        steps: int = 64
        corrections: int = 64
        times: int = 32

        def __post_init__(self) -> None:
            for name in ("width", "layers", "heads", "times"):
                check_count(name, getattr(self, name))
            check_count("vocabulary", self.vocabulary, low=2)
            check_count("steps", self.steps, low=2)
            check_count("corrections", self.corrections, low=0)
            if self.width % self.heads:
                raise ArgumentError("heads", f"a divisor of width = {self.width}", self.heads)

    has_inverse: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    options: Options

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        o = self.options
        self.masked = o.source == "masked"
        self.alphabet = o.vocabulary + self.masked  # the mask is the last token
        (tokens,) = self.data_shape
        self.network = TokenNetwork(tokens, self.alphabet, o.vocabulary, num_classes, o.width, o.layers, o.heads)
        self.last = 1 - 1 / o.steps  # the time of the last step, which draws all tokens that are left
        self._path = MixtureDiscreteProbPath(CondOTScheduler())
        self._rates = MixturePathGeneralizedKL(self._path, reduction="none")
        self._evaluations: int | None = None

    def evaluations(self) -> int | None:
        return self._evaluations

    def check_data(self, x: Tensor, *, finite: bool = True) -> Tensor:
        """Returns x, (B, T) int64. Raises ArgumentError for other shapes and types, and for tokens out of range."""
        wanted = f"(B, {self.data_shape[0]}) integers"
        if not isinstance(x, Tensor):
            raise ArgumentError("x", f"a tensor of {wanted}", kind_of(x))
        check_dense("x", x)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ArgumentError("x", f"a tensor of {wanted}", f"a {short(x.dtype)} tensor")
        if x.dim() != 2 or x.shape[1:] != self.data_shape or len(x) == 0:
            raise ArgumentError("x", f"{wanted} with B >= 1", tuple(x.shape))
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= self.options.vocabulary:
            known = f"tokens from 0 to vocabulary - 1 = {self.options.vocabulary - 1}"
            raise ArgumentError("x", known, low if low < 0 else high)
        return x.long()

    def posterior_logits(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Returns log p(x₁ⁱ = a | x_t) up to a constant, (B, T, alphabet); −∞ for the mask.

        x: (B, T) x_t. t: (B,) times in [0, 1). context: one-hot classes, or None.
        """
        V, dtype = self.options.vocabulary, self.place.dtype
        t = t.to(dtype)
        logits = self.network(x, t, context)
        same = F.one_hot(x, self.alphabet)[..., :V].to(dtype)
        s = t[:, None, None]
        if self.masked:  # a mask says nothing of the token, and any other token is that of the data
            logits = logits.masked_fill((same == 0) & (x < V).unsqueeze(2), -torch.inf)
            return F.pad(logits, (0, 1), value=-torch.inf)
        return logits + ((1 - s) / V + s * same).log()

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns −mean(bound) / T, in nats per token: an unbiased estimate from one time for each sequence.

        x: (B, T) tokens. y: labels as in `log_prob`. generator: what times and noise come from.
        """
        x = self.check_data(x)
        return -self.bound(x, self.context(y, len(x)), 1, generator).mean() / self.dims

    def log_prob(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns an unbiased estimate of a lower bound (ELBO) on log p(x | y), (B,) in nats, not log p itself.

        From masks the bound is tight for an exact network. From uniform draws it is not, as the chain that a network
        learns goes on to jump where a token of data would stay: by 0.4 nats a token of four equally frequent ones.

        x: (B, T) integers. y: labels as in `FamilyFlow.log_prob`. generator: what times and noise come from.
        """
        x = self.check_data(x)
        bound = self.bound(x, self.context(y, len(x)), self.options.times, generator)
        self._evaluations = self.options.times
        return bound

    def bound(self, x: Tensor, context: Tensor | None, times: int, generator: torch.Generator | None) -> Tensor:
        """Returns an estimate of E[Σᵢ log p(xⁱ | x_s)] − ∫₀ˢ E[Σᵢ KL of rates] dt <= log p(x | y), (B,) in nats.

        The rates are those of jumps given x₁ = x, against those of the model (Shaul et al., 2024, arXiv 2412.03487). s
        is the time of the sampler's last step, which draws each token from p(· | x_s); the bound is of the chain in
        continuous time until s. The first term counts as the integral of its quotient by 1 − s over the times after s.

        x: (B, T) tokens. context: one-hot classes, or None. times: how many times the integral is estimated from, each
        by one evaluation; they are spread evenly, over the batch too. generator: what times and noise come from.
        """
        total = torch.zeros(len(x), dtype=self.place.dtype, device=x.device)
        spread = torch.randperm(len(x), generator=generator, device=x.device) + torch.rand(
            1, generator=generator, device=x.device
        )
        for k in range(times):
            drawn = (spread / len(x) + k) / times
            t = drawn.clamp(max=self.last)
            x_t = self._noised(x, t, generator)
            logits = self.posterior_logits(x_t, t, context)
            ends = F.cross_entropy(logits.transpose(1, 2), x, reduction="none").sum(1) / (1 - self.last)
            rates = self._rates(logits, x, x_t, t).sum(1)
            total = total - torch.where(drawn < self.last, rates, ends) / times
        return total

    @torch.no_grad()
    def sample(self, n: int, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns n sequences, (n, T) int64, by Euler steps of the Markov chain, in which tokens jump independently.

        What they miss of each other in a step, and what the network does not know of them until all are there, the
        corrections make up for. These are Gibbs sampling, which keeps the law of an exact network.

        n: how many. y: one label for all, or n of them. generator: what the source and all jumps come from.
        """
        steps, context = self.options.steps, self.context(y, check_count("n", n))
        device = self.place.device
        model = _Posterior(self, context)
        solver = MixtureDiscreteEulerSolver(model, self._path, self.alphabet)
        times = torch.linspace(0, 1, steps + 1, device=device)
        source = self._source((n, *self.data_shape), generator, device)
        with _seeded(generator, device):
            x = solver.sample(source, step_size=None, time_grid=times)
        for _ in range(self.options.corrections):
            x = self._corrected(x, context, generator)
        self._evaluations = steps + self.options.corrections
        return x

    def _corrected(self, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Returns sequences of which one token each is drawn again, at the last time, when the others are data's."""
        n = len(x)
        place = torch.randint(x.shape[1], (n, 1), generator=generator, device=x.device)
        without = x.scatter(1, place, self._source((n, 1), generator, x.device))
        t = torch.full((n,), self.last, dtype=self.place.dtype, device=x.device)
        logits = self.network(without, t, context).take_along_dim(place.unsqueeze(2), 1).squeeze(1)
        return x.scatter(1, place, torch.multinomial(logits.softmax(1), 1, generator=generator))

    def _source(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Returns sequences at t = 0 of this shape."""
        if self.masked:
            return torch.full(shape, self.options.vocabulary, device=device)
        return torch.randint(self.options.vocabulary, shape, generator=generator, device=device)

    def _noised(self, x: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns x_t of the data x, (B, T). t: (B,) times."""
        stays = torch.rand(x.shape, generator=generator, device=x.device) < t.unsqueeze(1)
        return torch.where(stays, x, self._source(tuple(x.shape), generator, x.device))


class _Posterior(ModelWrapper):
    """p(x₁ⁱ = a | x_t), (B, T, alphabet), as the library's solver asks for it."""

    def __init__(self, flow: DiscreteFlowMatching, context: Tensor | None):
        super().__init__(flow)
        self.context = context

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return self.model.posterior_logits(x, t, self.context).softmax(2)


@contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Lets the library, which draws from the global generator, draw what `generator` determines; if None, go on."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield
