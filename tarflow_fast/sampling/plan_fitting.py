"""A solver plan is fitted to samples, and its passes are counted on some of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..dtypes import residual_dtype
from ..engine import BlockEngine, Condition
from ..flow import Flow
from ..solvers import SolverPlan, adaptive, widths
from .report import Samples

PACED = 16  # a plan counts the passes of so many images


def fitted_plan(
    flow: Flow, engines: Sequence[BlockEngine], samples: Samples, *, device: torch.device, tol: float
) -> SolverPlan:
    """Returns a plan of samples that were drawn with their trajectory.

    flow, engines: the model, whose blocks have tokens alike, and the engine of each block. device: where these run.
    tol: that of the passes.
    """
    assert samples.trajectory is not None
    tokens = [flow.to_tokens(images) for images in samples.trajectory]
    tokens[0] = tokens[0] * flow.prior_var.sqrt().cpu()
    stages = flow.stages
    pairs = [  # z and x of each block; sampling comes to block 0 last
        (stage.enter(tokens[-2 - k]), stage.enter(tokens[-1 - k])) for k, stage in enumerate(stages)
    ]
    plan = SolverPlan.fit(pairs)
    some = slice(0, min(PACED, samples.report.batch_size))
    condition = Condition(None if samples.labels is None else samples.labels[some].to(device))
    state = None
    for k, (z, _) in enumerate(pairs):
        engine = engines[k]
        z = z[some].to(device, residual_dtype(engine.dtype))
        for i, window in enumerate(widths(stages[k].shape.tokens)):
            state = engine.begin(z, condition, reuse=state)
            guess = functools.partial(plan.guess, k)
            solution = adaptive(engine, state, tol=tol, guess=guess, window=window, least=tol)
            plan.passes[k, i] = max(solution.passes, 1)
            plan.evaluations[k, i] = max(solution.evaluations / z.shape[0], 1)
    return plan
