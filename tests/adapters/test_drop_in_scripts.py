"""ml-tarflow's scripts and notebooks, and GS-Jacobi's, give the same numbers with their `Model` exchanged for ours.

They are run from checkouts that the environment names: ML_TARFLOW (github.com/apple/ml-tarflow) and GS_JACOBI
(github.com/encoreus/GS-Jacobi_for_TarFlow).
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model, seeded_weights
from scripts_of_others import Images, exchanged, modules, source
from tolerances import assert_close
from torch import Tensor, nn

import tarflow_fast

pytestmark = pytest.mark.slow
IMAGES, BITS = 2e-4, 1e-4  # largest differences, of fp32 images and of bits/dim


def checkout(variable: str, file: str) -> Path:
    folder = os.environ.get(variable)
    if folder is None or not (Path(folder) / file).is_file():
        pytest.skip(f"no checkout: set {variable} to a folder that holds {file}")
    return Path(folder).resolve() / file


class Run:
    """What a script did: its models, the images that it saved or evaluated, its text, and its names."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.images: list[Tensor] = []
        self.text = ""
        self.names: dict[str, Any] = {"__name__": "__main__"}


@dataclass(frozen=True)
class Script:
    """path: in a checkout; home: the module that has its `Model`; changes: of its text; arguments: of the command."""

    path: Path
    home: str
    data: Images
    changes: Mapping[str, str]
    arguments: Sequence[str] = ()

    def run(self, folder: Path, capsys: pytest.CaptureFixture[str], ours: bool) -> Run:
        """With its own `Model`, or with ours, which get the same weights."""
        done = Run()
        with exchanged(self.path.parent, modules(done.images, self.data), folder):
            module: Any = importlib.import_module(self.home)
            make = tarflow_fast.TarFlow if ours else module.Model

            def model(*given: Any, **named: Any) -> nn.Module:
                made: nn.Module = make(*given, **named)
                made.load_state_dict(seeded_weights({n: v.shape for n, v in made.state_dict().items()}, 3))
                torch.manual_seed(0)  # making a model draws as many numbers as it likes
                done.models.append(made)
                return made

            module.Model = model
            sys.argv = [self.path.name, *self.arguments]
            torch.manual_seed(0)
            exec(compile(source(self.path, self.changes), str(self.path), "exec"), done.names)
        done.text = capsys.readouterr().out
        return done

    def both(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Run, Run]:
        """Its run with its own `Model` and with ours, whose images are the same."""
        theirs, ours = (self.run(folder, capsys, which) for which in (False, True))
        assert [isinstance(run.models[0], tarflow_fast.TarFlow) for run in (theirs, ours)] == [False, True]
        for mine, wanted in zip(ours.images, theirs.images, strict=True):
            assert_close(mine, wanted, IMAGES)
        return theirs, ours


@pytest.fixture(autouse=True)
def _others_warn_as_they_like() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def weights_file(path: Path, **sizes: Any) -> Path:
    """A checkpoint in ml-tarflow's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(random_model(7, **sizes).state_dict(), path)
    return path


SMALL = ("--img_size", "16", "--patch_size", "4", "--channels", "64", "--blocks", "2", "--layers_per_block", "1")
SIZES: dict[str, Any] = {"in_channels": 3, "img_size": 16, "patch_size": 4, "channels": 64}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("nvp", [0, 1])
def test_evaluate_bpd(tmp_path: Path, capsys: pytest.CaptureFixture[str], nvp: int, classes: int) -> None:
    path = checkout("ML_TARFLOW", "evaluate_bpd.py")
    weights = weights_file(tmp_path / "model.pth", **SIZES, nvp=bool(nvp), num_classes=classes)
    arguments = ("--ckpt_file", str(weights), "--batch_size", "8", "--nvp", str(nvp), "--num_classes", str(classes))
    script = Script(path, "transformer_flow", Images((3, 16, 16), 20, 3), {}, (*SMALL, *arguments))
    theirs, ours = script.both(tmp_path, capsys)
    assert len(numbers(theirs.text)) == 4  # three batches, and all
    assert numbers(ours.text) == pytest.approx(numbers(theirs.text), abs=BITS)


@pytest.mark.parametrize("dataset", ["afhq", "imagenet64"])
@pytest.mark.parametrize("more", [(), ("--cfg", "1.5", "--attn_temp", "0.7"), ("--no-nvp", "--self_denoising_lr", "0")])
def test_evaluate_fid(tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, more: tuple[str, ...]) -> None:
    path = checkout("ML_TARFLOW", "evaluate_fid.py")
    sizes = {**SIZES, "nvp": "--no-nvp" not in more, "num_classes": 3 if dataset == "afhq" else 0}
    weights = weights_file(tmp_path / "model.pth", **sizes)
    torch.save({}, tmp_path / f"{dataset}_16_fid_stats.pth")
    arguments = ("--data", ".", "--logdir", "runs", "--dataset", dataset, "--ckpt_file", str(weights))
    counts = ("--batch_size", "8", "--num_samples", "12", *more)
    script = Script(path, "transformer_flow", Images((3, 16, 16), 4, 3), {}, (*SMALL, *arguments, *counts))
    theirs, _ = script.both(tmp_path, capsys)
    assert [len(images) for images in theirs.images] == [8, 4, 4]


def test_evaluate_fid_draws_again_what_is_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout("ML_TARFLOW", "evaluate_fid.py")
    weights = weights_file(tmp_path / "model.pth", **SIZES)
    state = torch.load(weights)
    for k in range(2):
        state[f"blocks.{k}.proj_out.weight"] *= 2.5
    torch.save(state, weights)
    torch.save({}, tmp_path / "imagenet64_16_fid_stats.pth")
    arguments = ("--data", ".", "--logdir", "runs", "--dataset", "imagenet64", "--ckpt_file", str(weights))
    counts = ("--batch_size", "1", "--num_samples", "12", "--self_denoising_lr", "0")
    changes = {"samples = dist.gather_concat": "drawn.append(samples); samples = dist.gather_concat",
               "def main(args):": "drawn = []\ndef main(args):"}  # fmt: skip
    script = Script(path, "transformer_flow", Images((3, 16, 16), 4, 3), changes, (*SMALL, *arguments, *counts))
    runs = [script.run(tmp_path, capsys, ours) for ours in (False, True)]
    again = [[bool(batch.isnan().any()) for batch in run.names["drawn"]] for run in runs]
    assert again[0] == again[1]
    assert any(again[0])


def test_sample_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout("ML_TARFLOW", "sample.ipynb")
    changes = {
        **{"img_size = 256": "img_size = 16", "patch_size = 8": "patch_size = 4", "channels = 768": "channels = 64"},
        **{"layers_per_block = 8": "layers_per_block = 1", "batch_size = 16": "batch_size = 4"},
    }
    weights_file(tmp_path / "runs/notebook/afhq_model_4_64_8_1_0.07.pth", **SIZES, num_blocks=8, num_classes=3)
    script = Script(path, "transformer_flow", Images((3, 16, 16), 4, 3), changes)
    theirs, _ = script.both(tmp_path, capsys)
    assert len(theirs.images) == 4  # two guidances, and both denoised


def test_train_local_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout("ML_TARFLOW", "train_local.ipynb")
    changes = {
        **{"channels = 128": "channels = 64", "blocks = 4": "blocks = 2", "batch_size = 256": "batch_size = 8"},
        **{"epochs = 100": "epochs = 2", "sample_freq = 10": "sample_freq = 1", "lr = 2e-3": "lr = 2e-4"},
    }
    script = Script(path, "transformer_flow", Images((1, 28, 28), 32, 10), changes)
    theirs, ours = script.both(tmp_path, capsys)
    assert len(theirs.images) == 4  # samples and latents, twice
    assert numbers(ours.text) == pytest.approx(numbers(theirs.text), abs=1e-3)
    trained = [run.models[0].state_dict() for run in (ours, theirs)]
    for name, value in trained[1].items():
        if not name.endswith("qkv.bias"):  # a key's bias changes nothing, and Adam moves it by its rounding errors
            assert_close(trained[0][name], value, IMAGES)


@pytest.mark.parametrize(("dataset", "classes"), [("afhq", 3), ("imagenet64_uncond", 0)])
@pytest.mark.parametrize("lists", [[0] * 8, [16, 0, 16, 0, 0, 0, 0, 0]], ids=str)
def test_gs_jacobi_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, classes: int, lists: list[int]
) -> None:
    path = checkout("GS_JACOBI", "Sampling.py")
    file = "afhq_model_8_768_8_8_0.07.pth" if classes else "imagenet64_model_2_768_8_8_0.05.pth"
    size, patch = (256, 8) if classes else (64, 2)
    changes = {f"'{dataset}': {size}": f"'{dataset}': 16", f"'{dataset}': {patch}": f"'{dataset}': 4",
               f"'{dataset}': 768": f"'{dataset}': 64", "layers_per_block = 8": "layers_per_block = 1"}  # fmt: skip
    weights_file(tmp_path / "models" / file, **SIZES, num_blocks=8, num_classes=classes)
    arguments = ("--dataset", dataset, "--cfg", "0.5", "--num_GS_list", str(lists), "--max_jacobi_list", str([1] * 8))
    script = Script(path, "GS_Jacobi_sampling", Images((3, 16, 16), 4, 3), changes, arguments)
    theirs, _ = script.both(tmp_path, capsys)
    assert len(theirs.images) == 1
