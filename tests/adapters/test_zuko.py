"""zuko's flows, accelerated: the same distribution to rounding, with the library's own inverse as the oracle."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError

zuko = pytest.importorskip("zuko")
FLOWS = zuko.flows
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def noise_of(flow: nn.Module, *shape: int) -> Tensor:
    weight = next(flow.parameters())
    return torch.randn(*shape, dtype=torch.float64).to(weight)


def check(flow: Any, features: int, context: int = 0, batch: int = 20, **options: Any) -> None:
    """Samples of the same noise, both log-probabilities, and those that come with samples."""
    c = noise_of(flow, context) if context else None
    fast, theirs = tff.accelerate(flow, **options)(c), flow(c)
    tolerance = TOLERANCE[next(flow.parameters()).dtype]
    with torch.no_grad():
        torch.manual_seed(1)
        wanted, log_prob = theirs.rsample_and_log_prob((batch,))
        torch.manual_seed(1)
        got, ours = fast.rsample_and_log_prob((batch,))
        assert_close(got, wanted, tolerance)
        assert_close(ours, log_prob, tolerance * features**0.5)
        assert_close(fast.log_prob(wanted), theirs.log_prob(wanted), tolerance * features**0.5)
    torch.manual_seed(2)
    wanted = theirs.sample((batch,))
    torch.manual_seed(2)
    assert_close(fast.sample((batch,)), wanted, tolerance)


@st.composite
def flows(draw: st.DrawFn) -> tuple[Any, int, int]:
    features, context = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(["MAF", "NSF", "NCSF", "NICE", "RealNVP"]))
    keywords: dict[str, Any] = {"transforms": draw(st.integers(1, 3))}
    if kind in ("MAF", "NSF", "NCSF"):
        keywords |= {"randperm": draw(st.booleans()), "residual": draw(st.booleans())}
        keywords["passes"] = draw(st.sampled_from([None, 2, 3]))
    elif features == 1:
        kind = "MAF"
    else:
        keywords["randmask"] = draw(st.booleans())
    if features == 1:
        keywords = {"transforms": keywords["transforms"]}
    keywords["hidden_features"] = draw(st.lists(st.integers(features, 24), min_size=1, max_size=3))
    keywords["activation"] = draw(st.sampled_from([nn.ReLU, nn.ELU, nn.Tanh, nn.SiLU, partial(nn.LeakyReLU, 0.2)]))
    if features == 1 and not context:
        del keywords["hidden_features"], keywords["activation"]
    return getattr(FLOWS, kind)(features, context, **keywords), features, context


@given(made=flows(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40)
def test_any_flow_of_the_library(made: tuple[Any, int, int], dtype: torch.dtype) -> None:
    flow, features, context = made
    check(flow.to(dtype), features, context, batch=5)


@given(data=st.data())
@settings(max_examples=20)
def test_any_adjacency(data: st.DataObject) -> None:
    """Graphs of dependence, with context columns of their own."""
    features = data.draw(st.integers(2, 7))
    bits = st.lists(st.booleans(), min_size=features * (features + 2), max_size=features * (features + 2))
    adjacency = torch.tensor(data.draw(bits)).reshape(features, features + 2)
    adjacency[:, :features] = adjacency[:, :features].tril() | torch.eye(features, dtype=torch.bool)
    adjacency[:, -1] = True  # zuko refuses networks of which no output depends on anything
    shuffled = torch.randperm(features)
    adjacency = torch.cat([adjacency[shuffled][:, shuffled], adjacency[shuffled][:, features:]], 1)
    transform = FLOWS.MaskedAutoregressiveTransform(features, 2, adjacency=adjacency, hidden_features=(17,))
    flow = zuko.lazy.Flow(transform, FLOWS.MAF(features).base).double()
    check(flow, features, 2)


@pytest.mark.parametrize("solver", ["sequential", "adaptive", "auto"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_every_backend_and_solver(backend: str, solver: str) -> None:
    check(FLOWS.NSF(12, 3, hidden_features=(32, 32)).double(), 12, 3, backend=backend, solver=solver)


def test_wide_flows() -> None:
    torch.manual_seed(0)
    check(FLOWS.MAF(100, transforms=3, hidden_features=(128, 128)), 100, batch=70)
    check(FLOWS.NSF(40, transforms=3, hidden_features=(64, 64)), 40, batch=70)


def test_large_weights() -> None:
    """Steep scales and splines magnify the rounding of samples: the noise that zuko finds in them shows how far."""
    for kind in ("MAF", "NSF"):
        torch.manual_seed(1)
        flow = getattr(FLOWS, kind)(6, transforms=1, hidden_features=(32,)).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(3)
            z = noise_of(flow, 100, 6)
            assert_close(flow().transform(tff.accelerate(flow)().transform.inv(z)), z, 1e-12)


def test_steps_between_transforms() -> None:
    torch.manual_seed(0)
    maf, base = FLOWS.MaskedAutoregressiveTransform, FLOWS.MAF(5).base
    fixed = zuko.lazy.UnconditionalTransform
    lower = torch.randn(5, 5) * 0.3 + torch.eye(5)
    steps = [
        maf(5, 2, univariate=zuko.transforms.AdditiveTransform, shapes=[()]),
        fixed(zuko.transforms.PermutationTransform, torch.tensor([3, 1, 4, 0, 2]), buffer=True),
        fixed(zuko.transforms.SoftclipTransform, bound=11.0),
        maf(5, 2, univariate=partial(zuko.transforms.MonotonicAffineTransform, slope=1e-2)),
        fixed(zuko.transforms.RotationTransform, torch.randn(5, 5)),
        fixed(zuko.transforms.LULinearTransform, lower),
        FLOWS.ElementWiseTransform(5, 2),
        maf(5, 2, univariate=partial(zuko.transforms.MonotonicRQSTransform, bound=2.0), shapes=[(4,), (4,), (3,)]),
        maf(5, 2, univariate=partial(zuko.transforms.MonotonicRQSTransform, slope=0.1), shapes=[(4,), (4,), (3,)]),
        zuko.lazy.LazyInverse(maf(5, 2, order=[4, 2, 0, 1, 3])),
        zuko.lazy.LazyInverse(fixed(zuko.transforms.PermutationTransform, torch.tensor([3, 1, 4, 0, 2]), buffer=True)),
    ]
    check(zuko.lazy.Flow(steps, base).double(), 5, 2)


def test_contexts_in_batches() -> None:
    flow = FLOWS.NSF(4, 2, hidden_features=(16,)).double()
    fast = tff.accelerate(flow)
    for shape in ((3,), (2, 3), (1,)):
        c = noise_of(flow, *shape, 2)
        torch.manual_seed(0)
        wanted = flow(c).sample((5,))
        torch.manual_seed(0)
        got = fast(c).sample((5,))
        assert_close(got, wanted, 1e-9)
        with torch.no_grad():
            assert_close(fast(c).log_prob(got), flow(c).log_prob(got), 1e-9)
            assert_close(fast(c).log_prob(got[0]), flow(c).log_prob(got[0]), 1e-9)
    assert fast(c).sample().shape == (1, 4)


def test_gradients_reach_the_weights_and_the_context() -> None:
    flow = FLOWS.NSF(5, 2, transforms=2, hidden_features=(16, 16)).double()
    fast, c = tff.accelerate(flow), noise_of(flow, 2).requires_grad_()
    wanted = [c, *flow.parameters()]
    gradients = []
    for each in (flow, fast):
        torch.manual_seed(0)
        x, log_prob = each(c).rsample_and_log_prob((6,))
        loss = x.square().sum() + log_prob.sum() + each(c).log_prob(torch.ones(5, dtype=torch.float64))
        gradients.append(torch.autograd.grad(loss, wanted))
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert_close(ours, theirs, 1e-8)


@pytest.mark.parametrize("context", [0, 2])
def test_refresh_takes_new_weights(context: int) -> None:
    """Of every part: also of a network that reads the context alone."""
    steps = [*FLOWS.MAF(4, context, transforms=1, hidden_features=(16,)).transform.transforms]
    steps += [FLOWS.ElementWiseTransform(4, context)]
    flow = zuko.lazy.Flow(steps, FLOWS.MAF(4).base).double()
    c = torch.ones(context, dtype=torch.float64) if context else None
    old = copy.deepcopy(flow)
    fast = tff.accelerate(flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for model in (old, flow):
        torch.manual_seed(0)
        wanted = model(c).sample((3,))
        torch.manual_seed(0)
        assert_close(fast(c).sample((3,)), wanted, 1e-9)
        fast.refresh()


def test_a_certificate_is_the_librarys_own_word() -> None:
    flow = FLOWS.MAF(6, hidden_features=(16,))
    fast = tff.accelerate(flow)
    torch.manual_seed(0)
    x, log_prob, certificate = fast().certified_sample((10,))
    torch.manual_seed(0)
    assert torch.equal(x, fast().sample((10,)))
    with torch.no_grad():
        assert_close(log_prob, flow().log_prob(x), 1e-4)
    assert certificate.count(1e-3) == (0, 0)
    assert certificate.count(-1.0) == (10, 10)
    with torch.no_grad():
        flow.transform.transforms[0].hyper[-1].bias.add_(
            1.0
        )  # the certificate is of the flow as it is, samples are not
    assert fast().certified_sample((10,))[2].count(1e-3)[0] == 10


def coupled(univariate: Any) -> Any:
    of = {"univariate": univariate, "shapes": [(3,), (3,), (2,)]}
    return zuko.lazy.Flow([FLOWS.GeneralCouplingTransform(4, **of)], FLOWS.MAF(4).base)


class Doubled(zuko.transforms.MonotonicAffineTransform):
    pass


@pytest.mark.parametrize(
    ("flow", "named"),
    [
        (FLOWS.BPF(4), r"transform\.transforms\.0.*univariate.*BoundedBernstein"),
        (FLOWS.GF(4), r"transform\.transforms\.0.*Gaussianization"),
        (coupled(FLOWS.spline.CircularRQSTransform), r"transform\.transforms\.0.*CircularRQS"),
        (FLOWS.MAF(4, activation=nn.Hardswish), r"transform\.transforms\.0\.hyper\.1.*Hardswish"),
        (FLOWS.MAF(4, univariate=Doubled), r"transform\.transforms\.0.*Doubled"),
        (FLOWS.NICE(4, normalize=True), r"transform\.transforms\.0\.hyper\.2.*LayerNorm"),
        (FLOWS.CNF(4), r"transform.*FFJTransform"),
        (zuko.lazy.Flow([FLOWS.MAF(4).transform, nn.Identity()], FLOWS.MAF(4).base), "transforms.1.*Identity"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_engines_do_not_know_is_named(flow: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        tff.accelerate(flow)


def test_a_flow_that_computes_another_thing_is_refused() -> None:
    class Other(FLOWS.MaskedAutoregressiveTransform):
        pass

    flow = FLOWS.MAF(4)
    flow.transform.transforms[1].hyper[0].register_forward_hook(lambda module, inputs, out: out * 2)
    with pytest.raises(ArgumentError, match="differ by"):
        tff.accelerate(flow)
    assert tff.accelerate(flow, check=False)().sample((2,)).shape == (2, 4)
    with pytest.raises(ArgumentError, match=r"transforms\.0.*Other"):
        tff.accelerate(zuko.lazy.Flow([Other(4)], FLOWS.MAF(4).base))
    with pytest.raises(ArgumentError, match="options"):
        tff.accelerate(FLOWS.MAF(4), window=3)


def test_the_package_does_without_zuko() -> None:
    script = (
        "import sys, tarflow_fast; tarflow_fast.accelerate; import tarflow_fast.cli; sys.exit('zuko' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
