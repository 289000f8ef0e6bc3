"""A picture of a model shows its density beside its samples, each at the place where data are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import picture
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import FamilyFlow, build, draw_picture
from tarflow_fast.flows.pictures import GAP, SIDE, ZOOM, _chart

PANEL = SIDE * ZOOM


class Spot(FamilyFlow):
    """A narrow Gaussian around a place, of whatever kind."""

    def __init__(self, place: Tensor, kind: str):
        super().__init__(tuple(place.shape))
        self.spot = torch.nn.Parameter(place)
        self.metadata = {"kind": kind}

    def log_prob(self, x: Tensor, y: object = None, *, generator: object = None) -> Tensor:
        return -0.5 * ((x - self.spot) / 0.1).square().sum(1)

    @torch.no_grad()
    def sample(self, n: int, y: object = None, *, generator: torch.Generator | None = None) -> Tensor:
        x = self.spot + 0.1 * torch.randn(n, *self.data_shape, generator=generator)
        if self.metadata["kind"] == "sphere":
            x = torch.nn.functional.normalize(x, dim=1)
        return x


def centre(panel: np.ndarray) -> tuple[float, float]:
    """Returns where the light of a panel is, as shares of its height and width."""
    light = panel.astype(float).sum(-1)
    light = np.where(light > 0.5 * light.max(), light, 0)
    rows, columns = (np.arange(PANEL) + 0.5) / PANEL, (np.arange(PANEL) + 0.5) / PANEL
    return float((light.sum(1) * rows).sum() / light.sum()), float((light.sum(0) * columns).sum() / light.sum())


@pytest.mark.parametrize(
    ("kind", "place", "where"),
    [
        ("torus", [math.pi / 2, math.pi], (0.5, 0.25)),
        ("torus", [math.pi, 1.5 * math.pi], (0.25, 0.5)),
        ("sphere", [1.0, 0.0, 0.0], (0.5, 0.5)),
        ("sphere", [0.0, 1.0, 0.0], (0.5, 0.75)),
        ("sphere", [0.0, 0.0, 1.0], (0.25, 0.5)),
    ],
)
def test_density_and_samples_are_where_the_data_are(
    kind: str, place: list[float], where: tuple[float, float], tmp_path: Path
) -> None:
    draw_picture(Spot(torch.tensor(place), kind), tmp_path / "p.png")
    found = picture(tmp_path / "p.png")
    assert found.shape == (PANEL, 2 * PANEL + GAP, 3)
    for panel in (found[:, :PANEL], found[:, PANEL + GAP :]):
        assert centre(panel) == pytest.approx(where, abs=0.03)


def test_the_plane_is_shown_with_its_second_axis_up(tmp_path: Path) -> None:
    draw_picture(Spot(torch.tensor([2.0, 1.0]), "vectors"), tmp_path / "p.png")
    found = picture(tmp_path / "p.png")
    for panel in (found[:, :PANEL], found[:, PANEL + GAP :]):
        row, column = centre(panel)
        assert row < 0.4
        assert column > 0.7


def test_the_sphere_keeps_its_areas() -> None:
    """Uniform points are uniform in the ellipse, and points of the grid go back to their places."""
    inside, points, projection = _chart("sphere", torch.zeros(1, 3))
    back = projection(points)
    side = (torch.arange(SIDE) + 0.5) / SIDE
    v, u = torch.meshgrid(side.flip(0), side, indexing="ij")
    wanted = torch.stack([u, v], -1).reshape(-1, 2)[torch.from_numpy(inside)]
    assert float((back - wanted).abs().max()) < 1e-3
    assert inside.mean() == pytest.approx(math.pi / 8, rel=0.01)
    uniform = torch.nn.functional.normalize(torch.randn(50_000, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    u = projection(uniform)
    middle = ((u - 0.5).abs() * torch.tensor([1.0, 2.0]) < 0.2).all(1).float().mean()  # 0.4 × 0.2 of an ellipse of π/8
    assert float(middle) == pytest.approx(0.08 / (math.pi / 8), rel=0.05)


def test_images_make_a_grid_and_other_data_none(tmp_path: Path) -> None:
    draw_picture(build("nice", data_shape=(1, 4, 4), num_classes=3, couplings=1), tmp_path / "p.png", rows=2)
    height, width = picture(tmp_path / "p.png").shape[:2]
    assert width > height
    for shape in ((3,), (2, 4, 4)):
        with pytest.raises(
            ArgumentError, match=r"^model: expected 2-D vectors, points on sphere or torus, or pictures"
        ):
            draw_picture(build("nice", data_shape=shape, couplings=1), tmp_path / "q.png")
    with pytest.raises(ArgumentError, match=r"^path: "):
        draw_picture(build("nice", data_shape=(2,), couplings=1), tmp_path / "q.gif")
