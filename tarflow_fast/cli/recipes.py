"""The recipes by which published FIDs were drawn, as options of `tarflow-fast sample`.

They are the command lines of two READMEs, each with a script evaluate_fid.py beside it: apple/ml-tarflow ("Evaluating
FID") and GS-Jacobi, arXiv 2505.12849 ("Evaluate FID with Different GS-Jacobi Strategies"). Both scripts draw 50,000
images, with uniformly random labels, annealed guidance, and batches of 1,024 over 8 GPUs, then denoise. Their `cfg` is
the guidance, and `self_denoising_lr` the scale of the optimal denoising step, 1 unless given.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TarFlowWarning
from ..sizes import by

if TYPE_CHECKING:
    from ..models.tarflow import TarFlow

IMAGES, BATCH_SIZE = 50_000, 1024 // 8
ML_TARFLOW, GS_JACOBI = "apple/ml-tarflow", "GS-Jacobi (arXiv 2505.12849)"


@dataclass(frozen=True)
class Recipe:
    """A `Recipe` draws from one published model.

    source: where the command line is from. size, patch, channels: the model's pixels along an image's and a patch's
    side, and its width. conditional: whether it has classes. noise_std: σ of the noise that it was trained with.
    guidance, denoise_scale, attn_temp: see `Sampler.sample`.
    """

    source: str
    size: int
    patch: int
    channels: int
    conditional: bool
    noise_std: float
    guidance: float
    denoise_scale: float
    attn_temp: float = 1.0


RECIPES = {
    "afhq256": Recipe(GS_JACOBI, 256, 8, 768, True, 0.07, guidance=3.4, denoise_scale=1.4),
    "imagenet128-cond": Recipe(GS_JACOBI, 128, 4, 1024, True, 0.15, guidance=1.5, denoise_scale=0.97),
    "imagenet64-cond": Recipe(ML_TARFLOW, 64, 2, 768, True, 0.05, guidance=2.3, denoise_scale=1.0),
    "imagenet64-cond-patch4": Recipe(GS_JACOBI, 64, 4, 1024, True, 0.05, guidance=2.0, denoise_scale=1.0),
    "imagenet64-uncond": Recipe(GS_JACOBI, 64, 2, 768, False, 0.05, guidance=0.2, denoise_scale=0.9, attn_temp=0.3),
}


def with_recipe(name: str, given: dict[str, Any], model: TarFlow) -> dict[str, Any]:
    """Returns the options with those of a recipe in the place of those that were not given.

    What an option switches off takes its details with it. Warns of a model that is not the recipe's. given: the options
    by name, with `count` and `labels`, each None where it was not given.
    """
    recipe = RECIPES[name]
    _check_model(name, recipe, model)
    options: dict[str, Any] = {"count": IMAGES, "batch_size": BATCH_SIZE, "guidance": recipe.guidance, "denoise": True}
    if recipe.conditional:
        options["labels"] = "random"
    if given["guidance"] != 0:
        options["annealed_guidance"] = True
        if recipe.attn_temp != 1:
            options["attn_temp"] = recipe.attn_temp
    if given["denoise"] is not False:
        options["denoise_scale"] = recipe.denoise_scale
        if "noise_std" not in model.metadata:
            options["noise_std"] = recipe.noise_std
    return {**given, **{option: value for option, value in options.items() if given[option] is None}}


def _check_model(name: str, recipe: Recipe, model: TarFlow) -> None:
    config = model.config
    found = (config.img_size, config.patch_size, config.channels, config.num_classes > 0)
    if found != (recipe.size, recipe.patch, recipe.channels, recipe.conditional):

        def of(size: Any, patch: Any, channels: int, conditional: bool) -> str:
            kind = "conditional" if conditional else "unconditional"
            return f"{kind}, {by(size)}, patches of {by(patch)}, {channels} channels"

        wanted = of(recipe.size, recipe.patch, recipe.channels, recipe.conditional)
        said = f"is for another model ({wanted}) than this one ({of(*found)})"
        warnings.warn(f"the recipe {name} {said}", TarFlowWarning, stacklevel=3)


def recipe_line(name: str, options: dict[str, Any]) -> str:
    """Returns the line that tells what a recipe comes to, with the options that were given in its place."""
    shown = (
        "count",
        "labels",
        "guidance",
        "annealed_guidance",
        "attn_temp",
        "denoise_scale",
        "noise_std",
        "batch_size",
    )
    settings = ", ".join(f"{option} {options[option]}" for option in shown if options[option] is not None)
    return f"recipe {name}, of {RECIPES[name].source}: " + settings.replace("_", " ").replace("count", "images")
