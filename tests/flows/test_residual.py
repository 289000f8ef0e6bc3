"""Residual flows: bounds that hold, estimates without bias, and inverses with a stated residual."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import SAME_F32, SAME_F64, STANDARD_ERRORS, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.fixed_point import fixed_point
from tarflow_fast.flows.lipschitz import Contraction, norm_bound
from tarflow_fast.flows.residual import ResidualBlock, ResidualFlow, roulette


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def model_of(*shape: int, **more: Any) -> ResidualFlow:
    """Returns a flow whose networks are near their bound, in evaluation mode: their weights are large identities."""
    torch.manual_seed(0)
    model = build("residual", data_shape=shape, **{"blocks": 2, "hidden": (16,), **more}).double().eval()
    assert isinstance(model, ResidualFlow)
    with torch.no_grad():
        for network in (module for module in model.modules() if isinstance(module, Contraction)):
            for layer in network.layers:
                large = 5 * (
                    torch.eye(*layer.weight.shape) if layer.weight.dim() == 2 else nn.init.dirac_(layer.weight)
                )
                layer.weight.copy_(large + 0.3 * layer.weight[0].numel() ** -0.5 * noise(*layer.weight.shape))
    return model


def blocks(model: ResidualFlow) -> list[ResidualBlock]:
    return [module for module in model.modules() if isinstance(module, ResidualBlock)]


def close_in_mean(values: Tensor, wanted: Tensor) -> None:
    """The mean over the first dimension is within so many standard errors of what is wanted."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - wanted).abs() <= STANDARD_ERRORS * error + 1e-12).all()


@pytest.mark.parametrize("shape", [(64, 64), (3, 40), (40, 3), (1, 7), (7, 1)], ids=str)
def test_the_bound_of_a_matrix_holds_and_is_near(shape: tuple[int, int]) -> None:
    for seed in range(5):
        W = noise(*shape, seed=seed)
        norm = float(torch.linalg.matrix_norm(W, 2))
        assert norm * (1 - 1e-12) <= float(norm_bound(W)) <= 1.04 * norm
    orthogonal = torch.linalg.qr(noise(64, 64))[0]  # all singular values are equal: the worst case
    assert 1 <= float(norm_bound(orthogonal)) <= 1.04


@pytest.mark.parametrize("side", [1, 3])
def test_the_bound_of_a_convolution_holds_at_every_size(side: int) -> None:
    W = noise(3, 4, side, side)
    norms = []
    for pixels in (3, 5, 12, 17):
        matrix = torch.autograd.functional.jacobian(
            lambda x: F.conv2d(x, W, padding=side // 2), torch.zeros(1, 4, pixels, pixels, dtype=torch.float64)
        )
        assert isinstance(matrix, Tensor)
        norms.append(float(torch.linalg.matrix_norm(matrix.reshape(3 * pixels**2, 4 * pixels**2), 2)))
    assert max(norms) * (1 - 1e-12) <= float(norm_bound(W)) <= 1.2 * max(norms)


def test_a_bound_of_nothing_and_of_the_huge() -> None:
    assert 0 <= float(norm_bound(torch.zeros(3, 4))) < 1e-6
    assert float(norm_bound(1e18 * torch.eye(3))) == pytest.approx(1e18, rel=0.1)


@pytest.mark.parametrize("shape", [(6,), (2, 4, 8)], ids=str)
def test_a_network_stays_below_its_constant(shape: tuple[int, ...]) -> None:
    model = model_of(*shape, hidden=(16, 16), lipschitz=0.8)
    network = blocks(model)[0].network
    with torch.no_grad():
        weights, bound = network.weights()
    assert float(bound) == pytest.approx(0.8)  # all weights are at their bound
    dims = math.prod(shape)
    slopes = []
    for x in 10 * noise(8, *shape):
        jacobian = torch.autograd.functional.jacobian(lambda x: network(x[None], None, weights)[0], x)
        assert isinstance(jacobian, Tensor)
        slopes.append(float(torch.linalg.matrix_norm(jacobian.reshape(dims, dims), 2)))
    assert 0.5 < max(slopes) < 0.8


def exact_log_det(model: ResidualFlow, x: Tensor) -> Tensor:
    """Returns the sum of the blocks' log-dets by autograd, as if there were no ActNorm."""
    found = []
    for each in x:
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0][0], each)
        assert isinstance(jacobian, Tensor)
        found.append(torch.linalg.slogdet(jacobian.reshape(each.numel(), each.numel()))[1])
    return torch.stack(found)


def test_training_estimates_the_density_without_bias() -> None:
    model, x = model_of(3, lipschitz=0.7), noise(2, 3)
    for step in model.bijection.steps:
        if hasattr(step, "initialised"):
            step.initialised.fill_(1)
    exact = model.log_prob(x)
    wanted = torch.autograd.grad(exact.mean(), list(model.parameters()), allow_unused=True)
    model.train()
    values, gradients = [], []
    for seed in range(300):
        found = model.log_prob(x, generator=seeded(seed))
        values.append(found.detach())
        gradients.append(torch.autograd.grad(found.mean(), list(model.parameters()), allow_unused=True))
    close_in_mean(torch.stack(values), exact.detach())
    assert torch.stack(values).std(0).min() > 0
    for parameter, each in zip(wanted, zip(*gradients, strict=True), strict=True):
        close_in_mean(torch.stack(each), parameter)


def test_roulette_weighs_terms_by_their_probability() -> None:
    drawn = [roulette(2, 0.5, seeded(seed)) for seed in range(4000)]
    assert min(map(len, drawn)) == 2
    assert all(c[:2] == [1.0, 1.0] and c[2:] == [2.0 ** (k + 1) for k in range(len(c) - 2)] for c in drawn)
    for term in (3, 4, 6):
        kept = torch.tensor([float(len(c) >= term) for c in drawn])
        close_in_mean(kept, torch.tensor(0.5 ** (term - 2)))


def test_a_large_sample_s_density_is_estimated_without_bias() -> None:
    model, x = model_of(1, 8, 12, hidden=(16,), most_terms=30, blocks=1, lipschitz=0.7), noise(1, 1, 8, 12)
    found = torch.stack([model.log_prob(x, generator=seeded(seed)).detach() for seed in range(50)])
    z = model(x)[0]
    close_in_mean(found, model.prior_log_prob(z).detach() + exact_log_det(model, x))
    assert found.std(0).min() > 0
    again = model.log_prob(x, generator=seeded(0))
    assert torch.equal(again.detach(), found[0])
    with torch.no_grad():
        assert torch.equal(model.log_prob(x, generator=seeded(0)), found[0])


def test_evaluation_draws_nothing_where_it_is_exact() -> None:
    model, x = model_of(4), noise(3, 4)
    assert torch.equal(model.log_prob(x, generator=seeded(0)), model.log_prob(x, generator=seeded(1)))


def test_gradients_go_through_the_inverse() -> None:
    model, z = model_of(3), noise(4, 3).requires_grad_()
    x, log_det = model.inverse(z)
    weights = [z, *model.parameters()]
    got = torch.autograd.grad((x.square().sum(1) + log_det).sum(), weights)
    # z(x) = z makes dx = −(dz/dx)⁻¹ ∂z(x), which autograd takes through a solve of its own
    x0 = x.detach()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0][0]))(x0).detach()
    newton = x0 + torch.linalg.solve(jacobian, (z - model(x0)[0])[..., None])[..., 0]
    wanted = torch.autograd.grad((newton.square().sum(1) - model(newton)[1]).sum(), weights)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, 1e-8)


@pytest.mark.parametrize("memory", [0, 1, 4])
def test_an_inverse_states_its_residual(memory: int) -> None:
    model, z = model_of(5, anderson=memory, lipschitz=0.95, blocks=3), 3 * noise(7, 5)
    x, _ = model.inverse(z)
    assert_close(model(x)[0], z, SAME_F64)
    for block in blocks(model):
        assert block.found is not None
        assert block.found.residual <= 1e-12
    assert model.evaluations() is None
    assert torch.isfinite(model.sample(3, generator=seeded(0))).all()
    assert model.evaluations() == sum(block.found.passes for block in blocks(model) if block.found)
    model.log_prob(z)
    assert model.evaluations() is None


def test_anderson_acceleration_takes_fewer_passes_to_the_same_point() -> None:
    A = torch.linalg.qr(noise(6, 6))[0] * 0.97
    b = noise(9, 6)
    plain, fast = (fixed_point(lambda x: torch.tanh(x @ A.T) + b, b, 0.97, memory) for memory in (0, 4))
    assert_close(fast.x, plain.x, 1e-12)
    assert 2 * fast.passes < plain.passes
    assert fixed_point(lambda x: b, b, 0.5, 4).passes == 1


@pytest.mark.parametrize("memory", [1, 2, 4])
def test_acceleration_that_leads_astray_is_taken_back(memory: int) -> None:
    """Newton's method diverges for the arctangent, from afar, and so does what is like it; a contraction converges."""
    found = fixed_point(lambda x: 0.95 * x - 1.85 * torch.atan(x), 10 * noise(200, 2), 0.95, memory)
    assert_close(found.x, torch.zeros_like(found.x), 1e-12)
    assert found.passes < 100


@pytest.mark.parametrize("memory", [0, 1, 4])
def test_an_iteration_ends_where_only_rounding_is_left(memory: int) -> None:
    found = fixed_point(lambda x: 0.95 * (x.flip(-1) - 1e3).abs(), noise(50, 3).float(), 0.95, memory)
    assert found.residual < 20 * 1.2e-7 * 1e3  # rounding, and what 1 / (1 − 0.95) makes of it
    assert found.passes < 600


def test_what_is_no_contraction_is_refused_by_name() -> None:
    model, x = model_of(2), noise(3, 2)
    blocks(model)[1].network.coefficient = 1.1
    for call in (model, model.inverse, model.log_prob):
        with pytest.raises(ArgumentError, match=r"^residual block 1: expected a contraction, .* at most 1\.21$"):
            call(x)
    with torch.no_grad():
        blocks(model)[0].network.layers[0].weight[0, 0] = math.nan
    with pytest.raises(ArgumentError, match=r"^residual block 0: expected a contraction"):
        model(x)


def test_an_iteration_that_does_not_converge_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = model_of(2), noise(3, 2)
    monkeypatch.setattr(Contraction, "forward", lambda self, x, context, weights: -2 * x)
    with pytest.raises(ArgumentError, match=r"^residual block 1: .* converges, got a residual of .* after \d+ passes$"):
        model.inverse(z)


@pytest.mark.parametrize(
    ("wrong", "value"),
    [("lipschitz", 1.0), ("lipschitz", 0.0), ("blocks", 0), ("terms", 0), ("anderson", -1), ("hidden", ())],
)
def test_options_that_make_no_flow_are_refused(wrong: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^{wrong}: expected "):
        build("residual", data_shape=(2,), **{wrong: value})


def test_an_inverse_leaves_the_mode_as_it_was() -> None:
    model = model_of(2).train()
    with torch.no_grad():
        z, _ = model.eval()(noise(3, 2))
        model.train()
        x, _ = model.inverse(z)
    assert all(block.training for block in blocks(model))
    assert_close(x, noise(3, 2), SAME_F32)
