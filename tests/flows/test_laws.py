"""Every family of flows obeys the same laws, which the rows of `family_cases.CASES` put it under."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from family_cases import CASES, FamilyCase, on_sphere
from tolerances import BATCH, FAMILY_INTEGRAL, FAMILY_INVERSE, FAMILY_LOG_DET, STANDARD_ERRORS, assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import FAMILIES, FamilyFlow, load, save

EXTENT = 12.0  # 2-D densities are integrated over [-12, 12]²
SAMPLES = 20_000
MOST_LINES = 250

invertible = [case for case in CASES if FAMILIES[case.name].load().has_inverse]
flat = [case for case in CASES if case.shape == (2,) and "vectors" in FAMILIES[case.name].kinds]
# In the space around the sphere a map of it has no Jacobian; test_riemannian.py takes it between tangent spaces.
of_full_rank = [case for case in invertible if case.draw is not on_sphere]
conditional = [case for case in CASES if case.classes]
MANY_EVALUATIONS = ("cnf", "flow-matching", "rectified", "residual")  # a density of these takes long
everything = pytest.mark.parametrize("case", CASES, ids=str)


def quick_first(cases: list[FamilyCase], slow: tuple[str, ...] = MANY_EVALUATIONS) -> pytest.MarkDecorator:
    """Returns a parameter `case` of these cases, of which those of the families named are slow."""
    marked = [pytest.param(case, marks=[pytest.mark.slow] if case.name in slow else []) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=str)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_prob(model: FamilyFlow, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Returns log p(x | y) without a gradient, with the same random numbers at every call."""
    with torch.no_grad():
        return model.log_prob(x, y, generator=seeded(7))


def grid_density(case: FamilyCase) -> tuple[Tensor, Tensor, float]:
    """Returns points of the plane (n, 2), the density there (n,), and the area of a cell."""
    side = torch.linspace(-EXTENT, EXTENT, case.points, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    model = case.model(dtype=torch.float64)
    density = torch.cat([log_prob(model, part) for part in points.split(60_000)]).exp()
    return points, density, float((side[1] - side[0]) ** 2)


def test_every_family_has_a_case() -> None:
    assert {case.name for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_one_short_file(name: str) -> None:
    assert len(Path(inspect.getfile(FAMILIES[name].load())).read_text().splitlines()) <= MOST_LINES


@quick_first(flat)
def test_the_density_of_the_plane_integrates_to_one(case: FamilyCase) -> None:
    _, density, cell = grid_density(case)
    assert abs(float(density.sum()) * cell - 1) < FAMILY_INTEGRAL


@quick_first(flat)
def test_samples_have_the_moments_of_the_density(case: FamilyCase) -> None:
    points, density, cell = grid_density(case)
    x = case.model().sample(SAMPLES, generator=seeded(3)).double()
    for moment in (lambda p: p[:, 0], lambda p: p[:, 1], lambda p: p[:, 0] * p[:, 1], lambda p: p.square().sum(1)):
        wanted = float((moment(points) * density).sum()) * cell
        values = moment(x)
        error = float(values.std()) / math.sqrt(SAMPLES)
        assert abs(float(values.mean()) - wanted) < STANDARD_ERRORS * error


@quick_first(of_full_rank, ("cnf", "rectified"))
def test_the_log_det_is_that_of_the_jacobian(case: FamilyCase) -> None:
    model, y = case.model(dtype=torch.float64), case.labels(1)
    for x in case.data(3).double().split(1):
        _, log_det = model(x, y)
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x, y)[0].flatten(), x)
        assert isinstance(jacobian, Tensor)
        wanted = torch.linalg.slogdet(jacobian.flatten(1))[1]
        assert_close(log_det[0], wanted, FAMILY_LOG_DET)


@pytest.mark.parametrize("case", invertible, ids=str)
def test_the_inverse_undoes_forward(case: FamilyCase) -> None:
    model, x, y = case.model(), case.data(16), case.labels(16)
    with torch.no_grad():
        z, log_det = model(x, y)
        back, inverse_log_det = model.inverse(z, y)
    assert_close(back, x, FAMILY_INVERSE)
    assert_close(inverse_log_det, -log_det, FAMILY_INVERSE * model.dims)


@everything
def test_a_sample_does_not_depend_on_its_batch_mates(case: FamilyCase) -> None:
    model, x, y = case.model(), case.data(4), case.labels(4)
    if not model.exact:
        pytest.skip("an estimate draws other random numbers in another batch")
    alone = torch.cat([log_prob(model, x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(4)])
    assert_close(log_prob(model, x, y), alone, BATCH)


@everything
def test_a_seed_tells_the_samples(case: FamilyCase) -> None:
    model, y = case.model(), case.labels(5)
    first, again, other = (model.sample(5, y, generator=seeded(seed)) for seed in (1, 1, 2))
    assert first.shape == (5, *case.shape)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad


@everything
def test_samples_are_data(case: FamilyCase) -> None:
    model, y = case.model(), case.labels(5)
    assert torch.isfinite(log_prob(model, model.sample(5, y, generator=seeded(1)), y)).all()


@everything
def test_a_file_holds_the_whole_model(case: FamilyCase, tmp_path: Path) -> None:
    model, x, y = case.model(), case.data(4), case.labels(4)
    model.metadata = {"class_names": ["a", "b"]}
    save(model, tmp_path / "model.safetensors")
    found = load(tmp_path / "model.safetensors")
    assert type(found) is type(model)
    assert (found.options, found.metadata, found.name) == (model.options, model.metadata, case.name)
    assert torch.equal(log_prob(found, x, y), log_prob(model, x, y))


@everything
def test_the_loss_moves_every_parameter(case: FamilyCase) -> None:
    model = case.model().train()
    loss = model.loss(case.data(8), case.labels(8), generator=seeded(1))
    loss.backward()
    assert loss.shape == ()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("case", conditional, ids=str)
def test_a_label_changes_the_density(case: FamilyCase) -> None:
    model, x = case.model(), case.data(4)
    found = [log_prob(model, x, torch.full((4,), label)) for label in (0, 1, -1)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[2], log_prob(model, x))


@everything
def test_labels_out_of_range_are_refused(case: FamilyCase) -> None:
    model = case.model()
    for call in (model.log_prob, model.loss):
        with pytest.raises(ArgumentError, match=r"^y: expected .*, got 9$"):
            call(case.data(2), torch.tensor([0, 9]))
    with pytest.raises(ArgumentError, match=r"^y: "):
        model.sample(2, 9)


@everything
def test_data_of_another_shape_are_refused(case: FamilyCase) -> None:
    model, x = case.model(), case.data(2)
    for call in (model.log_prob, model.loss):
        with pytest.raises(ArgumentError, match=r"^x: "):
            call(x[..., :-1])
        with pytest.raises(ArgumentError, match=r"^x: "):
            call(x[:0])
    if x.is_floating_point():
        with pytest.raises(ArgumentError, match=r"^x: expected finite values"):
            model.log_prob(torch.full_like(x, math.nan))
