"""The recipes of published FIDs: what they come to, and what wins over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import random_model
from command_lines import Run
from remarks import Remarks

import tarflow_fast as tff
from tarflow_fast.cli.recipes import RECIPES, with_recipe

NONE = dict.fromkeys(
    (
        "count",
        "labels",
        "batch_size",
        "guidance",
        "annealed_guidance",
        "attn_temp",
        "denoise",
        "denoise_scale",
        "noise_std",
    )
)


def told(name: str, metadata: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    model = random_model(num_classes=3 if RECIPES[name].conditional else 0)
    model.metadata = metadata or {}
    options = with_recipe(name, {**NONE, **given}, model)
    return {option: value for option, value in options.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "guidance", "rate", "noise", "more"),
    [
        ("afhq256", 3.4, 1.4, 0.07, {"labels": "random"}),
        ("imagenet128-cond", 1.5, 0.97, 0.15, {"labels": "random"}),
        ("imagenet64-cond", 2.3, 1.0, 0.05, {"labels": "random"}),
        ("imagenet64-cond-patch4", 2.0, 1.0, 0.05, {"labels": "random"}),
        ("imagenet64-uncond", 0.2, 0.9, 0.05, {"attn_temp": 0.3}),
    ],
)
def test_recipes_are_the_published_command_lines(
    name: str, guidance: float, rate: float, noise: float, more: dict[str, Any]
) -> None:
    published = {"count": 50_000, "batch_size": 128, "annealed_guidance": True, "denoise": True}
    assert told(name) == {**published, "guidance": guidance, "denoise_scale": rate, "noise_std": noise, **more}


def test_what_is_given_wins_and_takes_its_details_with_it() -> None:
    assert told("afhq256", count=10, labels="0", guidance=1.0, batch_size=2, annealed_guidance=False) == {
        **{"count": 10, "labels": "0", "guidance": 1.0, "batch_size": 2, "annealed_guidance": False},
        **{"denoise": True, "denoise_scale": 1.4, "noise_std": 0.07},
    }
    plain = told("imagenet64-uncond", guidance=0.0, denoise=False)
    assert plain == {"count": 50_000, "batch_size": 128, "guidance": 0.0, "denoise": False}
    assert "noise_std" not in told("afhq256", {"noise_std": 0.08})


def test_a_model_of_the_recipe_s_sizes_is_no_surprise(remarks: Remarks) -> None:
    sizes: dict[str, Any] = {"in_channels": 3, "img_size": 64, "patch_size": 4, "channels": 1024, "num_blocks": 1}
    model = tff.TarFlow(**sizes, layers_per_block=1, num_classes=2)
    with_recipe("imagenet64-cond-patch4", {**NONE}, model)
    assert remarks.messages == []
    with_recipe("imagenet64-cond", {**NONE}, model)
    assert remarks.messages == [
        "the recipe imagenet64-cond is for another model (conditional, 64×64, patches of 2×2, 768 channels) "
        "than this one (conditional, 64×64, patches of 4×4, 1024 channels)"
    ]


def test_a_recipe_is_printed_and_used(command_line: Run) -> None:
    how = ("sample", "-m", "m.safetensors", "--recipe", "afhq256", "--solver", "sequential", "--labels", "cat")
    result = command_line(*how, "-n", 4, "--out", "d")
    line = result.stdout.splitlines()[0]
    assert line == (
        "recipe afhq256, of GS-Jacobi (arXiv 2505.12849): images 4, labels cat, guidance 3.4, annealed guidance True, "
        "denoise scale 1.4, batch size 128"
    )
    assert "guidance 3.4, denoised" in result.stdout
    assert "Warning: the recipe afhq256 is for another model" in result.stderr
    asked = json.loads(Path("d/job.json").read_text())["asked"]
    assert (asked["n"], asked["guidance"], asked["annealed_guidance"], asked["denoise_scale"]) == (4, 3.4, True, 1.4)


def test_a_grid_has_the_images_that_it_would_have(command_line: Run) -> None:
    result = command_line("sample", "-m", "m.safetensors", "--recipe", "afhq256", "--solver", "sequential")
    assert "samples.png: 64 images of 8×8, guidance 3.4, denoised" in result.stdout


def test_without_classes(command_line: Run) -> None:
    how = ("sample", "-m", "plain.pth", "--patch-size", 2, "--solver", "sequential", "-n", 4, "--out", "d", "--json")
    facts = json.loads(command_line(*how, "--recipe", "imagenet64-uncond").stdout)
    assert facts["images"] == 4
    asked = json.loads(Path("d/job.json").read_text())["asked"]
    assert (asked["guidance"], asked["attn_temp"], asked["noise_std"], asked["labels"]) == (0.2, 0.3, 0.05, None)
