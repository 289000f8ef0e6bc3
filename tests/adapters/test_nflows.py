"""nflows' flows, accelerated: the same distribution to rounding, with the library's own inverse as the oracle."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError
from tarflow_fast.spline import SplineLaw, knots

pytest.importorskip("nflows", reason="nflows is not installed; it is in the extra `flows`")
from nflows import transforms as nt
from nflows.distributions import ConditionalDiagonalNormal, StandardNormal
from nflows.flows import Flow
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from nflows.nn.nets import ResidualNet

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
AFFINE = nt.MaskedAffineAutoregressiveTransform
SPLINE = nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def stirred(flow: Flow, amount: float = 0.1) -> Flow:
    """Returns the flow in eval mode, with all weights and statistics moved, so that none is trivial."""
    for module in flow.modules():
        if isinstance(module, nn.BatchNorm1d | nt.BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return flow.eval()


@torch.no_grad()
def check(flow: Flow, features: int, context: int = 0, batch: int = 20, **options: Any) -> None:
    """Data of the same noise, latents of the same data, and both log-determinants, in both dtypes."""
    for dtype in (torch.float32, torch.float64):
        own = copy.deepcopy(flow).to(dtype)._transform
        fast = tff.accelerate(copy.deepcopy(flow).to(dtype), **options)._transform
        z = torch.randn(batch, features, dtype=dtype)
        c = torch.randn(batch, context, dtype=dtype) if context else None
        x, log_det = own.inverse(z, c)
        got = fast.inverse(z, c)
        scale = 1 + x.abs().max().item()
        assert_close(got[0], x, TOLERANCE[dtype] * scale)
        assert_close(got[1], log_det, TOLERANCE[dtype] * features**0.5 * scale)
        wanted = own(x, c)
        got = fast(x, c)
        assert_close(got[0], wanted[0], TOLERANCE[dtype] * scale)
        assert_close(got[1], wanted[1], TOLERANCE[dtype] * features**0.5 * scale)


@st.composite
def flows(draw: st.DrawFn) -> tuple[Flow, int, int]:
    features, context = draw(st.integers(1, 7)), draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    steps: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        keywords: dict[str, Any] = {
            "features": features,
            "hidden_features": draw(st.integers(1, 20)),
            "context_features": context or None,
            "num_blocks": draw(st.integers(1, 3)),
            "use_residual_blocks": draw(st.booleans()),
            "activation": draw(st.sampled_from([F.relu, torch.tanh, F.elu, nn.SiLU(), F.leaky_relu])),
            "use_batch_norm": draw(st.booleans()),
        }
        keywords["random_mask"] = features > 1 and not keywords["use_residual_blocks"] and draw(st.booleans())
        if draw(st.booleans()):
            steps.append(AFFINE(**keywords))
        else:
            bound = draw(st.sampled_from([1.0, 4.0]))
            steps.append(SPLINE(**keywords, num_bins=draw(st.integers(1, 9)), tails="linear", tail_bound=bound))
        steps.append(draw(st.sampled_from([nt.RandomPermutation, nt.ReversePermutation]))(features))
        if draw(st.booleans()):
            steps[-2] = nt.InverseTransform(steps[-2])
    return stirred(Flow(nt.CompositeTransform(steps), StandardNormal([features]))), features, context


@pytest.mark.slow
@given(made=flows())
@settings(max_examples=40, deadline=None)
def test_any_flow_of_the_library(made: tuple[Flow, int, int]) -> None:
    check(*made, batch=5)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_batch_norm(inside: bool, between: bool) -> None:
    torch.manual_seed(0)
    norms = {"batch_norm_within_layers": inside, "batch_norm_between_layers": between}
    check(stirred(MaskedAutoregressiveFlow(5, 16, 3, 2, **norms)), 5)


def test_steps_between_transforms() -> None:
    torch.manual_seed(0)
    steps = [
        nt.PointwiseAffineTransform(torch.arange(5.0), torch.arange(1.0, 6)),
        AFFINE(5, 12, context_features=2),
        nt.CompositeTransform([nt.LULinear(5, identity_init=False), nt.RandomPermutation(5)]),
        SPLINE(5, 12, context_features=2, tails="linear", tail_bound=3.0),
        nt.InverseTransform(nt.CompositeTransform([nt.ActNorm(5), nt.LULinear(5), AFFINE(5, 12, context_features=2)])),
        nt.PointwiseAffineTransform(0.5, 2.0),
        nt.IdentityTransform(),
    ]
    check(stirred(Flow(nt.CompositeTransform(steps), StandardNormal([5])), 0.05), 5, 2)


@torch.no_grad()
def test_a_spline_without_tails() -> None:
    """It maps the unit interval to itself; values outside have no image."""
    torch.manual_seed(0)
    own = stirred(Flow(SPLINE(4, 16, num_bins=5, tails=None), StandardNormal([4]))).double()
    fast = tff.accelerate(own, check=False)
    z = torch.rand(20, 4, dtype=torch.float64)
    for got, wanted in zip(fast._transform.inverse(z), own._transform.inverse(z), strict=True):
        assert_close(got, wanted, 1e-9)
    assert fast._transform.inverse(z + 1)[0].isnan().any()


def sample_all(flow: Flow, context: Tensor | None) -> list[Tensor]:
    torch.manual_seed(7)
    x = flow.sample(6, context)
    torch.manual_seed(7)
    again, log_prob = flow.sample_and_log_prob(6, context)
    assert torch.equal(x, again)
    points = x if context is None else x[:, 0]
    return [x, log_prob, flow.log_prob(points, context), flow.transform_to_noise(points, context)]


@torch.no_grad()
@pytest.mark.parametrize("contexts", [0, 1, 3])
def test_methods(contexts: int) -> None:
    """With an embedding network, a base distribution that has a context, and several contexts."""
    torch.manual_seed(0)
    steps = [AFFINE(3, 16, context_features=4 if contexts else None), nt.ReversePermutation(3)]
    if contexts:
        base: Any = ConditionalDiagonalNormal([3], nn.Linear(4, 6))
        flow = Flow(nt.CompositeTransform(steps), base, nn.Sequential(nn.Linear(7, 4), nn.Tanh()))
    else:
        flow = Flow(nt.CompositeTransform(steps), StandardNormal([3]))
    stirred(flow)
    context = torch.randn(contexts, 7) if contexts else None
    for got, wanted in zip(sample_all(tff.accelerate(flow), context), sample_all(flow, context), strict=True):
        assert got.shape == wanted.shape
        assert_close(got, wanted, 1e-4)
    if not contexts:  # with a context, batches of different sizes do not fit each other in the library
        batched = [(torch.manual_seed(1), each.sample(5, batch_size=2))[1] for each in (flow, tff.accelerate(flow))]
        assert_close(*batched, 1e-4)


def test_gradients_reach_the_weights_and_the_context() -> None:
    torch.manual_seed(0)
    flow = stirred(Flow(SPLINE(4, 12, context_features=2, tails="linear", tail_bound=3.0), StandardNormal([4])))
    fast, context = tff.accelerate(flow), torch.randn(3, 2, requires_grad=True)
    wanted = [context, *flow.parameters()]
    gradients = []
    for each in (flow, fast):
        torch.manual_seed(0)
        x, log_prob = each.sample_and_log_prob(5, context)
        loss = x.square().mean() + log_prob.mean() + each.log_prob(torch.ones(3, 4), context).mean()
        gradients.append(torch.autograd.grad(loss, wanted))
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert_close(ours, theirs, 1e-4)
    assert not fast.sample(2, context).requires_grad


@torch.no_grad()
def test_refresh_takes_new_weights() -> None:
    """The copy stays as it was, those weights that read the context too."""
    torch.manual_seed(0)
    flow = stirred(Flow(AFFINE(4, 12, context_features=2), StandardNormal([4]))).double()
    fast, old, z, c = tff.accelerate(flow), copy.deepcopy(flow), torch.randn(6, 4).double(), torch.randn(6, 2).double()
    stirred(flow, 0.2)
    assert not torch.equal(old._transform.inverse(z, c)[0], flow._transform.inverse(z, c)[0])
    for model in (old, flow):
        assert_close(fast._transform.inverse(z, c)[0], model._transform.inverse(z, c)[0], 1e-9)
        fast.refresh()


@torch.no_grad()
def test_the_librarys_negative_discriminant() -> None:
    """nflows #87: noise just below a knot of a steep spline ends its sampling with an AssertionError."""
    torch.manual_seed(0)
    flow = Flow(SPLINE(200, 8, num_bins=8, tails="linear", tail_bound=3.0), StandardNormal([200])).eval()
    law, last = SplineLaw.nflows(8, 3.0), flow._transform.autoregressive_net.final_layer
    last.weight.zero_()
    last.bias.normal_(std=10)
    at = knots(last.bias.view(200, -1), law).y[:, 1:-1].T
    z = torch.nextafter(at, torch.tensor(-9.0))
    with pytest.raises(AssertionError):
        flow._transform.inverse(z)
    x, log_det = tff.accelerate(flow)._transform.inverse(z)
    exact, exact_log_det = tff.accelerate(flow.double())._transform.inverse(z.double())
    assert_close(x, exact, 1e-5)
    assert_close(log_det, exact_log_det, 1e-4)


def changed(flow: Flow, path: str, module: Any) -> Flow:
    parent, _, name = path.rpartition(".")
    setattr(flow.get_submodule(parent), name, module)
    return flow


def maf(**options: Any) -> Flow:
    return MaskedAutoregressiveFlow(4, 8, 2, 2, **options)


class Other(AFFINE):
    pass


@pytest.mark.parametrize(
    ("flow", "named"),
    [
        (lambda: maf(activation=F.hardswish), r"_transforms\.1\.autoregressive_net\.blocks\.0\.activation.*hardswish"),
        (lambda: maf(batch_norm_between_layers=True), r"_transform\._transforms\.2.*eval mode"),
        (lambda: maf(batch_norm_within_layers=True), r"blocks\.0\.batch_norm_layers\.0.*eval mode"),
        (lambda: maf(dropout_probability=0.5), r"blocks\.0\.dropout.*eval mode"),
        (lambda: changed(maf(), "_transform._transforms.2", nt.Sigmoid()), r"_transform\._transforms\.2.*Sigmoid"),
        (lambda: changed(maf(), "_transform._transforms.3", Other(4, 8)), r"_transform\._transforms\.3.*Other"),
        (
            lambda: changed(maf(), "_transform._transforms.1.autoregressive_net.final_layer", nn.Linear(8, 8)),
            r"autoregressive_net\.final_layer.*Linear",
        ),
        (lambda: Flow(nt.LULinear(4), StandardNormal([4])), "masked autoregressive.*LULinear"),
    ],
)
def test_what_engines_do_not_know_is_named(flow: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        tff.accelerate(flow().train())


def test_a_flow_that_computes_another_thing_is_refused() -> None:
    flow = maf()
    flow._transform._transforms[1].autoregressive_net.initial_layer.register_forward_hook(lambda m, i, out: out * 2)
    flow._transform._transforms[1].autoregressive_net.final_layer.bias.data.normal_()
    stirred(flow, 0.5)
    with pytest.raises(ArgumentError, match="differ by"):
        tff.accelerate(flow)
    assert tff.accelerate(flow, check=False).sample(2).shape == (2, 4)
    with pytest.raises(ArgumentError, match="options"):
        tff.accelerate(flow, window=3)
    with pytest.raises(ArgumentError, match=r"context: .*None.*\(3, 1, 2\)"):
        tff.accelerate(flow, check=False).sample(2, torch.ones(3, 2))
    for context in (None, torch.ones(3, 1)):
        with pytest.raises(ArgumentError, match=r"context: .*2 features"):
            tff.accelerate(Flow(AFFINE(4, 8, context_features=2), StandardNormal([4]))).sample(2, context)
    with pytest.raises(ArgumentError, match=r"nflows\.flows\.Flow"):
        tff.accelerate(flow._transform)


def test_the_package_does_without_nflows() -> None:
    script = (
        "import sys, tarflow_fast; tarflow_fast.accelerate; import tarflow_fast.cli; "
        "sys.exit(bool({'nflows', 'normflows', 'sbi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("context", [0, 2])
def test_couplings(context: int) -> None:
    torch.manual_seed(0)

    def net(inputs: int, outputs: int) -> ResidualNet:
        return ResidualNet(inputs, outputs, 12, context_features=context or None, use_batch_norm=True)

    steps = [
        nt.PiecewiseRationalQuadraticCouplingTransform(
            [1, 0, 1, 0, 0], net, num_bins=5, tails="linear", tail_bound=3.0
        ),
        nt.PiecewiseRationalQuadraticCouplingTransform(
            [0, 1, 0, 0, 1], net, 4, tails="linear", tail_bound=2.0, apply_unconditional_transform=True
        ),
        nt.LULinear(5),
        nt.AffineCouplingTransform([0, 1, 0, 1, 1], net),
        AFFINE(5, 12, context_features=context or None),
        nt.InverseTransform(nt.AdditiveCouplingTransform([0, 0, 0, 1, 1], net)),
    ]
    flow = stirred(Flow(nt.CompositeTransform(steps), StandardNormal([5])))
    check(flow, 5, context)
    check(Flow(nt.CompositeTransform(steps[:4]), StandardNormal([5])), 5, context)
    other = nt.PiecewiseRationalQuadraticCouplingTransform([0, 1], nn.Linear, tails="linear")
    with pytest.raises(ArgumentError, match=r"_transform\.transform_net.*Linear"):
        tff.accelerate(Flow(other, StandardNormal([2])))
    other = nt.PiecewiseRationalQuadraticCouplingTransform([0, 1], net, tails="linear")
    other.eval().unconditional_transform = nt.PointwiseAffineTransform(1.0, 2.0)
    with pytest.raises(ArgumentError, match=r"_transform\.unconditional_transform.*Pointwise"):
        tff.accelerate(Flow(other, StandardNormal([2])))
