"""Both directions of a flow of masked transforms and fixed steps, by every backend and solver."""

from __future__ import annotations

import pytest
import torch
from masked_flows import Recipe, naive_inverse, transform_of
from tolerances import SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.backend.cpu import masked as cpu_masked
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.devices import triton_missing
from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.masked import Elementwise, Linear, MaskedFlow, MaskedTransform, Permute, Reverse, Scale
from tarflow_fast.sampling.masked import FlowInverse, differentiable

WAYS = [("torch", "sequential"), ("torch", "adaptive"), ("torch", "auto")]
if cpu_missing() is None:
    WAYS += [("cpu", "sequential"), ("cpu", "adaptive"), ("cpu", "auto")]
every_way = pytest.mark.parametrize(("backend", "solver"), WAYS)
D = 7


def masked(seed: int, dtype: torch.dtype, **fields: object) -> MaskedTransform:
    recipe = Recipe(levels=(3, 0, 4, 1, 2, 1, 0), context=2, seed=seed, **fields)  # type: ignore[arg-type]
    return transform_of(recipe, dtype)


def flow(dtype: torch.dtype = torch.float64) -> MaskedFlow:
    """One of all steps there are, with permutations and scales between transforms, before and after them."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    order = (2, 5, 0, 6, 1, 3, 4)
    scale = Scale(drawn(D).abs() + 0.5, drawn(D))
    steps = (
        Scale(drawn(D).abs() + 0.5, drawn(D)),
        Permute(order),
        masked(0, dtype, law="softplus"),
        Permute(order),
        scale,
        Reverse(Scale(drawn(D).abs() + 0.5, drawn(D))),
        Reverse(Permute((1, 2, 0, 4, 3, 6, 5))),
        masked(1, dtype, law="spline", passed=3),
        Linear(drawn(D, D) / 4 + torch.eye(D, dtype=dtype), drawn(D)),
        Elementwise("softclip", 9.0),
        Reverse(Elementwise("softclip", 9.0)),
        masked(2, dtype, law="softclip").inverted_copy(),
        Permute(order),
    )
    return MaskedFlow(D, steps)


def plain(described: MaskedFlow, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and log-determinant, one step after another, inverted transforms by whole passes."""
    total = x.new_zeros(len(x))
    for step in described.steps:
        if isinstance(step, MaskedTransform):
            if step.inverted:
                x = naive_inverse(step, x, context)
                log_det = -step.forward(x, context)[1]
            else:
                x, log_det = step.forward(x, context)
        else:
            x, log_det = step.forward(x)
        total = total + log_det
    return x, total


@every_way
def test_both_directions(backend: str, solver: str) -> None:
    described = flow()
    x, context = torch.randn(40, D, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    z, log_det = plain(described, x, context)
    fast = FlowInverse(described, backend=backend, solver=solver)
    got, ours = fast.to_latents(x, context)
    assert_close(got, z, 1e-9)
    assert_close(ours, log_det, 1e-9)
    back, ours = fast.to_data(z, context)
    assert_close(back, x, 1e-9)
    assert_close(ours, -log_det, 1e-9)


@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
def test_both_directions_by_triton() -> None:
    described = flow(torch.float32)
    z, context = torch.randn(5, D), torch.randn(1, 2)
    got, ours = FlowInverse(described, backend="triton").to_data(z, context)
    x, log_det = FlowInverse(flow(), backend="torch").to_data(z, context)
    size = x.abs().max().item()  # hundreds
    assert_close(got / size, x.float() / size, 1e-6)
    assert_close(ours, log_det.float(), 1e-4)
    with pytest.raises(BackendError, match="in order"):
        FlowInverse(described, backend="triton", solver="adaptive")
    with pytest.raises(BackendError, match="float32"):
        FlowInverse(flow(), backend="triton")


def test_the_fixed_steps_invert_themselves() -> None:
    x = torch.randn(5, D, dtype=torch.float64).sigmoid()
    for step in (
        *flow().steps,
        Elementwise("tanh", 2.0),
        Elementwise("wrap", 2.0),
        Elementwise("exp"),
        Elementwise("sigmoid"),
    ):
        if isinstance(step, MaskedTransform):
            continue
        z, log_det = step.forward(x)
        back, other = step.inverse(z)
        assert_close(back, x, 1e-12)
        assert_close(other, -log_det, 1e-12)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v, step=step: step.forward(v)[0]))(x)
        assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det, 1e-12)


def test_the_differentiable_directions_are_the_same() -> None:
    described = flow()
    x, context = torch.randn(4, D, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    fast = FlowInverse(described)
    for to_latents in (True, False):
        got = differentiable(described.steps, x, context, to_latents=to_latents)
        wanted = (fast.to_latents if to_latents else fast.to_data)(x, context)
        for ours, theirs in zip(got, wanted, strict=True):
            assert_close(ours, theirs, 1e-9)


@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_a_batch_with_contexts_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    described = flow()
    x, context = torch.randn(200, D, dtype=torch.float64), torch.randn(200, 2, dtype=torch.float64)
    fast = FlowInverse(described, backend="cpu")
    whole = fast.to_data(x, context)
    monkeypatch.setattr(cpu_masked, "MOST_CONTEXT", 1)
    for ours, theirs in zip(fast.to_data(x, context), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_an_empty_batch() -> None:
    for backend in {backend for backend, _ in WAYS}:
        x, log_det = FlowInverse(flow(), backend=backend).to_data(torch.zeros(0, D), torch.zeros(0, 2))
        assert x.shape == (0, D)
        assert log_det.shape == (0,)


def test_weights_are_copied() -> None:
    described = flow()
    x, context = torch.randn(3, D, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for backend in {backend for backend, _ in WAYS}:
        fast = FlowInverse(described, backend=backend)
        before = fast.to_data(x, context)[0]
        step = described.steps[2]
        assert isinstance(step, MaskedTransform)
        step.layers[0].weight.mul_(1.5)
        assert_close(fast.to_data(x, context)[0], before, SAME_F64)


def test_options_that_do_not_fit_are_refused() -> None:
    described = flow()
    for options, match in (
        ({"backend": "gpu"}, "backend"),
        ({"solver": "newton"}, "solver"),
        ({"tol": 1e-3}, "tol"),
        ({"threads": 0}, "threads"),
    ):
        with pytest.raises(ArgumentError, match=match):
            FlowInverse(described, **options)  # type: ignore[arg-type]
    half = MaskedFlow(D, (transform_of(Recipe(levels=(0, 1)), torch.bfloat16),))
    with pytest.raises(BackendError, match="bfloat16"):
        FlowInverse(half, backend="cpu")
    assert FlowInverse(half).backend == "torch"
