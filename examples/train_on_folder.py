"""Train a model on a folder with one sub-folder of pictures for each class, sample from it, and train it further."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from pathlib import Path

import torch
from pictures import write_grid

import tarflow_fast as tff


def make_pictures(folder: Path, n: int = 240) -> Path:
    """Write samples of the shipped model as FOLDER/train/CLASS/NUMBER.png, and a sixth of them as FOLDER/test/…"""
    model = tff.load_pretrained()
    names = ["Trouser", "Dress", "Sneaker", "Bag"]
    labels = [model.metadata["class_names"].index(name) for name in names]
    images = tff.Sampler(model).sample(n, labels, guidance=1.0, denoise=True).images
    for i, image in enumerate(images):
        half = "test" if i < n // 6 else "train"
        write_grid(image[None], folder / half / names[i % len(names)] / f"{i:04d}.png", columns=1)
    return folder


def report(model: tff.TarFlow, run: Path, picture: str) -> None:
    """Print the last figure that the run has written, and draw five samples of each class."""
    with (run / "eval.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    print(f"{last['step']} steps: {float(last['bits_per_dim']):.3f} bits/dim of the test pictures")
    classes = model.config.num_classes
    labels = list(range(classes))  # a model that has learnt little draws some images that overflow: "redraw" those
    images = tff.Sampler(model).sample(5 * classes, labels, denoise=True, on_nonfinite="redraw").images
    write_grid(images, run / picture, columns=classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of pictures (default: one is made of the shipped model's)")
    parser.add_argument("--size", type=int, default=16, help="pixels of a picture's side, 4, 8, … (default: 16)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs, and later as many again (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("runs/train_on_folder"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains little from more, and on a busy machine they wait for each other

    run = args.out / time.strftime("%Y%m%d-%H%M%S")  # every run has a folder of its own
    data = args.data or make_pictures(run / "pictures")
    config = tff.TrainConfig(
        data=str(data),
        eval_data=str(data),  # its folder `test`, where there are `train` and `test`
        out=str(run),
        img_size=args.size,
        in_channels=3 if args.data else 1,
        patch_size=4,
        channels=64,
        num_blocks=4,
        layers_per_block=1,
        noise_std=0.2,
        epochs=args.epochs,
        batch_size=25,
        lr=5e-3,
        warmup_steps=10,
        ema_decay=0.95,
        dtype="float32",
    )
    report(tff.train(config), run, "samples.png")

    longer = dataclasses.replace(config, epochs=2 * args.epochs)
    tff.train(longer, resume=True)  # goes on from the checkpoint in `run`
    report(tff.load(run / "model.safetensors"), run, "samples_later.png")
    print(f"{run}: model.safetensors, train.csv, eval.csv, samples.png, samples_later.png")


if __name__ == "__main__":
    main()
