"""Sample a posterior of sbi at the price of a density pass: both times, and the largest difference."""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from sbi.utils.tracking import TensorBoardTracker
from torch.utils.tensorboard import SummaryWriter

import tarflow_fast as tff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--estimator", default="zuko_nsf", help="sbi's name of a density estimator (default: %(default)s)"
    )
    parser.add_argument("--features", type=int, default=8, help="number of parameters (default: %(default)s)")
    parser.add_argument("-n", type=int, default=1000, help="number of samples (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    bound = 3 * torch.ones(args.features)
    prior = BoxUniform(-bound, bound)
    theta = prior.sample((500,))
    x = theta + 0.3 * torch.randn_like(theta)  # the simulator
    with tempfile.TemporaryDirectory() as logs, SummaryWriter(logs) as writer:  # else sbi writes them where it is run
        tracker = TensorBoardTracker(writer)
        inference = NPE(prior, density_estimator=args.estimator, tracker=tracker, show_progress_bars=False)
        inference.append_simulations(theta, x).train(max_num_epochs=args.epochs, show_train_summary=False)
    posterior = inference.build_posterior().set_default_x(torch.zeros(1, args.features))

    fast = tff.accelerate(posterior)  # a DirectPosterior too; fast.refresh() takes weights that changed
    several = 0.3 * torch.randn(5, args.features)
    for what, draw in {
        "one x": lambda each: each.sample((args.n,), show_progress_bars=False),
        "five x": lambda each: each.sample_batched((args.n // 5,), x=several, show_progress_bars=False),
    }.items():
        samples = []
        for name, each in (("sbi", posterior), ("accelerated", fast)):
            torch.manual_seed(1)
            started = time.perf_counter()
            samples.append(draw(each))
            print(f"{what}, {name}: {time.perf_counter() - started:.3f} s for {args.n} samples")
        print(f"{what}, largest difference: {(samples[0] - samples[1]).abs().max():.1e}")


if __name__ == "__main__":
    main()
