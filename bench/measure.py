"""One cell of any suite: its contestants are checked against the first of them, then timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import NonFiniteError

from . import limits, record, roofline, timing
from .cells import Cell

TOLERANCE = 2e-4  # fp32, absolute, on values of order 1
Contestants = Mapping[str, Callable[[], Tensor]]
"""Functions that return the same images, by name; the first is the baseline."""


def check(contestants: Contestants, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Run every contestant once, which warms it up, and compare its images with the baseline's.

    Passes if everything is finite and max |ours − theirs| ≤ tolerance. max_error is None where there is no number.
    """
    verdict: dict[str, Any] = {"passed": False, "max_error": None, "tolerance": tolerance, "reason": None}
    wanted: Tensor | None = None
    worst = 0.0
    for name, run in contestants.items():
        try:
            images = run()
        except NonFiniteError as error:
            return {**verdict, "reason": f"{name}: {error}"}
        if not torch.isfinite(images).all():
            return {**verdict, "reason": f"{name}: not finite"}
        wanted = images if wanted is None else wanted
        if images.shape != wanted.shape:
            return {**verdict, "reason": f"{name}: shape {tuple(images.shape)}, not {tuple(wanted.shape)}"}
        worst = max(worst, float((images - wanted).abs().max()))
    if worst > tolerance:
        return {**verdict, "max_error": worst, "reason": f"differs by more than {tolerance:g}"}
    return {**verdict, "passed": True, "max_error": worst}


def measure_cell(
    cell: Cell,
    contestants: Contestants,
    *,
    repeat: int,
    budget: float,
    verdict: Callable[[Contestants], dict[str, Any]] = check,
) -> dict[str, Any]:
    """One entry of a record's "cells", yet to be held to a limit. repeat, budget: see `alternate`."""
    checked = verdict(contestants)
    samples = timing.alternate(contestants, repeat=repeat, budget=budget) if checked["passed"] else None
    return {
        "label": cell.label,
        "sizes": cell.sizes.to_dict(),
        "check": checked,
        "work": cell.work.to_dict(),
        "runs": [] if samples is None else record.runs(samples, cell.work),
    }


def hold_to_limit(entry: dict[str, Any], rates: dict[str, Any]) -> None:
    """Give a cell its "limit", and each of its runs the share of it. rates: of this machine, see `limits.measure`."""
    work = roofline.Work(**entry["work"])
    matrix_rate = rates["matrix_flops_per_second"]
    bandwidth = limits.bandwidth(rates, work.working_set)
    seconds = roofline.limit_seconds(work, matrix_rate, bandwidth)
    by = roofline.limited_by(work, matrix_rate, bandwidth)
    entry["limit"] = {"seconds": seconds, "by": by, "bytes_per_second": bandwidth}
    for run in entry["runs"]:
        run["fraction_of_limit"] = seconds / run["median"]
