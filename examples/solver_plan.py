"""Learn a plan for the parallel solver, keep it in a file, and count the passes of each flow block with and without."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pictures import write_grid

import tarflow_fast as tff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint, .pth or .safetensors (default: the shipped model)")
    parser.add_argument("-n", type=int, default=16, help="number of images to draw (default: 16)")
    parser.add_argument("--learn-from", type=int, default=128, help="number of images to learn from (default: 128)")
    parser.add_argument("--out", type=Path, default=Path("runs/solver_plan"), help="folder (default: %(default)s)")
    args = parser.parse_args()

    model = tff.load(args.model) if args.model else tff.load_pretrained()
    labels = list(range(model.config.num_classes)) or None

    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "plan.safetensors"
    tff.Sampler(model).learn_plan(args.learn_from, labels, seed=1).save(file)
    plan = tff.SolverPlan.load(file)

    ways: dict[str, dict[str, Any]] = {
        "sequential": {"solver": "sequential"},
        "adaptive": {"solver": "adaptive"},
        "adaptive, plan": {"solver": "adaptive", "plan": plan},
        "auto, plan": {"solver": "auto", "plan": plan},
    }
    exact = None
    for name, options in ways.items():
        samples = tff.Sampler(model, **options).sample(args.n, labels, seed=0)
        exact = samples.images if exact is None else exact
        blocks = samples.report.blocks
        passes = " + ".join(f"{block.passes}" for block in reversed(blocks))  # the last block is inverted first
        tokens = sum(block.evaluations for block in blocks) // args.n
        error = (samples.images - exact).abs().max()
        total = sum(block.passes for block in blocks)
        print(f"{name:<15} {passes} = {total} passes, {tokens} tokens evaluated an image, difference {error:.0e}")
    write_grid(samples.images, args.out / "samples.png", columns=8)
    print(f"{args.out}: plan.safetensors, samples.png")


if __name__ == "__main__":
    main()
