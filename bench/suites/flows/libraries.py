"""The flows of zuko, nflows, normflows and sbi that the bench has: how they are made, trained and called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TRANSFORMS, CONTEXT, BINS = 5, 8, 8
VALUES = 2**13  # of a batch in training


def _zuko(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    import zuko

    of = {"maf": zuko.flows.MAF, "nsf": functools.partial(zuko.flows.NSF, bins=BINS)}[family]
    return of(dims, context, transforms=TRANSFORMS, hidden_features=(hidden, hidden))


def _nflows(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    from nflows import distributions, flows, transforms
    from nflows.transforms import autoregressive

    sizes = {"features": dims, "hidden_features": hidden, "context_features": context or None, "num_blocks": 2}
    of = functools.partial(autoregressive.MaskedAffineAutoregressiveTransform, use_residual_blocks=False)
    if family == "nsf":
        spline = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        of = functools.partial(spline, num_bins=BINS, tails="linear", tail_bound=5.0)
    steps = [step for _ in range(TRANSFORMS) for step in (transforms.ReversePermutation(dims), of(**sizes))]
    return flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([dims]))


def _normflows(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    import normflows

    layers: list[Any] = []
    for _ in range(TRANSFORMS):  # its own MAF is an inverse one, whose samples are quick
        spline = normflows.flows.AutoregressiveRationalQuadraticSpline
        maf = normflows.flows.MaskedAffineAutoregressive
        if family == "nsf":
            layers.append(spline(dims, 2, hidden, num_context_channels=context or None, num_bins=BINS, tail_bound=5))
        else:
            layers += [normflows.flows.Reverse(maf(dims, hidden)), normflows.flows.Permute(dims, mode="swap")]
    of = normflows.ConditionalNormalizingFlow if context else normflows.NormalizingFlow
    return of(normflows.distributions.DiagGaussian(dims, trainable=False), layers)


def _sbi(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    from sbi.neural_nets import posterior_nn

    batch = torch.zeros(64, 1).normal_().expand(-1, dims) + torch.randn(64, dims), torch.randn(64, context)
    build: Any = posterior_nn(family, hidden_features=hidden, num_transforms=TRANSFORMS, num_bins=BINS)
    estimator: nn.Module = build(*batch)
    return estimator


LIBRARIES: dict[str, tuple[Callable[[str, int, int, int], nn.Module], tuple[str, ...]]] = {
    "zuko": (_zuko, ("maf", "nsf")),
    "nflows": (_nflows, ("maf", "nsf")),
    "normflows": (_normflows, ("maf", "nsf")),
    "sbi": (_sbi, ("maf", "nsf", "zuko_nsf")),
}
"""How a library's flows are made, and which there are; those of sbi by its own names."""


def sample(library: str, flow: Any, number: int, context: Tensor | None, seed: int) -> Tensor:
    """Returns samples, (number, D), of a library's flow or of its fast counterpart, which takes the same calls."""
    torch.manual_seed(seed)
    if library == "zuko":
        drawn: Tensor = flow(context).sample((number,) if context is None else ())
    elif library == "nflows":
        drawn = flow.sample(number) if context is None else flow.sample(1, context)[:, 0]
    elif library == "normflows":
        drawn, _ = flow.sample(number, **_given(context))
    else:
        drawn = flow.sample((number,), show_progress_bars=False)
    return drawn


def sample_with_log_prob(
    library: str, flow: Any, number: int, context: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns samples of a fast counterpart, (number, D), and their log q, (number,), in nats."""
    torch.manual_seed(seed)
    if library == "zuko":
        drawn = flow(context).rsample_and_log_prob((number,) if context is None else ())
    elif library == "nflows":
        drawn = flow.sample_and_log_prob(number) if context is None else flow.sample_and_log_prob(1, context)
        drawn = drawn if context is None else (drawn[0][:, 0], drawn[1][:, 0])
    elif library == "normflows":
        drawn = flow.sample(number, **_given(context))
    else:
        x = sample(library, flow, number, context, seed)
        drawn = x, log_prob(library, flow, x, context)
    return drawn[0], drawn[1]


def log_prob(library: str, flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """Returns log q of points, (B,), in nats, by a library's density pass. sbi: a posterior or its net."""
    if library == "zuko":
        found: Tensor = flow(context).log_prob(x)
    elif library == "nflows":
        found = flow.log_prob(x) if context is None else flow.log_prob(x, context)
    elif library == "normflows":
        found = flow.log_prob(x, **_given(context))
    elif isinstance(flow, nn.Module):
        found = flow.log_prob(x[None], condition=context)[0]  # type: ignore[operator]
    else:
        found = flow.posterior_estimator.log_prob(x[:, None], condition=flow.default_x)[:, 0]
    return found


def _given(context: Tensor | None) -> dict[str, Tensor]:
    return {} if context is None else {"context": context}


def compiled(flow: Any) -> Any:
    """Returns a copy of a flow whose masked transforms are compiled by torch, the loop over the dimensions left out:
    unrolled, it would take minutes to be compiled."""
    made = copy.deepcopy(flow)
    for module in made.modules():
        if hasattr(module, "meta"):  # zuko: the network, and what its outputs stand for
            module.meta = torch.compile(module.meta)
        elif hasattr(module, "autoregressive_net"):
            module.autoregressive_net.compile()
            module._elementwise_inverse = torch.compile(module._elementwise_inverse)
    return made


def density_of(number: int, dims: int, context: Tensor | None, generator: torch.Generator) -> Tensor:
    """Returns samples, (number, D), of a bent chain: x_i = 0.6 x_{i−1} + 0.5 sin(2 x_{i−1}) + 0.5 u_i, whose first
    value is one of two clusters; the mean of the context moves all of it."""
    x = torch.randn(number, dims, generator=generator)
    x[:, 0] = 0.3 * x[:, 0] + torch.randint(0, 2, (number,), generator=generator) * 2 - 1
    for i in range(1, dims):
        x[:, i] = 0.6 * x[:, i - 1] + 0.5 * torch.sin(2 * x[:, i - 1]) + 0.5 * x[:, i]
    return x if context is None else x + context.mean(1, keepdim=True)


@functools.lru_cache(1)
@torch.enable_grad()
def trained(library: str, family: str, dims: int, hidden: int, context: bool, steps: int, seed: int) -> Any:
    """Returns a flow that has learnt that density in so many steps; of sbi the posterior for a context of zeros."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow: Any = LIBRARIES[library][0](family, dims, hidden, CONTEXT if context or library == "sbi" else 0)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    number = max(16, min(256, VALUES // dims))
    for _ in range(steps):
        c = torch.randn(number, CONTEXT, generator=generator) if context or library == "sbi" else None
        loss = -log_prob(library, flow, density_of(number, dims, c, generator), c).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    flow = flow.eval().requires_grad_(False)
    if library != "sbi":
        return flow
    from sbi.inference.posteriors import DirectPosterior
    from sbi.utils import BoxUniform

    prior = BoxUniform(-50 * torch.ones(dims), 50 * torch.ones(dims))  # few samples are rejected
    return DirectPosterior(flow, prior).set_default_x(torch.zeros(1, CONTEXT))
