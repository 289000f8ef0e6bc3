"""The examples as a user runs them: each in a process of its own, judged by what it prints and writes."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import tarflow_fast as tff

FOLDER = Path(__file__).parents[1] / "examples"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`python examples/(\S+?\.py)([^`]*)`", README)
SHARED = {"pictures.py", "README.md"}
PRINTING = {"zuko_flow.py": "zuko", "sbi_posterior.py": "sbi"}  # what draws nothing, and the library that it needs
SIDE = 28  # of the shipped model's images
SAME = 1e-3  # what images may differ by where passes are parallel, at the default tol

# ml-tarflow's `Model` as far as the example uses it: SPOIL is what it does to the images of the plain equations.
STAND_IN = """
import torch
import tarflow_fast
from tarflow_fast import reference

class Model(torch.nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        inner = tarflow_fast.TarFlow(**sizes)
        self.blocks, self.patch_size = inner.blocks, inner.patch_size
        self.register_buffer("var", inner.var)

    def reverse(self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False):
        options = dict(guidance=guidance, guide_what=guide_what, attn_temp=attn_temp)
        tokens = reference.inverse(self.state_dict(), x, y, annealed_guidance=annealed_guidance, **options).x
        return reference.unpatchify(tokens, self.patch_size) + SPOIL
"""


def run(name: str, *arguments: object, status: int = 0, folder: Path = FOLDER) -> str:
    """What the example prints, on both streams, when it is run from the folder above its own."""
    done = subprocess.run(
        [sys.executable, str(folder / name), *map(str, arguments)],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # several threads that wait for each other cost a busy machine more
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def number(pattern: str, text: str) -> float:
    """The one number that stands after the pattern in the text."""
    (found,) = re.findall(pattern + r" ?(-?\d[\d.e+-]*)", text)
    return float(found)


def read(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.float64)


def cells(path: Path, rows: int, columns: int, side: int = SIDE) -> NDArray[Any]:
    """The images of a grid, (rows, columns, side, side[, 3]), of which none is blank."""
    pixels = read(path)
    assert pixels.shape[:2] == (rows * side, columns * side)
    images = pixels.reshape(rows, side, columns, side, *pixels.shape[2:]).swapaxes(1, 2)
    assert (images.std((2, 3)) > 1).all()
    return images


def test_every_example_is_in_the_readme_and_in_a_test() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.is_file()}
    examples = files - SHARED
    assert len(examples) >= 6
    assert {name for name, _ in COMMANDS} == examples
    assert set(re.findall(r"\[(\S+)\]\(\1\)", README)) == files - {"README.md"}
    tested = re.findall(r'\brun\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(tested) == examples


def test_examples_import_what_is_public() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        ours = re.findall(r"^(?:from|import) tarflow_fast.*", text, re.MULTILINE)
        plain = ["from tarflow_fast import reference"] if path.name == "drop_in.py" else []
        assert ours == ([] if path.name in SHARED else ["import tarflow_fast as tff", *plain]), path.name
        for name in re.findall(r"\btff\.(\w+)", text):
            assert name in tff.__all__, f"{path.name}: tff.{name}"


@pytest.mark.slow
def test_drop_in(tmp_path: Path) -> None:
    text = run("drop_in.py", "-n", 2, "--out", tmp_path)
    assert "plain equations: " in text
    assert number("accelerated:", text) > 0
    assert number("largest difference:", text) < SAME
    slow, fast = cells(tmp_path / "images.png", 2, 2)
    assert abs(slow - fast).max() <= 1  # of 255, where rounding falls differently
    assert abs(slow[0] - slow[1]).max() > 100


@pytest.mark.slow
def test_zuko_flow() -> None:
    pytest.importorskip("zuko")
    text = run("zuko_flow.py", "--kind", "MAF", "--features", 8, "-n", 50, "--steps", 2)
    assert number("largest difference:", text) < SAME
    assert number("is", text) < SAME
    assert number("above 1e-3 in", text) == 0


@pytest.mark.slow
def test_sbi_posterior() -> None:
    pytest.importorskip("sbi", reason="sbi is not installed; it is in the extra `flows`")
    text = run("sbi_posterior.py", "--features", 2, "-n", 50, "--epochs", 2)
    for what in ("one x", "five x"):
        assert number(f"{what}, largest difference:", text) < 1e-4


@pytest.mark.slow
def test_drop_in_for_a_model_of_ml_tarflow(tmp_path: Path) -> None:
    module = tmp_path / "transformer_flow.py"
    module.write_text(STAND_IN.replace("SPOIL", "0"), encoding="utf-8")
    text = run("drop_in.py", "--ml-tarflow", tmp_path, "-n", 2, "--out", tmp_path)
    assert "ml-tarflow: " in text
    assert number("largest difference:", text) < SAME


@pytest.mark.slow
def test_drop_in_tells_when_images_differ(tmp_path: Path) -> None:
    module = tmp_path / "transformer_flow.py"
    module.write_text(STAND_IN.replace("SPOIL", "0.01"), encoding="utf-8")
    text = run("drop_in.py", "--ml-tarflow", tmp_path, "-n", 1, "--out", tmp_path, status=1)
    assert number("largest difference:", text) == pytest.approx(0.01, abs=SAME)
    assert text.endswith("the images are not the same\n")
    module.unlink()
    text = run("drop_in.py", "--ml-tarflow", tmp_path, status=2)
    assert text.endswith(f"error: --ml-tarflow: {tmp_path} holds no transformer_flow.py\n")


@pytest.mark.slow
def test_seeds_and_labels(tmp_path: Path) -> None:
    text = run("seeds_and_labels.py", "--seed", 4, "--out", tmp_path)
    for same in ("instead of at once", "from image 21 on", "image 9 drawn alone"):
        assert number(f"{same}: largest difference", text) < SAME
    for other in ("under label 9 instead of 0", "of seed 5"):
        assert number(f"{other}: largest difference", text) > 0.5
    classes, one_class, other_seed = (
        cells(tmp_path / f"{name}.png", 4, 10) for name in re.findall(r"(\w+)\.png", text)
    )
    distance = abs(classes - one_class).max((2, 3))
    assert (distance[:, 9] <= 1).all()  # images whose label is the last class's in both
    assert (distance[:, :9] > 100).all()
    assert (abs(classes - other_seed).max((2, 3)) > 50).all()


@pytest.mark.slow
def test_denoise_and_guide(tmp_path: Path) -> None:
    text = run("denoise_and_guide.py", "-n", 10, "--out", tmp_path)
    assert number("of the raw row: largest difference", text) < SAME
    assert len(re.findall(r" s to sample", text)) == 5
    rows = cells(tmp_path / "rows.png", 5, 10)
    # Neighbouring pixels differ by the noise, and by what the images show.
    rough = abs(np.diff(rows, axis=3)).mean((1, 2, 3))
    assert rough[1] < 0.95 * rough[0]
    for upper, lower in itertools.pairwise(rows[1:]):
        assert abs(upper - lower).mean() > 1  # more guidance makes other images
    assert abs(rows[0] - rows[1]).mean() < abs(rows[1] - rows[2]).mean()


@pytest.mark.slow
def test_solver_plan(tmp_path: Path) -> None:
    text = run("solver_plan.py", "-n", 10, "--learn-from", 32, "--out", tmp_path)
    model = tff.load_pretrained()
    plan = tff.SolverPlan.load(tmp_path / "plan.safetensors")
    tff.Sampler(model, plan=plan)  # which refuses a plan of another model
    assert plan.passes.isfinite().all()
    ways = dict(re.findall(r"^(.*?) +\d+ \+ .* = (\d+) passes", text, re.MULTILINE))
    assert list(ways) == ["sequential", "adaptive", "adaptive, plan", "auto, plan"]
    assert int(ways["sequential"]) == 4 * 48
    assert max(int(ways["adaptive"]), int(ways["adaptive, plan"])) < 2 * 48
    differences = [float(value) for value in re.findall(r"difference (\S+)", text)]
    assert differences[0] == 0 < max(differences) < SAME
    pixels = read(tmp_path / "samples.png")
    assert pixels.shape == (2 * SIDE, 8 * SIDE)
    assert (pixels[SIDE:, 2 * SIDE :] == 255).all()  # ten images in rows of eight
    assert pixels[SIDE:, : 2 * SIDE].std() > 1


@pytest.mark.slow
def test_classify(tmp_path: Path) -> None:
    text = run("classify.py", "-n", 12, "--out", tmp_path)
    assert number("largest difference", text) < 0.05  # nats, of some hundreds
    assert 5.5 < number("bits/dim: mean", text) < 7
    right, whole = map(int, re.findall(r"^(\d+) of (\d+) images are given the class", text, re.MULTILINE)[0])
    assert whole == 12
    assert right >= 10
    assert len(re.findall(r"is taken for", text)) == whole - right
    assert read(tmp_path / "images.png").shape == (2 * SIDE, 10 * SIDE)


@pytest.mark.slow
def test_train_on_folder_of_ones_own(tmp_path: Path) -> None:
    """Coloured stripes along and across, larger than is asked for, with noise: 16 of each in `train`, 3 in `test`."""
    rng = np.random.default_rng(0)
    for half, n in (("train", 16), ("test", 3)):
        for name in ("along", "across"):
            (tmp_path / half / name).mkdir(parents=True)
            for i in range(n):
                stripes = np.arange(24)[:, None, None] // 4 % 2 * np.array([160, 80, 40])
                pixels = rng.integers(0, 60, (24, 24, 3)) + (stripes if name == "along" else stripes.swapaxes(0, 1))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / half / name / f"{i}.png")
    text = run("train_on_folder.py", "--data", tmp_path, "--size", 12, "--epochs", 12, "--out", tmp_path / "runs")
    assert_trained(text, tmp_path / "runs", [12, 24], ["across", "along"], 3, 12)


@pytest.mark.slow
def test_train_on_folder_made_by_itself(tmp_path: Path) -> None:
    text = run("train_on_folder.py", "--epochs", 4, "--out", tmp_path)
    assert_trained(text, tmp_path, [32, 64], ["Bag", "Dress", "Sneaker", "Trouser"], 1, 16)
    pictures = [read(path) for path in tmp_path.glob("*/pictures/*/*/*.png")]
    assert len(pictures) == 240
    assert {picture.shape for picture in pictures} == {(SIDE, SIDE)}
    assert np.mean([picture.std() for picture in pictures]) > 30


def assert_trained(text: str, out: Path, steps: list[int], names: list[str], channels: int, side: int) -> None:
    """A run of so many steps and then of so many in all, that learnt something, and its files."""
    (folder,) = out.iterdir()
    found = re.findall(r"^(\d+) steps: (\S+) bits/dim", text, re.MULTILINE)
    assert [int(step) for step, _ in found] == steps
    before, after = (float(bits) for _, bits in found)
    assert after < before < 9
    model = tff.load(folder / "model.safetensors")
    assert model.metadata["class_names"] == names
    assert model.metadata["steps"] == steps[-1]
    assert model.config.data_shape == (channels, side, side)
    first, last = (cells(folder / name, 5, len(names), side) for name in ("samples.png", "samples_later.png"))
    assert first.ndim == (4 if channels == 1 else 5)
    assert abs(first - last).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_commands_of_the_readme(name: str, options: str, tmp_path: Path) -> None:
    if name in PRINTING:
        pytest.importorskip(PRINTING[name])
    shutil.copytree(FOLDER, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    run(name, *shlex.split(options), folder=tmp_path / "examples")
    if name in PRINTING:
        assert {path.name for path in tmp_path.iterdir()} == {"examples"}
        return
    written = list((tmp_path / "runs" / Path(name).stem).rglob("*.png"))
    assert written
    assert {path.name for path in tmp_path.iterdir()} == {"examples", "runs"}
