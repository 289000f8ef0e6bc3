"""Compare raw samples with denoised and guided ones: one row of a picture for each way, one column for each image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from pictures import write_grid

import tarflow_fast as tff

ROWS: dict[str, dict[str, Any]] = {
    "raw": {},
    "denoised": {"denoise": True},
    "denoised, guidance 1": {"denoise": True, "guidance": 1.0},
    "denoised, guidance 2": {"denoise": True, "guidance": 2.0},
    "denoised, guidance 3": {"denoise": True, "guidance": 3.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint that records its noise (default: the shipped model)")
    parser.add_argument("-n", type=int, default=10, help="number of images in a row (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/denoise_and_guide"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args()

    model = tff.load(args.model) if args.model else tff.load_pretrained()
    sampler = tff.Sampler(model)
    labels = list(range(model.config.num_classes)) or None  # image i takes entry i mod their number

    rows = []
    for name, options in ROWS.items():
        samples = sampler.sample(args.n, labels, seed=args.seed, **options)  # the same noise in every row
        report = samples.report
        print(f"{name}: {report.seconds:.2f} s to sample, {report.denoise_seconds:.2f} s to denoise")
        rows.append(samples)
    write_grid(torch.cat([row.images for row in rows]), args.out / "rows.png", columns=args.n)

    apart = tff.denoise(model, rows[0].images, rows[0].labels)  # denoising as a step of its own
    print(
        f"tff.denoise of the raw row: largest difference {(apart - rows[1].images).abs().max():.1e} from the second row"
    )
    print(f"{args.out / 'rows.png'}: from top to bottom {'; '.join(ROWS)}")


if __name__ == "__main__":
    main()
