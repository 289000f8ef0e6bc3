"""Draw images by seed, number and label: image i depends on these three alone, however it comes to be drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import write_grid

import tarflow_fast as tff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a conditional model's checkpoint (default: the shipped model)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds_and_labels"), help="folder (default: %(default)s)")
    args = parser.parse_args()

    model = tff.load(args.model) if args.model else tff.load_pretrained()
    classes = model.config.num_classes
    sampler = tff.Sampler(model)
    labels = list(range(classes))  # image i takes entry i mod their number
    whole = sampler.sample(4 * classes, labels, seed=args.seed).images
    write_grid(whole, args.out / "classes.png", columns=classes)

    in_batches = sampler.sample(4 * classes, labels, seed=args.seed, batch_size=7).images
    print(f"drawn in batches of 7 instead of at once: largest difference {(in_batches - whole).abs().max():.1e}")

    start = 2 * classes + 1
    rest = sampler.sample(4 * classes - start, labels, seed=args.seed, first=start).images
    print(f"drawn from image {start} on: largest difference {(rest - whole[start:]).abs().max():.1e}")

    last = classes - 1
    alone = sampler.sample(1, last, seed=args.seed, first=last).images
    print(f"image {last} drawn alone: largest difference {(alone[0] - whole[last]).abs().max():.1e}")

    one_class = sampler.sample(4 * classes, last, seed=args.seed).images  # the same noise, every label the last class
    write_grid(one_class, args.out / "one_class.png", columns=classes)
    print(f"image 0 under label {last} instead of 0: largest difference {(one_class[0] - whole[0]).abs().max():.1f}")

    other = sampler.sample(4 * classes, labels, seed=args.seed + 1).images
    write_grid(other, args.out / "other_seed.png", columns=classes)
    print(f"image 0 of seed {args.seed + 1}: largest difference {(other[0] - whole[0]).abs().max():.1f}")

    names = model.metadata.get("class_names", labels)
    print(
        f"{args.out}: classes.png, one_class.png ({names[last]}), other_seed.png; columns: {', '.join(map(str, names))}"
    )


if __name__ == "__main__":
    main()
