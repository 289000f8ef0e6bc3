"""Accelerate a model that you have in memory: the same call of `reverse` gives the same images in less time."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pictures import write_grid
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast import reference


def published_model(checkout: Path, weights: tff.TarFlow) -> Any:
    """ml-tarflow's own `Model`, imported from a checkout, with these weights."""
    sys.path.insert(0, str(checkout))
    sizes = weights.config.to_dict()
    del sizes["head_dim"]  # ml-tarflow's heads have 64 channels, always
    model = importlib.import_module("transformer_flow").Model(**sizes)
    model.load_state_dict(weights.state_dict())
    return model.eval()


def plain_reverse(model: tff.TarFlow, z: Tensor, y: Tensor | None, **options: Any) -> Tensor:
    """The sampling pass as its equations have it: for each token, the transformers read all tokens before it anew."""
    tokens = reference.inverse(model.state_dict(), z, y, head_dim=model.config.head_dim, **options).x
    return reference.unpatchify(tokens, model.patch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ml-tarflow", type=Path, metavar="PATH", help="a checkout of ml-tarflow, whose Model is taken"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint, .pth or .safetensors (default: the shipped model)")
    parser.add_argument("-n", type=int, default=8, help="number of images (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/drop_in"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if args.ml_tarflow and not (args.ml_tarflow / "transformer_flow.py").is_file():
        parser.error(f"--ml-tarflow: {args.ml_tarflow} holds no transformer_flow.py")

    weights = tff.load(args.model) if args.model else tff.load_pretrained()
    T, D, classes = weights.config.num_patches, weights.config.token_dim, weights.config.num_classes
    z = torch.randn(args.n, T, D, generator=torch.Generator().manual_seed(0))
    y = torch.arange(args.n) % classes if classes else None

    model = published_model(args.ml_tarflow, weights) if args.ml_tarflow else weights
    slow: Callable[..., Any] = model.reverse if args.ml_tarflow else functools.partial(plain_reverse, weights)
    fast: Callable[..., Any] = tff.accelerate(model).reverse  # all that changes in a program that calls model.reverse

    images, seconds = [], []
    for reverse in (slow, fast):
        start = time.perf_counter()
        with torch.no_grad():
            images.append(reverse(z, y, guidance=1.0, guide_what="ab", attn_temp=1.0, annealed_guidance=False))
        seconds.append(time.perf_counter() - start)

    difference = (images[0] - images[1]).abs().max().item()
    print(f"{'ml-tarflow' if args.ml_tarflow else 'plain equations'}: {seconds[0]:.2f} s")
    print(f"accelerated: {seconds[1]:.2f} s, {seconds[0] / seconds[1]:.1f} times as fast")
    print(f"largest difference: {difference:.1e}")
    write_grid(torch.cat(images), args.out / "images.png", columns=args.n)
    print(f"{args.out / 'images.png'}: the slow images above, the fast ones below")
    if not difference < 1e-3:
        raise SystemExit("the images are not the same")


if __name__ == "__main__":
    main()
