"""Families that are zuko's: which way serves when, and what of the weights it serves with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor, nn

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import FamilyFlow, build, library

NAMES = ("maf", "iaf", "spline-coupling", "spline-autoregressive")
every_family = pytest.mark.parametrize("name", NAMES)


def model_of(name: str, dims: int = 5, dtype: torch.dtype = torch.float64, **more: Any) -> FamilyFlow:
    torch.manual_seed(0)
    return build(name, data_shape=(dims,), **{"transforms": 2, "hidden": (16,), **more}).to(dtype)


def data(dims: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, dims, generator=torch.Generator().manual_seed(1), dtype=dtype)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Returns a list to which every flow is added that is accelerated."""
    made: list[nn.Module] = []
    accelerate = library.accelerate
    monkeypatch.setattr(library, "accelerate", lambda flow, **how: made.append(flow) or accelerate(flow, **how))
    return made


@every_family
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_engine_computes_what_the_library_does(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, values, made = model_of(name, num_classes=2), data(), counted(monkeypatch)
    y = torch.tensor([0, 1, -1, 0, 1, -1])
    wanted = getattr(model, direction)(values, y)
    assert wanted[0].requires_grad
    assert made == []
    with torch.no_grad():
        got = getattr(model, direction)(values, y)
    assert len(made) == 1
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, SAME_F64 if "spline" not in name else SAME_F32)  # zuko's splines cancel


@every_family
def test_a_snapshot_lasts_until_weights_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made = model_of(name), data(), counted(monkeypatch)

    @torch.no_grad()
    def density() -> Tensor:
        return model.log_prob(x)

    first = density()
    assert torch.equal(density(), first)
    model.sample(3)
    assert len(made) == 1
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.loss(x).backward()
    optimizer.step()
    stepped = density()
    assert len(made) == 2
    assert_close(stepped, model.log_prob(x), SAME_F32)
    assert not torch.equal(stepped, first)
    model.load_state_dict(model_of(name).state_dict())
    assert torch.equal(density(), first)
    model.float()
    with torch.no_grad():
        assert model.log_prob(x.float()).dtype == torch.float32


@every_family
def test_a_copy_has_its_own_snapshot(name: str) -> None:
    model, x = model_of(name), data()
    with torch.no_grad():
        first = model.log_prob(x)
        other = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter += 0.1
        assert torch.equal(other.log_prob(x), first)
        assert not torch.equal(model.log_prob(x), first)


@every_family
def test_frozen_weights_need_no_record(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made = model_of(name).requires_grad_(False), data(), counted(monkeypatch)
    model.log_prob(x)
    assert len(made) == 1
    (gradient,) = torch.autograd.grad(model.log_prob(x.requires_grad_()).sum(), x)
    assert torch.isfinite(gradient).all()
    assert len(made) == 1


@every_family
def test_one_value_needs_no_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made = model_of(name, 1, transforms=1), data(1), counted(monkeypatch)
    with torch.no_grad():
        z, log_det = model(x)
        back, _ = model.inverse(z)
    assert made == []
    assert log_det.shape == (6,)
    assert_close(back, x, SAME_F64)


@every_family
@pytest.mark.parametrize("wrong", [{"transforms": 0}, {"hidden": ()}, {"hidden": (0,)}], ids=str)
def test_sizes_that_make_no_flow_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{next(iter(wrong))}: expected "):
        build(name, data_shape=(2,), **wrong)


def jacobian(model: FamilyFlow, x: Tensor) -> Tensor:
    """Returns dz/dx of one sample, (D, D)."""
    found = torch.autograd.functional.jacobian(lambda x: model(x[None])[0][0], x)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", ["maf", "iaf", "spline-autoregressive"])
def test_one_transform_is_triangular(name: str) -> None:
    model = model_of(name, transforms=1)
    found = jacobian(model, data()[0])
    assert (found.triu(1) == 0).all()
    assert (found.diagonal() > 0).all()
    assert (found[torch.ones_like(found).tril(-1) > 0] != 0).all()


@pytest.mark.parametrize("name", ["maf", "iaf", "spline-autoregressive"])
def test_two_transforms_mix_all_values(name: str) -> None:
    assert (jacobian(model_of(name), data()[0]) != 0).all()


def test_a_coupling_passes_every_other_value() -> None:
    found = jacobian(model_of("spline-coupling", transforms=1), data()[0])
    passing = [i for i in range(5) if torch.equal(found[i], torch.eye(5, dtype=found.dtype)[i])]
    assert len(passing) in (2, 3)
    other = [i for i in range(5) if i not in passing]
    assert (found[other][:, other].diagonal() > 0).all()
    assert found[other][:, passing].abs().min() > 0


@pytest.mark.parametrize("name", ["spline-coupling", "spline-autoregressive"])
def test_splines_are_the_identity_beyond_five(name: str) -> None:
    model, far = model_of(name), 5 + data().abs()
    with torch.no_grad():
        z, log_det = model(far)
    assert torch.equal(z, far)
    assert (log_det == 0).all()
    with pytest.raises(ArgumentError, match=r"^bins: "):
        build(name, data_shape=(2,), bins=1)


@pytest.mark.parametrize(("name", "quick"), [("maf", "forward"), ("iaf", "inverse")])
def test_one_direction_is_a_single_pass(name: str, quick: str) -> None:
    model = model_of(name, transforms=1)
    calls: list[Any] = []
    hyper = next(module for key, module in model.named_modules() if key.endswith("hyper"))
    hyper.register_forward_hook(lambda *given: calls.append(given))
    counts = {}
    for direction in ("forward", "inverse"):
        calls.clear()
        getattr(model, direction)(data())
        counts[direction] = len(calls)
    slow = ({"forward", "inverse"} - {quick}).pop()
    assert counts[quick] == 1
    assert counts[slow] >= 5
