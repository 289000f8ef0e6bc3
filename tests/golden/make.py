"""Make the seeded golden cases with the published code: `make.py --ml-tarflow PATH` (a checkout of it)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from cases import seeded_weights  # noqa: E402

NOISE_STD = 0.1

SIZES = {"channels": 64, "num_blocks": 2, "layers_per_block": 1}
GREY8 = SIZES | {"in_channels": 1, "img_size": 8, "patch_size": 2}
GREY12 = SIZES | {"in_channels": 1, "img_size": 12, "patch_size": 3, "num_classes": 3}
RGB16 = SIZES | {"in_channels": 3, "img_size": 16, "patch_size": 4, "num_classes": 10}

# name: (seed, batch, constructor, arguments of reverse)
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "uncond": (1, 3, GREY8 | {"layers_per_block": 2}, {}),
    "vp": (2, 3, GREY8 | {"nvp": False}, {}),
    "cond": (3, 2, RGB16 | {"channels": 128}, {}),
    "cond_cfg": (4, 2, RGB16, {"guidance": 2.0, "guide_what": "ab"}),
    "cond_cfg_b": (5, 3, GREY12, {"guidance": 1.0, "guide_what": "b"}),
}


def record(model: Any, batch: int, num_classes: int, reverse: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Returns inputs, and what the published model makes of them."""
    generator = torch.Generator().manual_seed(seed)
    T, D = model.var.shape
    image = model.unpatchify(torch.randn(batch, T, D, generator=generator))
    z = torch.randn(batch, T, D, generator=generator)
    tensors = {"in.image": image, "in.z": z}
    y = None
    if num_classes:
        y = torch.randint(num_classes, (batch,), generator=generator)
        dropped = torch.where(torch.arange(batch) % 2 == 0, -1, y)
        tensors |= {"in.y": y, "in.y_dropped": dropped}

    def forward(key: str, labels: Tensor | None) -> list[Tensor]:
        latents, outputs, log_det = model(image, labels)
        tensors[f"out.{key}_z"] = latents
        tensors[f"out.{key}_logdet"] = log_det
        return outputs

    with torch.no_grad():
        tensors["out.forward_outputs"] = torch.stack(forward("forward", y))
        if y is not None:
            forward("forward_dropped", dropped)
            forward("forward_nolabel", None)
        # Its reverse may write into its argument (one block, var = 1 aside): a copy each time.
        tensors["out.reverse"] = model.reverse(z.clone(), y, **reverse)
        sequence = model.reverse(z.clone(), y, return_sequence=True, **reverse)
        tensors["out.reverse_sequence"] = torch.stack(sequence)
        unguided = model.reverse(z.clone(), y)
    tensors["out.reverse_unguided"] = unguided

    x = unguided.clone().requires_grad_()
    latents, _, log_det = model(x, y)
    loss = model.get_loss(latents, log_det)
    (gradient,) = torch.autograd.grad(loss, x)
    tensors["out.loss_at_unguided"] = loss.detach().reshape(1)
    tensors["out.grad_at_unguided"] = gradient
    # The published step: its loss is a mean over the batch's values, so the gradient times their number.
    tensors["out.denoised_unguided"] = unguided - NOISE_STD**2 * unguided.numel() * gradient
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ml-tarflow", type=Path, required=True, help="a checkout of ml-tarflow")
    sys.path.insert(0, str(parser.parse_args().ml_tarflow))
    from transformer_flow import Model

    for name, (seed, batch, constructor, reverse) in CASES.items():
        model = Model(**constructor)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        model.load_state_dict(seeded_weights(shapes, seed))
        tensors = record(model, batch, constructor.get("num_classes", 0), reverse, seed)
        metadata = {
            "constructor": json.dumps(constructor),
            "reverse": json.dumps(reverse),
            "noise_std": str(NOISE_STD),
            "weights_seed": str(seed),
        }
        path = FOLDER / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
