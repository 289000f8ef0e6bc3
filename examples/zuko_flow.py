"""Sample a zuko flow at the price of a density pass: both times, the largest difference, and a certificate."""

from __future__ import annotations

import argparse
import time

import torch
import zuko

import tarflow_fast as tff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["MAF", "NSF"], default="NSF", help="kind of flow (default: %(default)s)")
    parser.add_argument("--features", type=int, default=32, help="number of dimensions (default: %(default)s)")
    parser.add_argument("-n", type=int, default=1000, help="number of samples (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of training (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    flow = getattr(zuko.flows, args.kind)(args.features, context=2, transforms=3, hidden_features=(128, 128))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(args.steps):  # x is a random walk that the context starts and drives
        context = torch.randn(256, 2)
        x = context[:, :1] + 0.3 * torch.randn(256, args.features).cumsum(1) + 0.1 * context[:, 1:]
        loss = -flow(context).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    fast = tff.accelerate(flow)  # called with a context as the flow is; fast.refresh() takes weights that changed
    context = torch.tensor([0.5, -1.0])
    samples = []
    for name, each in (("zuko", flow), ("accelerated", fast)):
        torch.manual_seed(1)
        started = time.perf_counter()
        samples.append(each(context).sample((args.n,)))
        print(f"{name}: {time.perf_counter() - started:.3f} s for {args.n} samples")
    print(f"largest difference: {(samples[0] - samples[1]).abs().max():.1e}")

    _, log_prob, certificate = fast(context).certified_sample((args.n,))
    print(f"mean log q: {log_prob.mean():.3f} nats, exact, and no pass of its own")
    above, _ = certificate.count(1e-3)
    print(f"|z - forward(x)| is {certificate.residual.max():.1e} at most; above 1e-3 in {above} samples")


if __name__ == "__main__":
    main()
