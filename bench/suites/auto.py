"""`python -m bench auto`: whether solver="auto" is as fast as the best fixed choice, for a model, dtype and batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import click
from torch import Tensor

from tarflow_fast import NonFiniteError, Sampler, TarFlow
from tarflow_fast.backend import choose_backend
from tarflow_fast.engine.backend import Request
from tarflow_fast.solvers import TOL, adaptive, sequential, widths

from ..common import harness, models, options
from ..common.harness import Case
from ..common.models import DTYPES
from ..common.record import title
from ..common.suite import Suite
from ..common.table import labelled

BASELINE, AUTO = "sequential", "auto"
BOUND = 1e-3  # fp32: what the default tol promises of trained weights
ALLOWED = 1.05  # of the best fixed choice's time
HOPELESS = 2.0  # times the fastest fixed choice: not timed
SETTLE = 4  # runs of auto before it is timed
RUNS = (
    "run: {name} | passes: {passes} | evaluations: {evaluations:.0f} | seconds: {median:.4g} | "
    "p20-p80: {p20:.3g}-{p80:.3g} | n: {n} | faster: {faster} | max error: {error}"
)
VERDICTS = (
    "best fixed: {best} | auto / best: {median:.3f} | p20-p80: {p20:.3g}-{p80:.3g} | first: {first:.2f} | "
    "windows: {windows} | rule: {rule}"
)


def judge(cell: Any) -> dict[str, Any] | None:
    """Returns how auto fares beside the fixed choice of the least median, which is lower by chance too, to auto's
    disadvantage: the spread of its time over that one's, round by round, its first run over sequential's median, and
    its windows; None if sequential or auto was not timed."""
    runs = {run["name"]: run for run in cell["runs"]}
    auto, settling = runs.pop(AUTO, None), cell["settling"]["runs"]
    if auto is None or BASELINE not in runs:
        return None
    best = min(runs.values(), key=lambda run: run["median"])
    windows, first = reversed(settling[-1]["windows"]), settling[0]["seconds"] / runs[BASELINE]["median"]
    found = {**harness.ratio(auto["seconds"], best["seconds"]), "best": best["name"], "first": first}
    return {**found, "windows": " ".join(map(str, windows)), "rule": "met" if found["median"] <= ALLOWED else "FAILED"}


def report_of(sampler: Sampler, batch: int, y: Tensor | None, seed: int) -> Any:
    """Returns how a sampler fared with the latents of all candidates."""
    return sampler.sample(batch, y, seed=seed, batch_size=batch).report


def _runs(cell: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    for run in cell["runs"]:
        yield cell, {**run, **({} if "ratio" in run or run["name"] == BASELINE else {"faster": "-"})}
    for out in (*cell["left_out"], *cell.get("not_run", [])):  # which older records have by themselves
        yield cell, {"name": out["name"], "error": out["reason"]}


class AutoSuite(Suite):
    """solver="auto" against the sequential pass and every fixed window: never more than 5 % slower than the best?

    The whole inverse of one batch, unguided, on trained weights, as how many passes a block takes is a property of
    training. The same latents for all; labels go round the classes and "no class".

    \b
    Candidates:
      sequential  T - 1 steps in every block; the baseline
      window W    the adaptive solver with this window in every block, at the default tol
      auto        after four runs, in which it settles

    Checked: every run is within 1e-3 of the sequential result in fp32; in bf16 it is within twice what the sequential
    result is off from that, and half a unit. What fails is not timed, nor is a window that took twice as long as the
    fastest fixed choice, in both of two runs. The others take turns.

    The rule is met in a cell if the median over the rounds of auto's time / the best fixed choice's is at most 1.05;
    the best is the one of the least median. Else, and where a check fails, the exit code is 1.

    \b
    Columns of the tables:
      passes, evaluations  dependent steps of all blocks, and tokens evaluated for each image
      first                auto's very first run, set-up included, over sequential's median
      windows              of auto by block, in the order of sampling; 1 is the sequential pass
    """

    name = "auto"
    baseline = BASELINE
    panels = ("model", "dtype")
    options = (
        options.several("--model", "paths", help=options.MODEL_HELP, **options.MODEL),
        options.batches(1, 16, 64),
        options.dtypes(),
        *options.ENGINE,
        options.THREADS,
        *options.of_every_suite("auto", 60.0),
    )

    def prepare(self) -> None:
        loaded = [options.load_model(path, self.device) for path in self.chosen.paths or (None,)]
        self.models = dict(loaded)
        if len(self.models) < len(loaded):
            message = "cells are told apart by the files' names, and two of these are the same"
            raise click.BadParameter(message, param_hint="'--model'")
        for dtype in self.chosen.dtypes:
            choose_backend(self.chosen.backend, Request(self.device, DTYPES[dtype]))  # raises where there is none

    def cases(self) -> list[Case]:
        choices = itertools.product(self.models, self.chosen.dtypes, self.chosen.batches)
        return [
            Case({"model": name, "dtype": dtype, "batch": batch}, self.models[name].config, dtype=dtype)
            for name, dtype, batch in choices
        ]

    def sampler(self, model: TarFlow, dtype: str, solver: str) -> Sampler:
        how: dict[str, Any] = {"backend": self.chosen.backend, "device": self.device, "dtype": DTYPES[dtype]}
        return Sampler(model, solver=solver, **how)

    def measure(self, case: Case) -> Any:
        """settling: what auto's runs before it is timed took, and the windows that it chose, by block."""
        model, dtype = self.models[case.label["model"]], DTYPES[case.dtype]
        batch, seed = case.label["batch"], self.chosen.seed
        z, y = models.inputs(case.sizes, batch, seed, self.device, none=True)
        auto = self.sampler(model, case.dtype, AUTO)
        windows = {f"window {w}": functools.partial(adaptive, tol=TOL[dtype], window=w) for w in widths(z.shape[1])}
        # All have the same engines, so that weights are as warm in the caches for all.
        solvers: Any = {BASELINE: sequential, **windows}
        samplers = {name: auto.with_solvers([solver] * len(auto.engines)) for name, solver in solvers.items()}
        more: dict[str, Any] = {"backend": auto.backend, "settling": {"runs": []}}
        try:
            exact = self.sampler(model, "float32", BASELINE).reverse(z, y)
            for _ in range(SETTLE):
                settled = report_of(auto, batch, y, seed)
                run = {"seconds": settled.seconds, "windows": [block.window for block in settled.blocks]}
                more["settling"]["runs"].append(run)
            twice = {name: [report_of(each, batch, y, seed) for _ in range(2)] for name, each in samplers.items()}
        except NonFiniteError as error:  # there is nothing to compare with
            return {**harness.unmeasured(case, harness.check_of(f"{BASELINE}: {error}")), **more}
        times = {name: min(each.seconds - each.setup_seconds for each in reports) for name, reports in twice.items()}
        slower = {name: seconds / min(times.values()) for name, seconds in times.items()}
        hopeless = [name for name in windows if slower[name] > HOPELESS]
        runs = {name: each.reverse for name, each in {**samplers, AUTO: auto}.items() if name not in hopeless}
        candidates = harness.ready({name: functools.partial(run, z, y) for name, run in runs.items()})
        held: dict[str, Any] = {"tolerance": BOUND, "yardstick": None if case.dtype == "float32" else (BASELINE, dtype)}
        cell = harness.measure_cell(case, candidates, self.rounds, exact=exact, **held)
        for run in cell["runs"]:
            blocks = twice.get(run["name"], [settled])[0].blocks
            run["passes"] = sum(block.passes for block in blocks)
            run["evaluations"] = sum(block.evaluations for block in blocks) / batch
        reasons = {name: f"takes {slower[name]:.1f} times as long as the fastest" for name in hopeless}
        cell["left_out"] += [{"name": name, "reason": reason} for name, reason in reasons.items()]
        return {**cell, **more}

    def verdicts(self, record: Any) -> list[str]:
        """Returns a line for each cell where auto takes longer than it may."""
        judged = [(title(cell["label"]), judge(cell)) for cell in record["cells"]]
        return [
            f"{what}: auto takes {found['median']:.3f} times as long as {found['best']}, allowed {ALLOWED}"
            for what, found in judged
            if found is not None and found["rule"] == "FAILED"
        ]

    def lines(self, record: Any) -> list[str]:
        """Returns a line for each candidate, and for each cell what auto chose."""
        cells = record["cells"]
        return [
            f"backend: {', '.join(dict.fromkeys(cell['backend'] for cell in cells))}",
            "",
            *labelled(RUNS, (row for cell in cells for row in _runs(cell))),
            "",
            *labelled(VERDICTS, ((cell, judge(cell) or {"rule": "FAILED"}) for cell in cells)),
            *self.failed(record),
        ]


SUITE = AutoSuite()
