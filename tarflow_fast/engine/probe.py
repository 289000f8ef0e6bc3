"""How an engine is tried: a part of the sequential pass, what it takes, and how far it is off that of a trusted one."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import BlockEngine, Condition
from .timing import STEPS, seconds

MAX_DEVIATION = {torch.float64: 1e-9, torch.float32: 4e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The most that an engine may be off, see `difference`, by the dtype of weights and cache, with guidance of weight w
1 + w times as much: xa + w (xa − xa_u) has that share of the errors of xa. On the trained models of Fashion-MNIST and
CIFAR-10 two ways of rounding are up to 1.5e-2 off each other in bf16, 1.2e-3 in fp16 and 1.2e-6 in fp32, and three
times that with w = 2; fp32 may be computed in tf32, whose products are rounded as in fp16. What is wrong by a tenth,
or in one sample of a batch alone, is far beyond."""


@torch.no_grad()
def probe(engine: BlockEngine, z: Tensor, condition: Condition, trusted: list[Tensor]) -> tuple[list[Tensor], float]:
    """Tokens and log-dets of pieces of the sequential pass, (B, STEPS, D + 1) each, and the seconds of the last one.

    trusted: pieces of another engine. Each piece goes on from these, so that differences do not add up.
    """
    state = engine.begin(z.clone(), condition)
    T = z.shape[1]
    middle = 1 + T // 2 // STEPS * STEPS
    stop = min(middle + STEPS, T)
    pieces = []
    for start in range(1, stop, STEPS):
        end = min(start + STEPS, stop)
        engine.reverse(state, None, start, end)
        pieces.append(torch.cat([state.x[:, start:end], state.token_log_det[:, start:end, None]], dim=-1))
        if trusted:
            state.x[:, start:end] = trusted[len(pieces) - 1][..., :-1]

    def run() -> None:
        engine.reverse(state, None, middle, stop)
        state.x[:, stop - 1, 0].sum().item()  # waits for the device

    return pieces, seconds(engine, run)


def difference(pieces: list[Tensor], trusted: list[Tensor]) -> float:
    """How far pieces are off the trusted ones, of the piece and sample where it is most: the root mean square of the
    tokens' differences in units of the tokens' own, or of the log-dets' in nats for each value of a token. What is not
    finite in a trusted piece does not count; where the other alone is not, the result is infinite or NaN."""
    most = torch.zeros((), dtype=torch.float64, device=trusted[0].device if trusted else "cpu")
    for piece, sure in zip(pieces, trusted, strict=True):
        sure = sure.double()
        gap = torch.where(sure.isfinite(), piece - sure, 0)
        size = torch.where(sure.isfinite(), sure, 0)
        tokens, size = (x[..., :-1].square().mean((1, 2)).sqrt() for x in (gap, size))
        log_dets = gap[..., -1].square().mean(1).sqrt() / (sure.shape[-1] - 1)
        for off in (tokens / size.clamp(min=torch.finfo(torch.float64).tiny), log_dets):
            most = torch.maximum(most, off.amax())
    return most.item()
