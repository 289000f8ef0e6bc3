"""The families of flows as tests see them: a row in `CASES` puts a family under every law of tests/flows/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflow_fast.flows import FamilyFlow, build

Draw = Callable[["FamilyCase", int, torch.Generator], Tensor]


def gaussian(case: FamilyCase, n: int, generator: torch.Generator) -> Tensor:
    """Returns n draws of N(0, I)."""
    return torch.randn(n, *case.shape, generator=generator)


def tokens(case: FamilyCase, n: int, generator: torch.Generator) -> Tensor:
    """Returns n sequences of tokens, each of the vocabulary equally likely."""
    return torch.randint(case.options["vocabulary"], (n, *case.shape), generator=generator)


def on_sphere(case: FamilyCase, n: int, generator: torch.Generator) -> Tensor:
    """Returns n points that are uniform on the unit sphere."""
    return torch.nn.functional.normalize(torch.randn(n, *case.shape, generator=generator), dim=1)


def on_torus(case: FamilyCase, n: int, generator: torch.Generator) -> Tensor:
    """Returns n points that are uniform on the torus, as angles in [0, 2π)."""
    return torch.rand(n, *case.shape, generator=generator) * 2 * torch.pi


@dataclass(frozen=True)
class FamilyCase:
    """A small model of a family.

    name: the family. shape: the shape of one sample. classes: the number of classes. options: the family's options.
    draw: data that the family takes. stir: how far weights are moved from where they begin, as many families begin as
    the identity. points: how many points of a grid the density is integrated on, along a side; a smooth one needs few.
    """

    name: str
    shape: tuple[int, ...]
    classes: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    draw: Draw = gaussian
    stir: float = 0.1
    points: int = 601

    def __str__(self) -> str:
        classes = f"-{self.classes}classes" if self.classes else ""
        return f"{self.name}-{'x'.join(map(str, self.shape))}{classes}"

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> FamilyFlow:
        """Returns the model in evaluation mode."""
        torch.manual_seed(seed)
        model = build(self.name, data_shape=self.shape, num_classes=self.classes, **self.options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += self.stir * torch.randn(parameter.shape, generator=generator)
        return model.to(dtype).eval()

    def data(self, n: int, seed: int = 1) -> Tensor:
        """Returns n samples that the family takes."""
        return self.draw(self, n, torch.Generator().manual_seed(seed))

    def labels(self, n: int) -> Tensor | None:
        """Returns n labels in turn, or None for an unconditional model."""
        return torch.arange(n) % self.classes if self.classes else None


SMALL = {"width": 16, "blocks": 1}  # of the networks of ODEs, whose images have tests of their own, as they take long
STEPS = {"solver": "rk4", "steps": 16}
TOKENS = {"vocabulary": 4, "width": 16, "layers": 1, "heads": 2, "steps": 8, "corrections": 2}

CASES: tuple[FamilyCase, ...] = (
    FamilyCase("nice", (2,), options={"couplings": 4, "hidden": (16,)}),
    FamilyCase("nice", (1, 4, 6), classes=3, options={"couplings": 3, "hidden": (16,)}),
    FamilyCase("realnvp", (2,), options={"couplings": 4, "hidden": (16,)}),
    FamilyCase("realnvp", (5,), classes=2, options={"couplings": 4, "hidden": (16,)}),
    FamilyCase("realnvp", (1, 8, 4), classes=2, options={"width": 8}, stir=0.03),
    FamilyCase("glow", (2,), options={"steps": 3, "hidden": (16,)}),
    FamilyCase("glow", (5,), classes=2, options={"steps": 2, "hidden": (16,)}),
    FamilyCase("glow", (1, 8, 12), classes=2, options={"depth": 2, "width": 8}, stir=0.02),
    FamilyCase("maf", (2,), options={"transforms": 3, "hidden": (16,)}),
    FamilyCase("maf", (1, 3, 4), classes=2, options={"transforms": 2, "hidden": (16,)}),
    FamilyCase("iaf", (2,), options={"transforms": 2, "hidden": (16,)}),
    FamilyCase("iaf", (4,), classes=2, options={"transforms": 2, "hidden": (16,)}),
    FamilyCase("spline-coupling", (2,), options={"transforms": 3, "hidden": (16,)}),
    FamilyCase("spline-coupling", (1, 3, 4), classes=2, options={"transforms": 2, "hidden": (16,)}),
    FamilyCase("spline-autoregressive", (2,), options={"transforms": 2, "hidden": (16,)}),
    FamilyCase("spline-autoregressive", (4,), classes=2, options={"transforms": 2, "hidden": (16,)}),
    FamilyCase("residual", (2,), options={"blocks": 3, "hidden": (16,)}),
    FamilyCase("residual", (5,), classes=2, options={"blocks": 3, "hidden": (16, 16)}),
    FamilyCase("residual", (1, 4, 8), classes=2, options={"blocks": 2, "hidden": (8, 8)}),
    FamilyCase("cnf", (2,), options={**SMALL, "tolerance": 1e-7}, points=121),
    FamilyCase("cnf", (3,), classes=2, options={**SMALL, **STEPS}),
    FamilyCase("flow-matching", (2,), options={**SMALL, **STEPS, "coupling": "optimal"}, points=121),
    FamilyCase("rectified", (2,), options={**SMALL, **STEPS, "pairs": 16}, points=121),
    FamilyCase("rectified", (3,), classes=2, options={**SMALL, **STEPS, "pairs": 16}),
    FamilyCase("discrete", (5,), classes=2, options=TOKENS, draw=tokens),
    FamilyCase("discrete", (3,), options={**TOKENS, "source": "uniform"}, draw=tokens),
    FamilyCase("riemannian", (3,), classes=2, options={**SMALL, **STEPS, "manifold": "sphere"}, draw=on_sphere),
    FamilyCase("riemannian", (2,), options={**SMALL, **STEPS, "manifold": "torus"}, draw=on_torus),
)
