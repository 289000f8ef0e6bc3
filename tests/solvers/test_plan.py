"""What is learnt of a model: plans save passes, change nothing else, and are refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import random_latents, random_model
from safetensors.torch import save_file
from solved import louder, plan_of, solved
from tolerances import GOLDEN, assert_close

from tarflow_fast import CheckpointError, Sampler, SolverPlan, load_pretrained
from tarflow_fast.backend import make_engines
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import ArgumentError


def test_a_plan_is_the_affine_map_that_fits_best() -> None:
    z = torch.randn(500, 3, 2, dtype=torch.float64)
    slope, shift = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 3.0])
    plan = SolverPlan.fit([(z, slope * z + shift), (z, z)])
    assert_close(plan.slope[0], slope.expand(3, 2), GOLDEN)
    assert_close(plan.shift[0], shift.expand(3, 2), GOLDEN)
    assert_close(plan.guess(1, z), z, GOLDEN)


@pytest.mark.slow
def test_a_learnt_plan_saves_passes_and_changes_nothing_else(tmp_path: Path) -> None:
    model = load_pretrained()
    labels = [*range(10), -1]
    plan = Sampler(model).learn_plan(200, labels, seed=1)
    plan.save(tmp_path / "plan.safetensors")
    again = SolverPlan.load(tmp_path / "plan.safetensors")
    for name, tensor in vars(plan).items():
        assert torch.equal(getattr(again, name), tensor), name
    without, with_plan = (Sampler(model, solver="adaptive", tol=1e-3, plan=p).sample(16, labels) for p in (None, again))
    exact = Sampler(model, solver="sequential").sample(16, labels)
    assert_close(with_plan.images, exact.images, 2e-2)
    before, after = ([block.passes for block in out.report.blocks] for out in (without, with_plan))
    assert sum(after) < sum(before)
    assert sum(block.evaluations for block in with_plan.report.blocks) < sum(
        block.evaluations for block in without.report.blocks
    )
    assert sorted(after)[2] <= 10  # of the three easy blocks


@pytest.mark.parametrize("k", [0, 1])
def test_a_guess_is_in_the_order_of_its_block(k: int) -> None:
    """A plan learnt on a model whose blocks are nearly affine guesses them nearly right, flipped ones too."""
    model = louder(random_model(3, num_blocks=2, img_size=6), 0.05)
    sampler = Sampler(model, backend="torch")
    plan = sampler.learn_plan(64)
    engine = make_engines("torch", [model.block_weights(k)], Request(torch.device("cpu")))[0]
    z = random_latents(model, 4)
    wanted = solved(engine, z)
    off = (plan.guess(k, z) - wanted.x).abs().mean()
    assert off < 0.3 * (z - wanted.x).abs().mean()
    assert off < 0.5 * (plan.guess(k, z.flip(1)).flip(1) - wanted.x).abs().mean()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("fast", "plan: expected a SolverPlan, got str"),
        (plan_of(slope=torch.zeros(2, 16, 3)), r"\(blocks, tokens, values\) = \(2, 16, 4\), got"),
        (plan_of(shift=torch.full((2, 16, 4), torch.nan)), "finite guesses, got infinities or NaNs"),
        (plan_of(passes=torch.ones(2, 5)), r"passes and evaluations of \(blocks, windows\) = \(2, 4\), got \(2, 5\)"),
        (plan_of(evaluations=torch.zeros(2, 4)), "positive numbers of passes and evaluations, got 0"),
    ],
    ids=["type", "shape", "finite", "windows", "positive"],
)
def test_a_plan_that_does_not_fit_is_refused(plan: SolverPlan, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sampler(random_model(), solver="adaptive", plan=plan)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    with pytest.raises(CheckpointError, match="not a solver plan"):
        SolverPlan.load(path)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a solver plan"):
        SolverPlan.load(path)
    names = ("slope", "shift", "passes", "evaluations")
    for tensors in (
        {},
        {"slope": torch.zeros(1), "shift": torch.zeros(1)},
        {name: torch.zeros(1) for name in names},
        {name: torch.zeros(1, 4, 2).double() for name in names},
        {"x": torch.zeros(1), **{name: torch.zeros(1) for name in names}},
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match="not a solver plan") as caught:
            SolverPlan.load(path)
        assert str(caught.value).isprintable()
    for other in (None, 3, b"x"):
        with pytest.raises(ArgumentError, match="path: expected a path"):
            SolverPlan.load(other)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such file"):
        SolverPlan.load(tmp_path)
    save_file({"slope": torch.zeros(1), "shift": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a solver plan"):
        SolverPlan.load(path)
    with pytest.raises(ArgumentError, match=r"path: expected a file name ending in \.safetensors"):
        plan_of().save(tmp_path / "plan.pt")
