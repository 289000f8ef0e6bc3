"""Compute exact likelihoods: bits per dimension of images, and the classes that Bayes' rule gives them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pictures import write_grid

import tarflow_fast as tff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a conditional model's checkpoint (default: the shipped model)")
    parser.add_argument("-n", type=int, default=30, help="number of images (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/classify"), help="folder (default: %(default)s)")
    args = parser.parse_args()

    model = tff.load(args.model) if args.model else tff.load_pretrained()
    classes = model.config.num_classes
    samples = tff.Sampler(model).sample(args.n, list(range(classes)), seed=args.seed)
    assert samples.log_prob is not None  # as it would be if the images were guided, which changes their distribution
    x, truth = samples.images, torch.arange(args.n) % classes  # images as in training, noise included
    write_grid(x, args.out / "images.png", columns=10)

    with torch.no_grad():
        log_p = torch.stack([model.log_prob(x, torch.full((len(x),), c)) for c in range(classes)], dim=1)
        bits = model.bits_per_dim(x, truth)
    posterior = log_p.softmax(dim=1)  # p(y | x) ∝ p(x | y) under a uniform prior

    error = (log_p[torch.arange(args.n), truth] - samples.log_prob).abs().max()
    print(f"log p of the density pass and of sampling: largest difference {error:.1e} nats")
    print(f"bits/dim: mean {bits.mean():.3f}, from {bits.min():.3f} to {bits.max():.3f}")
    found = posterior.argmax(dim=1)
    names = model.metadata.get("class_names", [str(c) for c in range(classes)])
    for i in (found != truth).nonzero()[:, 0].tolist():
        print(
            f"image {i}, drawn as {names[truth[i]]}, is taken for {names[found[i]]}, p = {posterior[i, found[i]]:.2f}"
        )
    print(f"{int((found == truth).sum())} of {args.n} images are given the class that they were drawn as")
    print(f"{args.out / 'images.png'}: the images, in order")


if __name__ == "__main__":
    main()
