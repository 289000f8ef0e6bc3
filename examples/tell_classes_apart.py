"""Train a conditional model on until its likelihoods tell classes apart better, in a loop of your own.

The loss is −log p(x | y) of images drawn evenly, and beside it −log p(y | x) estimated from pairs of an image and one
wrong label, log(1 + p(x | wrong) / p(x | y)): a hybrid of generative and discriminative training (Lasserre, Bishop and
Minka, CVPR 2006). A wrong label is drawn as often as the model has lately taken its images for it, as most wrong
labels are so improbable that nothing is learnt from them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from pictures import write_grid
from torch import Tensor
from torch.nn.functional import softplus

import tarflow_fast as tff

WARMUP, FORGETTING, FLOOR = 20, 0.05, 0.003


def log_density(model: tff.TarFlow, x: Tensor, y: Tensor) -> Tensor:
    """log p(x | y) in nats but for a constant, (B,), in bf16 where that is safe."""
    with torch.autocast(x.device.type, torch.bfloat16):
        z, _, log_det = model(x, y)
    return x[0].numel() * (log_det.float() - (0.5 * z.float().square() / model.var).flatten(1).mean(1))


def labelled_images(model: tff.TarFlow, path: Path | None) -> tuple[Tensor, Tensor]:
    """8-bit images, (N, ch, H, W), and their labels, (N,): of the file or folder, or 100 that the model draws."""
    if path is None:
        drawn = tff.Sampler(model).sample(100, list(range(model.config.num_classes)), denoise=True)
        assert drawn.labels is not None
        return ((drawn.images.clamp(-1, 1) + 1) * 127.5).round().byte(), drawn.labels
    data = tff.load_images(path, split="train", size=model.config.img_size)
    assert data.labels is not None
    return data.images, data.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a conditional model's checkpoint (default: the shipped model)")
    parser.add_argument("--data", type=Path, help="a folder or file of labelled images (default: drawn by the model)")
    parser.add_argument("--steps", type=int, default=900, help="number of steps (default: %(default)s)")
    parser.add_argument("--images", type=int, default=48, help="images in a step (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=40, help="pairs in a step (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=20.0, help="weight of the pairs (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tell_classes_apart"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args()

    model = (tff.load(args.model) if args.model else tff.load_pretrained()).train()
    sigma, classes = model.metadata["noise_std"], model.config.num_classes
    images, labels = labelled_images(model, args.data)
    of_class = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    taken_for = torch.full((classes, classes), 0.1).fill_diagonal_(0)  # [y, wrong]: p(wrong | x) of lately seen pairs

    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-4)
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, n: mean.lerp(new, 1 - min(0.995, (n + 1) / (n + 10)))
    )
    random = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        rate = min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / args.steps)) + 1e-3
        optimiser.param_groups[0]["lr"] = args.lr * rate

        evenly = torch.randint(len(labels), (args.images,), generator=random)
        given = labels[evenly].masked_fill(torch.rand(args.images, generator=random) < 0.1, -1)  # for guidance
        chances = (taken_for + FLOOR).fill_diagonal_(0).flatten()
        pair = torch.multinomial(chances, args.pairs, replacement=True, generator=random)
        right, wrong = pair // classes, pair % classes
        hard = torch.stack([of[torch.randint(len(of), (), generator=random)] for of in (of_class[c] for c in right)])
        x = images[torch.cat([evenly, hard])] / 127.5 - 1
        x = x + sigma * torch.randn(x.shape, generator=random)

        log_p = log_density(model, torch.cat([x, x[args.images :]]), torch.cat([given, right, wrong]))
        even, as_right, as_wrong = log_p.split([args.images, args.pairs, args.pairs])
        apart = softplus(as_wrong - as_right)
        loss = (args.weight * apart.mean() - even.mean()) / x[0].numel()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(model)
        for y, other, p in zip(right, wrong, (as_wrong - as_right).sigmoid().detach(), strict=True):
            taken_for[y, other].lerp_(p, FORGETTING)
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: log p {even.mean():.1f} nats (but for a constant), pairs {apart.mean():.3f} nats")

    args.out.mkdir(parents=True, exist_ok=True)
    trained = average.module.eval()
    assert isinstance(trained, tff.TarFlow)
    tff.save(trained, args.out / "model.safetensors")
    samples = tff.Sampler(trained).sample(4 * classes, list(range(classes)), denoise=True, seed=args.seed)
    write_grid(samples.images, args.out / "samples.png", columns=classes)
    print(f"{args.out / 'model.safetensors'}: the average of the weights; samples.png: what it draws")


if __name__ == "__main__":
    main()
