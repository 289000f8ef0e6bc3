"""This module takes one batch through all blocks of a flow, from latents to data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import host_ops
from ..engine.contract import BlockEngine, Condition
from ..flow import Flow
from ..solvers import Solution, Solver, errors


@dataclass
class Inverse:
    """An `Inverse` tells what became of one batch.

    data: (B, …). log_prob: (B,) in nats, the log-density of the data, or None under guidance. log_det: (B,), log|det
    dx/dz| in nats, the prior's scale included. sequence: the latents, then the data after each block; empty if not
    asked for. cache_bytes: the size of one block's KV cache. failures: maps a row to the (block, token) at which it
    first was not finite, the token in the block's order. solutions: how each block was solved, by its index. error:
    (B,) fp32 on the CPU, as in `Samples`.
    """

    data: Tensor
    log_prob: Tensor | None
    log_det: Tensor
    sequence: list[Tensor]
    cache_bytes: int
    failures: dict[int, tuple[int, int]]
    solutions: dict[int, Solution]
    error: Tensor


def _advance(progress: Callable[[int], object], samples: int, tokens: int) -> None:
    """Tells `progress` of so many tokens of each of so many samples."""
    progress(samples * tokens)


@torch.no_grad()
def invert(
    flow: Flow,
    engines: Sequence[BlockEngine],
    solvers: Sequence[Solver],
    z: Tensor,
    condition: Condition,
    *,
    progress: Callable[[int], object] | None = None,
    trajectory: bool = False,
) -> Inverse:
    """x = T_1⁻¹ ∘ … ∘ T_K⁻¹ (z √var).

    flow: the model. engines, solvers: one for each block, by its index. z: (B, T, D) in the residual dtype, on the
    engines' device, not mutated. condition: labels and guidance of the batch. progress: a function of n, called when n
    more tokens of the batch are done. trajectory: whether the data after each block are kept.
    """
    B = z.shape[0]
    prior_std = flow.prior_var.to(z.device).sqrt()
    scaled = tokens = host_ops.scaled(z, prior_std)
    sequence = [flow.to_data(z)] if trajectory else []
    log_dets = []
    failures: dict[int, tuple[int, int]] = {}
    solutions: dict[int, Solution] = {}
    state, error = None, None  # error: (B, T), in the data's order of tokens
    for k in reversed(range(len(flow.stages))):
        stage, engine = flow.stages[k], engines[k]
        state = engine.begin(stage.enter(tokens), condition, reuse=state)
        advance = None if progress is None else functools.partial(_advance, progress, B)
        solutions[k] = solvers[k](engine, state, advance)
        first = state.first_nonfinite().tolist()  # this is the block's one synchronisation
        for row in (row for row, token in enumerate(first) if token < stage.shape.tokens):
            failures.setdefault(row, (k, first[row]))
        log_dets.append(state.log_det)
        earlier: Tensor | None = None if error is None else stage.enter_marks(error)
        found = errors(engine, state, solutions[k].shown, earlier, engine.dtype)
        error = None if found is None else stage.leave(found)
        tokens = stage.leave(state.x)
        if trajectory:
            sequence.append(flow.to_data(tokens))
    blocks_log_det = torch.stack(log_dets).sum(0)
    log_prob = None
    if not condition.guidance.active:
        log_prob = host_ops.gaussian_log_prob(scaled, flow.prior_var.to(scaled)) - blocks_log_det
    worst = torch.zeros(B, device="cpu", dtype=torch.float32) if error is None else error.amax(1)
    return Inverse(
        data=flow.to_data(tokens),
        log_prob=log_prob,
        log_det=blocks_log_det + prior_std.log().sum(),
        sequence=sequence,
        cache_bytes=0 if state is None else state.cache_bytes,
        failures=failures,
        solutions=solutions,
        error=worst,
    )


def joined(parts: Sequence[Inverse], device: torch.device, sequence: bool, log_det: bool) -> Any:
    """Returns the batches of a call of `reverse` as its result, on this device."""
    images: Any = torch.cat([part.data for part in parts]).to(device)
    if sequence:
        images = [torch.cat(piece).to(device) for piece in zip(*(part.sequence for part in parts), strict=True)]
    return (images, torch.cat([part.log_det for part in parts]).to(device)) if log_det else images
