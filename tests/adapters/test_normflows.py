"""normflows' models, accelerated: the same distribution to rounding, with the library's own layers as the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError

nf = pytest.importorskip("normflows", reason="normflows is not installed; it is in the extra `flows`")
SPLINE = pytest.importorskip(
    "normflows.flows.neural_spline.autoregressive"
).MaskedPiecewiseRationalQuadraticAutoregressive
COUPLING = pytest.importorskip("normflows.flows.neural_spline.coupling").PiecewiseRationalQuadraticCoupling
pytestmark = pytest.mark.filterwarnings("ignore:torch.(lu|triangular_solve) is deprecated")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
F = nf.flows


def model_of(features: int, layers: list[Any], context: int = 0, amount: float = 0.1) -> Any:
    """Returns a model in eval mode, with all weights and statistics moved, so that none is trivial."""
    kind = nf.ConditionalNormalizingFlow if context else nf.NormalizingFlow
    model = kind(nf.distributions.DiagGaussian(features, trainable=False), layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def check(model: Any, features: int, context: int = 0, batch: int = 20, **options: Any) -> None:
    """Samples of the same noise with their log q, and the log-density of these points, in both dtypes."""
    for dtype in (torch.float32, torch.float64):
        own = copy.deepcopy(model).to(dtype)
        fast = tff.accelerate(own, **options)
        given = {"context": torch.randn(batch, context, dtype=dtype)} if context else {}
        results = []
        for each in (own, fast):
            torch.manual_seed(1)
            x, log_prob = each.sample(batch, **given)
            x = x if not results else results[0][0]  # both are asked of the same points
            results.append((x, log_prob, each.log_prob(x, **given), each.inverse(x, **given)))
        torch.manual_seed(1)
        samples = fast.sample(batch, **given)[0]
        scale = 1 + samples.abs().max().item()
        assert_close(samples, results[0][0], TOLERANCE[dtype] * scale)
        for got, wanted in zip(results[1][1:], results[0][1:], strict=True):
            assert_close(got, wanted, TOLERANCE[dtype] * features**0.5 * scale)


@st.composite
def models(draw: st.DrawFn) -> tuple[Any, int, int]:
    features, context = draw(st.integers(2, 7)), draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    hidden, blocks = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    layers: list[Any] = []
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.booleans()):
            residual = bool(context) or draw(st.booleans())  # the library has no other blocks with a context
            layers.append(
                F.MaskedAffineAutoregressive(
                    features,
                    hidden,
                    context_features=context or None,
                    num_blocks=blocks,
                    use_residual_blocks=residual,
                    random_mask=not residual and draw(st.booleans()),
                    activation=draw(st.sampled_from([torch.relu, torch.tanh, nn.ELU()])),
                    use_batch_norm=draw(st.booleans()),
                )
            )
        else:
            layers.append(
                F.AutoregressiveRationalQuadraticSpline(
                    features,
                    blocks,
                    hidden,
                    num_context_channels=context or None,
                    num_bins=draw(st.integers(1, 9)),
                    tail_bound=draw(st.sampled_from([1, 4.0])),
                    activation=draw(st.sampled_from([nn.ReLU, nn.SiLU])),
                    permute_mask=draw(st.booleans()),
                    init_identity=draw(st.booleans()),
                )
            )
        layers.append(F.LULinearPermute(features, identity_init=draw(st.booleans())))
    return model_of(features, layers, context), features, context


@pytest.mark.slow
@given(made=models())
@settings(max_examples=40, deadline=None)
def test_any_model_of_the_library(made: tuple[Any, int, int]) -> None:
    check(*made, batch=5)


@st.composite
def couplings(draw: st.DrawFn) -> tuple[Any, int, int]:
    """Splines and affine maps; only splines have a context."""
    features, context = draw(st.integers(2, 7)), draw(st.integers(0, 2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    hidden, layers = draw(st.integers(1, 20)), []
    outputs = draw(st.sampled_from([{}, {"output_fn": "tanh"}, {"dropout": 0.5}]))
    for _ in range(draw(st.integers(1, 3))):
        kind = "spline" if context else draw(st.sampled_from(["spline", "bare spline", "split", "mask"]))
        if kind == "spline":
            keywords = {"num_bins": draw(st.integers(1, 9)), "tail_bound": draw(st.sampled_from([1.0, 4.0]))}
            keywords |= {"reverse_mask": draw(st.booleans()), "num_context_channels": context or None}
            layers.append(F.CoupledRationalQuadraticSpline(features, draw(st.integers(1, 2)), hidden, **keywords))
        elif kind == "bare spline":
            mask = [1, *[draw(st.integers(0, 1)) for _ in range(features - 2)], 0]
            constant, bound = draw(st.booleans()), draw(st.sampled_from([1.0, 4.0]))
            layers.append(
                COUPLING(torch.tensor(mask), net_of(hidden), 5, "linear", bound, apply_unconditional_transform=constant)
            )
        elif kind == "split":
            scale, modes = draw(st.sampled_from(["exp", "sigmoid_inv", ""])), ["channel", "channel_inv"]
            modes += ["checkerboard", "checkerboard_inv"] if features % 2 == 0 else []
            mode = draw(st.sampled_from(modes))
            given = features // 2 if mode in ("channel_inv",) or "checkerboard" in mode else (features + 1) // 2
            net = nf.nets.MLP([given, hidden, (features - given) * (2 if scale else 1)], leaky=0.1, **outputs)
            layers.append(F.AffineCouplingBlock(net, bool(scale), scale, mode))
        else:
            s, t = (nf.nets.MLP([features, hidden, hidden, features], **outputs) for _ in range(2))
            which = draw(st.sampled_from([(t, s), (t, None), (None, s), (None, None)]))
            layers.append(F.MaskedAffineFlow(torch.randint(0, 2, (features,)).double(), *which))
        layers.append(F.LULinearPermute(features, identity_init=False))
    return model_of(features, layers, context), features, context


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_any_circular_spline(data: st.DataObject) -> None:
    """Alone, of the network's inputs too, and among linear ones; of values within the bound, as the next test says."""
    features, context = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 2))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    circular = data.draw(st.lists(st.integers(0, features - 1), min_size=1, unique=True))
    keywords: dict[str, Any] = {"ind_circ": circular, "num_context_channels": context or None, "init_identity": False}
    keywords |= {"num_bins": data.draw(st.integers(2, 6)), "tail_bound": 3.0}
    layers = [
        F.CircularAutoregressiveRationalQuadraticSpline(features, 1, 12, **keywords),
        F.CircularCoupledRationalQuadraticSpline(features, 1, 12, **keywords, reverse_mask=data.draw(st.booleans())),
        SPLINE(features, 12, context or None, 4, "circular", 3.0, init_identity=False),
    ]
    made = model_of(features, layers, context)
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(made).to(dtype)
        fast = tff.accelerate(model, check=False)
        given = {"context": torch.randn(5, context, dtype=dtype)} if context else {}
        values = torch.rand(5, features, dtype=dtype) * 6 - 3
        for way, order in (("forward", 1), ("inverse", -1)):
            results = []
            for each in (fast, model):
                x, total = values, 0.0
                for layer in list(each.flows)[::order]:
                    x, log_det = getattr(layer, way)(x, **given)
                    total = total + log_det
                results.append((x, total))
            for got, wanted in zip(*results, strict=True):
                assert_close(got, wanted, TOLERANCE[dtype] * features**0.5)


def test_values_outside_of_a_circular_spline_stay() -> None:
    """Where tails are in a list, the library makes 0 of them, of which there is no way back."""
    torch.manual_seed(0)
    model = model_of(4, [F.CircularAutoregressiveRationalQuadraticSpline(4, 1, 8, ind_circ=[1], tail_bound=1.0)])
    x = torch.tensor([[2.0, -3, 0.5, 5]])
    assert model.inverse(x)[0, [0, 1, 3]].tolist() == [0, 0, 0]
    fast = tff.accelerate(model, check=False)
    z = fast.inverse(x)
    assert z[0, [0, 1, 3]].tolist() == [2, -3, 5]
    assert_close(fast.forward(z), x, 1e-5)


def net_of(hidden: int) -> Any:
    return lambda inputs, outputs: nf.nets.ResidualNet(inputs, outputs, hidden)


@pytest.mark.slow
@given(made=couplings())
@settings(max_examples=40, deadline=None)
def test_any_coupling_of_the_library(made: tuple[Any, int, int]) -> None:
    check(*made, batch=5)


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid_inv", None])
@pytest.mark.parametrize("mode", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
def test_affine_couplings(mode: str, scale_map: str | None) -> None:
    torch.manual_seed(0)
    layers = [
        block(nf.nets.MLP([2, 8, 4 if scale_map else 2]), scale=bool(scale_map), scale_map=scale_map, split_mode=mode)
    ]
    check(model_of(4, [*layers, F.Permute(4), *copy.deepcopy(layers)], amount=0.3), 4)


@pytest.mark.parametrize("nets", ["ts", "t", "s", ""])
def test_masked_affine_flows(nets: str) -> None:
    torch.manual_seed(0)
    of = {each: nf.nets.MLP([4, 8, 8, 4], output_fn="tanh") for each in nets}
    layers = [F.MaskedAffineFlow(torch.tensor(mask), **of) for mask in ([1.0, 0, 0, 1], [0.0, 1, 1, 0])]
    check(model_of(4, layers, amount=0.3), 4)


@torch.no_grad()
def test_steps_between_transforms() -> None:
    torch.manual_seed(0)
    maf = F.MaskedAffineAutoregressive
    layers = [
        maf(5, 12),
        F.Permute(5),
        F.ActNorm((5,)),
        F.Reverse(F.Composite([maf(5, 12), F.Permute(5, mode="swap"), F.AffineConstFlow((5,))])),
        F.InvertibleAffine(5),
        SPLINE(5, 12, tails="linear", tail_bound=3.0, init_identity=False),
        F.InvertibleAffine(5, use_lu=False),
        F.AutoregressiveRationalQuadraticSpline(5, 1, 12),
        F.Permute(5, mode="swap"),
    ]
    model = model_of(5, layers, amount=0.05)
    model.sample(50)  # ActNorm sees data
    for layer in layers:
        if isinstance(layer, F.Reverse):
            # Composite makes its log-determinants in fp32, which is what the tolerance of fp64 would be about.
            layer.flow._cascade = lambda inputs, funcs: cascade(inputs, funcs)
    check(model, 5)


def cascade(inputs: Tensor, funcs: Any) -> tuple[Tensor, Tensor]:
    """What the library's `Composite` does, in the dtype of the data."""
    total = inputs.new_zeros(len(inputs))
    for func in funcs:
        inputs, log_det = func(inputs)
        total = total + log_det
    return inputs, total


def test_gradients_reach_the_weights() -> None:
    torch.manual_seed(0)
    layers = [F.AutoregressiveRationalQuadraticSpline(4, 1, 12), F.MaskedAffineAutoregressive(4, 12)]
    model = model_of(4, layers)
    fast = tff.accelerate(model)
    gradients = []
    for each in (model, fast):
        torch.manual_seed(0)
        x, log_prob = each.sample(5)
        loss = x.square().mean() + log_prob.mean() + each.forward_kld(torch.ones(3, 4))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert_close(ours, theirs, 1e-4)
    with torch.no_grad():
        assert not fast.sample(2)[0].requires_grad


@torch.no_grad()
def test_refresh_takes_new_weights() -> None:
    torch.manual_seed(0)
    model = model_of(4, [F.AutoregressiveRationalQuadraticSpline(4, 1, 12, num_context_channels=2)], 2).double()
    fast, old = tff.accelerate(model), copy.deepcopy(model)
    x, c = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    assert not torch.equal(old.log_prob(x, c), model.log_prob(x, c))
    for each in (old, model):
        assert_close(fast.log_prob(x, c), each.log_prob(x, c), 1e-9)
        fast.refresh()


MAF = F.MaskedAffineAutoregressive


def with_features(module: Any) -> Any:
    layer = SPLINE(4, 8, tails="linear")
    layer.autoregressive_net.preprocessing = module
    return layer


def with_tails(tails: Any) -> Any:
    layer = SPLINE(4, 8, tails="linear")
    layer.tails = tails
    return layer


def block(net: Any = None, **options: Any) -> Any:
    return F.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]) if net is None else net, **options)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (lambda: [MAF(4, 8), F.Planar((4,))], r"flows\.1.*Planar"),
        (lambda: [MAF(4, 8), F.ActNorm((4,))], r"flows\.1.*seen data"),
        (lambda: [MAF(4, 8, use_batch_norm=True)], r"flows\.0\.autoregressive_net\.blocks\.0\.batch_norm.*eval mode"),
        (lambda: [MAF(4, 8, activation=nn.Hardswish())], r"flows\.0\..*activation.*Hardswish"),
        (lambda: [SPLINE(4, 8, tails="linear", tail_bound=torch.ones(4))], r"flows\.0.*one tail bound.*\(4,\)"),
        (lambda: [with_features(nf.utils.nn.PeriodicFeaturesCat(4, [1]))], r"net\.preprocessing.*FeaturesCat"),
        (
            lambda: [with_features(nf.utils.nn.PeriodicFeaturesElementwise(4, [1], activation=nn.Tanh()))],
            r"net\.preprocessing\.activation.*Tanh",
        ),
        (lambda: [F.LULinearPermute(4)], "masked autoregressive.*LULinearPermute"),
        (lambda: [block(scale_map="sigmoid")], r"flows\.0\.flows\.1.*sigmoid_inv.*sigmoid$"),
        (lambda: [block(nn.Linear(2, 4))], r"flows\.0\.flows\.1\.param_map.*Linear"),
        (
            lambda: [block(nf.nets.MLP([2, 8, 4], output_fn="clampexp"))],
            r"flows\.0\.flows\.1\.param_map\.net\.3.*ClampExp",
        ),
        (lambda: [F.MaskedAffineFlow(torch.tensor([0.5, 1, 0, 0]))], r"flows\.0.*zeros and ones"),
        (lambda: [with_tails("other")], r"flows\.0.*linear or circular tails.*other"),
    ],
)
def test_what_engines_do_not_know_is_named(layers: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        tff.accelerate(nf.NormalizingFlow(nf.distributions.DiagGaussian(4), layers()))


def test_a_model_that_computes_another_thing_is_refused() -> None:
    torch.manual_seed(0)
    model = model_of(4, [MAF(4, 8)])
    model.flows[0].autoregressive_net.initial_layer.register_forward_hook(lambda m, i, out: out * 2 + 1)
    with pytest.raises(ArgumentError, match="differ by"):
        tff.accelerate(model)
    with pytest.raises(ArgumentError, match="options"):
        tff.accelerate(model, window=3)
    with pytest.raises(ArgumentError, match="a NormalizingFlow"):
        tff.accelerate(model.flows[0])
