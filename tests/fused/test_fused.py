"""Fused operations: their code is what couplings and splines run, and gives what PyTorch's equations give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE
from instruction_sets import every_set
from splines import LAWS, random_splines
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.devices import triton_missing
from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.coupling import alternating, checkerboard, half_of_channels
from tarflow_fast.fused import affine_coupling, function, fused_spline
from tarflow_fast.fused.affine_coupling import _AffineCoupling
from tarflow_fast.fused.spline import _Spline
from tarflow_fast.native import ISA_VARIABLE
from tarflow_fast.spline import spline

native = pytest.mark.skipif(cpu_missing() is not None, reason="needs the compiled module")
MASKS = {
    "two values": alternating((2,)),
    "seven values": alternating((7,), odd=True),
    "checkerboard": checkerboard((3, 6, 4)),
    "channels": half_of_channels((4, 5, 5), odd=True),
}
both_ways = pytest.mark.parametrize("inverse", [False, True])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def problem(mask: Tensor, outputs: int, dtype: torch.dtype, rows: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """Returns parameters and values, neither of them contiguous, and where the values change."""
    generator = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(outputs, rows, *mask.shape, generator=generator, dtype=dtype).transpose(0, 1)
    value = torch.randn(*mask.shape, rows, generator=generator, dtype=dtype).movedim(-1, 0)
    return parameters, value, (1 - mask).to(dtype)


def results_of(f: Callable[..., Any], inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Returns the results of f and the gradients of a fixed sum of them, in fp64."""
    given = [x.detach().requires_grad_() for x in inputs]
    results = f(*given)
    seeds = [torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x) for x in results]
    loss = sum((x * seed).sum() for x, seed in zip(results, seeds, strict=True))
    assert isinstance(loss, Tensor)
    return [x.detach().double() for x in (*results, *torch.autograd.grad(loss, given))]


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that comes uninitialised holds NaN from now on."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size: self.new_full(size, torch.nan))


@native
@every_set
@both_ways
@both_dtypes
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_native_couplings_are_the_equation(
    mask: Tensor, dtype: torch.dtype, inverse: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any mask, of numbers of values that fill no vector, and of samples that share one."""
    monkeypatch.setattr(function, "GRAIN", 1)
    monkeypatch.setenv(ISA_VARIABLE, isa)
    poison(monkeypatch)
    tolerance = SAME_F32 if dtype == torch.float32 else SAME_F64
    for outputs in (1, 2):
        parameters, value, given = problem(mask, outputs, dtype)
        op = _AffineCoupling(given, 2.0, inverse)
        assert function.serving(op, parameters, value) == "cpu"
        got = results_of(lambda p, v: function.apply(op, p, v), (parameters, value))  # noqa: B023
        exact = _AffineCoupling(given.double(), 2.0, inverse)
        wanted = results_of(exact.plain, (parameters.double(), value.double()))
        for ours, theirs in zip(got, wanted, strict=True):
            assert_close(ours, theirs, tolerance * (1 + float(theirs.abs().max())))
        assert torch.equal(got[0][:, mask == 1], value.double()[:, mask == 1])


@native
@every_set
@both_ways
@both_dtypes
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_native_splines_have_the_gradients_of_the_equation(
    law: Any, dtype: torch.dtype, inverse: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    poison(monkeypatch)
    inputs = random_splines(law, 37, 1.0, seed=2, dtype=dtype)
    assert function.serving(_Spline(law, inverse), *inputs) == "cpu"
    got = results_of(lambda p, v: fused_spline(p, v, law, inverse=inverse), inputs)
    wanted = results_of(lambda p, v: spline(p, v, law, inverse=inverse), tuple(x.double() for x in inputs))
    for i, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        inside = slice(2 if i >= 2 else 0, None)  # at an end, the gradient of one side is as good as the other's
        # The fp32 inverse's gradient is taken where its image was rounded to.
        allowed = 1e-9 if dtype == torch.float64 else 1e-3 if inverse and i >= 2 else SAME_F32
        assert_close(ours[inside], theirs[inside], allowed * (1 + float(theirs.abs().max())))


@native
@pytest.mark.parametrize("rows", [1, 2, 70_000])
def test_results_do_not_depend_on_threads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are divided among threads, of which each makes its own to the last one."""
    monkeypatch.setattr(function, "GRAIN", 1)
    law = LAWS["zuko"]
    splines = random_splines(law, rows + 4, 1.0, dtype=torch.float32)
    coupling = problem(MASKS["seven values"], 2, torch.float32, rows)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        found.append(results_of(lambda p, v: fused_spline(p, v, law), splines))
        found[-1] += results_of(lambda p, v: affine_coupling(p, v, coupling[2], bound=2.0), coupling[:2])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@native
def test_gradients_can_be_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "GRAIN", 1)
    parameters, value, changes = problem(MASKS["two values"], 2, torch.float64, 2)
    law = LAWS["nflows, divided"]
    for f, inputs in (
        (lambda p, v: affine_coupling(p, v, changes, bound=2.0), (parameters, value)),
        (lambda p, v: fused_spline(p, v, law), tuple(x[4:] for x in random_splines(law, 5, 1.0))),
    ):
        given = tuple(x.contiguous().requires_grad_() for x in inputs)
        assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.skipif(triton_missing() is not None, reason="needs Triton")
@both_dtypes
@pytest.mark.parametrize("kind", [_AffineCoupling, _Spline])
def test_triton_serves_where_it_agrees_with_pytorch(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is wrong in one direction, or raises, serves neither."""
    agrees = function._triton_agrees.__wrapped__
    assert agrees(kind, KERNEL_DEVICE, dtype)
    back = kind.back
    with monkeypatch.context() as wrong:
        wrong.setattr(kind, "back", lambda self, *given: tuple((1 + self.inverse) * x for x in back(self, *given)))
        assert not agrees(kind, KERNEL_DEVICE, dtype)
    monkeypatch.setattr(kind, "run", lambda *_: 1 / 0)
    assert not agrees(kind, KERNEL_DEVICE, dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # what torch.func.jvp imports
def test_pytorch_serves_what_no_fused_code_can_or_where_it_takes_less() -> None:
    """Half precision, no samples, few values, and functions that torch transforms."""
    rows = function.GRAIN
    parameters, value, changes = problem(MASKS["two values"], 2, torch.float32, rows)
    op = _AffineCoupling(changes, 2.0, False)
    assert function.serving(op, parameters.bfloat16(), value.bfloat16()) == "torch"
    assert function.serving(op, parameters[:0], value[:0]) == "torch"
    assert function.serving(op, parameters[: rows // 2 - 1], value[: rows // 2 - 1]) == "torch"

    def z_of(value: Tensor) -> Tensor:
        return affine_coupling(parameters, value, changes, bound=2.0)[0]

    one = torch.func.vmap(lambda p, v: affine_coupling(p[None], v[None], changes, bound=2.0)[0][0])(parameters, value)
    assert_close(one, z_of(value), SAME_F32 * float(one.abs().max()))
    assert torch.isfinite(torch.func.jvp(z_of, (value,), (value,))[1]).all()


@native
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"changes": torch.ones(3)}, "changes"),
        ({"changes": torch.ones(2, dtype=torch.float64)}, "changes"),
        ({"parameters": torch.zeros(33, 3, 2)}, "parameters"),
        ({"parameters": torch.zeros(32, 2, 2)}, "parameters"),
        ({"bound": 0}, "bound"),
        ({"bound": 100}, "bound"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(
    wrong: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native code would read beyond the end."""
    monkeypatch.setattr(function, "GRAIN", 1)
    parameters, value, changes = problem(MASKS["two values"], 2, torch.float32)
    with pytest.raises(ArgumentError, match=f"^{name}: expected "):
        affine_coupling(**{"parameters": parameters, "value": value, "changes": changes, "bound": 2.0, **wrong})
    with pytest.raises(ArgumentError, match=r"^parameters: expected "):
        fused_spline(torch.zeros(3, 5), torch.zeros(3), LAWS["zuko"])


def counting(counts: dict[str, int], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that does what `real` does and counts its calls."""

    def method(*given: Any) -> Any:
        counts[name] += 1
        return real(*given)

    return method


@native
@pytest.mark.parametrize(
    ("family", "shape", "options", "runs"),
    [
        ("realnvp", (5,), {"couplings": 3}, 3),
        ("realnvp", (1, 8, 8), {"width": 8, "scales": 2}, 6),
        ("glow", (1, 8, 8), {"width": 8, "depth": 1}, 3),
        ("glow", (5,), {"steps": 2}, 2),
        ("spline-coupling", (5,), {"transforms": 2}, 2),
        ("spline-autoregressive", (5,), {"transforms": 2}, 2),
    ],
)
def test_families_train_through_them(
    family: str, shape: tuple[int, ...], options: dict[str, Any], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every coupling and every spline of a step runs fused, forward and back; PyTorch's equations are not called."""
    monkeypatch.setattr(function, "GRAIN", 1)
    counts = {"run": 0, "back": 0}
    for kind in (_AffineCoupling, _Spline):
        monkeypatch.setattr(kind, "plain", lambda *_: pytest.fail("an update was made by PyTorch"))
        for name in counts:
            monkeypatch.setattr(kind, name, counting(counts, name, getattr(kind, name)))
    torch.manual_seed(0)
    model = build(family, data_shape=shape, **options)
    model.loss(torch.randn(4, *shape)).backward()
    assert counts == {"run": runs, "back": runs}
    if family in ("realnvp", "glow"):
        model.eval().sample(2)
        assert counts["run"] == 2 * runs
