"""The probe of an engine: a part of the sequential pass is timed, and held against that of a trusted engine."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import BlockEngine, Condition
from .timing import STEPS, seconds

MAX_DEVIATION = {torch.float64: 1e-9, torch.float32: 4e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The largest `difference` that an engine may have from the baseline, by the dtype of weights and cache.

With guidance of weight w the limit is 1 + w times as much, because xa + w (xa − xa_u) has about 1 + w times the error
of xa. On the trained models of Fashion-MNIST and CIFAR-10, two ways of rounding differ by up to 1.5e-2 in bf16, 1.2e-3
in fp16 and 1.2e-6 in fp32, and by three times that with w = 2. fp32 has the limit of fp16 because it may be computed in
tf32, whose products are rounded as in fp16. An engine that is wrong by a tenth, even in one sample of a batch, is far
beyond these limits.
"""


@torch.no_grad()
def probe(engine: BlockEngine, z: Tensor, condition: Condition, trusted: list[Tensor]) -> tuple[list[Tensor], float]:
    """Returns pieces of the sequential pass, and the seconds that the last one takes.

    A piece holds the tokens and log-dets of up to STEPS tokens, (B, STEPS, D + 1).

    engine: the engine to try. z: (B, T, D), the latents, not mutated. condition: the labels and the guidance. trusted:
    the pieces of a trusted engine, or an empty list. Each piece then goes on from the trusted tokens, so that
    differences do not add up.
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
    """Returns the largest difference between pieces and the trusted ones, over all pieces and samples.

    The difference of a piece and sample is the larger of two numbers: the root mean square of the tokens' differences
    divided by that of the trusted tokens, and the root mean square of the log-dets' differences in nats, divided by D.
    A value that is not finite in a trusted piece does not count. Where only the other piece has a value that is not
    finite, the result is infinite or NaN.
    """
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
