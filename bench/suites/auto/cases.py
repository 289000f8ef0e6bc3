"""Cases of `bench auto`: a batch with every fixed choice and with auto, checked, then timed side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import NonFiniteError, Sampler, SolverPlan, TarFlow
from tarflow_fast.engine import Condition
from tarflow_fast.sampling.report import BlockReport, Report
from tarflow_fast.solvers import TOL, Auto, Costs, CostTable, Solver, adaptive, make_solvers, sequential, widths

from ...common import harness, models
from ...common.harness import Rounds
from ...common.models import DTYPES

BASELINE, AUTO, PLANNED = "sequential", "auto", "auto with plan"
BOUND = 1e-3  # fp32: what the default tol promises of trained weights
BOUND_IMAGES = 16
ALLOWED = 1.05  # of the best fixed choice's time
HOPELESS = 2.0  # times the fastest fixed choice: not timed again, and not run if it takes so long at best
QUICK = 0.5  # seconds: a run as short is done whatever is expected, and twice if it looks hopeless, as by a hiccup
MOST_RUNS = 12  # of auto, to settle


@dataclass(frozen=True)
class Problem:
    """A batch of a model. Labels go round the classes and "no class"."""

    name: str
    model: TarFlow
    dtype: str
    batch: int
    backend: str
    device: torch.device
    seed: int
    plan: SolverPlan | None = None

    @property
    def label(self) -> dict[str, Any]:
        return {"model": self.name, "dtype": self.dtype, "batch": self.batch}

    @property
    def labels(self) -> list[int] | None:
        classes = self.model.config.num_classes
        return [*range(classes), -1] if classes else None

    @functools.cached_property
    def z(self) -> Tensor:
        return models.latents(self.model.config, self.batch, self.seed, self.device)

    @functools.cached_property
    def y(self) -> Tensor | None:
        return models.labels(self.model.config, self.batch, self.device, none=True)

    def sampler(self, solver: str) -> Sampler:
        how: dict[str, Any] = {"backend": self.backend, "device": self.device, "dtype": DTYPES[self.dtype]}
        return Sampler(self.model, solver=solver, **how)

    def yardstick(self) -> tuple[Tensor, float]:
        """Returns images of the sequential pass in the problem's dtype, and how far from them others may be.

        In bf16 that is by how far that pass is off from fp32. The largest difference of one image says little about a
        dtype: it is taken of BOUND_IMAGES at least.
        """
        if self.dtype == "float32":
            return self._sequential(), BOUND
        enough = replace(self, batch=max(self.batch, BOUND_IMAGES))
        wanted = enough._sequential()
        off = float((wanted - replace(enough, dtype="float32")._sequential()).abs().max())
        return wanted[: self.batch], harness.half_tolerance(off, wanted, DTYPES[self.dtype])

    def _sequential(self) -> Tensor:
        return self.sampler(BASELINE).reverse(self.z, self.y)


@dataclass
class Candidate:
    """One way to invert the batch. seconds: of the runs that were checked, without set-up; error: the largest of them.
    reason: why the last run failed, None if it did not. report: of the last run."""

    name: str
    problem: Problem
    sampler: Sampler
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    reason: str | None = None
    report: Report | None = None

    @classmethod
    def fixed(cls, name: str, auto: Candidate, solvers: Sequence[Solver]) -> Candidate:
        """Returns a candidate with auto's engines, so that weights are as warm in the caches for all."""
        return cls(name, auto.problem, auto.sampler.with_solvers(solvers))

    def reverse(self) -> object:
        """What is timed."""
        return self.sampler.reverse(self.problem.z, self.problem.y)

    def sample(self) -> Tensor:
        """Returns the same images, and keeps the report."""
        n = self.problem.batch
        samples = self.sampler.sample(n, self.problem.labels, seed=self.problem.seed, batch_size=n)
        self.report = samples.report
        return samples.images

    def run(self, wanted: Tensor, allowed: float) -> bool:
        """Runs it once, checked; returns whether it passed."""
        trial = harness.admit(lambda: self.sample, wanted, allowed)
        self.reason = trial.reason
        if trial.error is not None:
            self.error = max(trial.error, self.error or 0.0)
        if self.reason is None and self.report is not None:
            self.seconds.append(self.report.seconds - self.report.setup_seconds)
        return self.reason is None

    @property
    def blocks(self) -> Sequence[BlockReport]:
        return [] if self.report is None else self.report.blocks

    def windows(self) -> list[int]:
        """Returns the window of each block; 1 is the sequential pass."""
        return [block.window for block in self.blocks]

    def entry(self, runs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a run of the record. runs: those of the rounds by name; without one, the first runs are listed."""
        return {
            **runs.get(self.name, harness.timed(self.name, self.seconds)),
            "passes": sum(block.passes for block in self.blocks),
            "evaluations": sum(block.evaluations for block in self.blocks) / self.problem.batch,
            "max_error": self.error,
            "blocks": [asdict(block) for block in self.blocks],
        }


def settle(auto: Candidate, wanted: Tensor, allowed: float) -> dict[str, Any]:
    """Runs a sampler until two runs in a row have the same windows. Returns what each run took and chose."""
    taken: list[dict[str, Any]] = []
    settled = False
    while not settled and len(taken) < MOST_RUNS and auto.run(wanted, allowed):
        assert auto.report is not None
        taken.append({"seconds": auto.report.seconds, "setup": auto.report.setup_seconds, "windows": auto.windows()})
        settled = len(taken) > 1 and taken[-2]["windows"] == taken[-1]["windows"]
    return {"settled": settled, "runs": taken}


def costs_of(auto: Candidate) -> tuple[Costs, Costs]:
    """Returns what auto has measured for this batch, and the same measured again: if auto is mistaken, what it is
    compared with must not be chosen by that mistake."""
    solver, engine = auto.sampler.solvers[0], auto.sampler.engines[0]
    assert isinstance(solver, Auto)
    state = engine.begin(auto.problem.z, Condition(auto.problem.y))
    return solver.costs.of(engine, state), CostTable().of(engine, state)


def try_windows(
    auto: Candidate, baseline: Candidate, costs: Costs, wanted: Tensor, allowed: float
) -> tuple[list[Candidate], list[dict[str, str]]]:
    """Returns a candidate for each window, run once, from narrow to wide; and {name, reason} of those that are not run.

    At best a window of so many times the tokens takes as many times fewer passes. So what it takes at best follows
    from the last window that was run (the sequential pass is one of 1) and from the costs of a pass. None is run if the
    baseline failed.
    """
    tried: list[Candidate] = []
    not_run: list[dict[str, str]] = []
    if baseline.reason is not None:
        return tried, not_run
    model, tol = auto.problem.model.config, TOL[DTYPES[auto.problem.dtype]]
    fastest = last = min(baseline.seconds)
    each = costs.token  # seconds of a pass for each token of its window, of the last one
    for window in widths(model.num_patches):
        name, cost = f"window {window}", costs.of_pass(window) / window
        at_best = last * cost / each
        if at_best > max(HOPELESS * fastest, QUICK):
            times = at_best / fastest
            not_run.append({"name": name, "reason": f"takes {times:.1f} times as long as the fastest at best"})
            continue
        solver = functools.partial(adaptive, tol=tol, window=window)
        candidate = Candidate.fixed(name, auto, [solver] * model.num_blocks)
        tried.append(candidate)
        if candidate.run(wanted, allowed):
            if HOPELESS * fastest < candidate.seconds[0] <= QUICK:
                candidate.run(wanted, allowed)
            last, each = min(candidate.seconds), cost
            fastest = min(fastest, last)
    return tried, not_run


def judge(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Holds auto to the fixed choice of the least median. ratio: best / auto, by round. slower: median auto / best.

    The least of several medians is lower by chance too: that is to auto's disadvantage.
    """
    fixed = [name for name in samples if name not in (AUTO, PLANNED)]
    best = min(fixed, key=lambda name: harness.spread(samples[name])["median"])
    slower = harness.ratio(samples[AUTO], samples[best])["median"]
    ratio = harness.ratio(samples[best], samples[AUTO])
    return {"best": best, "ratio": ratio, "slower": slower, "allowed": ALLOWED, "met": slower <= ALLOWED}


def take_turns(passed: list[Candidate], rounds: Rounds) -> dict[str, list[float]]:
    """Returns the seconds of the candidates that are not hopeless; of none if the baseline or auto failed."""
    if not {BASELINE, AUTO} <= {each.name for each in passed}:
        return {}
    fastest = min(min(each.seconds) for each in passed if each.name not in (AUTO, PLANNED))
    kept = [e for e in passed if e.name in (BASELINE, AUTO, PLANNED) or min(e.seconds) <= HOPELESS * fastest]
    return rounds.alternate({each.name: each.reverse for each in kept})


def measure(problem: Problem, rounds: Rounds) -> dict[str, Any]:
    """Returns one of the record's "cells".

    costs: of a token and of passes by width, as auto measured them, and measured again. first: auto's first run over
    sequential's median. verdict: `judge`, None if sequential or auto failed. Candidates that are too slow for the
    rounds have the seconds of their first runs and no "ratio". If the sequential pass is not finite, there is nothing
    to compare with, and nothing is measured.
    """
    cell = {"label": problem.label, "backend": problem.backend, "tokens": problem.model.config.num_patches, "costs": []}
    cell |= {"settling": {"settled": False, "runs": []}, "first": None, "verdict": None, "not_run": [], "runs": []}
    try:
        wanted, allowed = problem.yardstick()
    except NonFiniteError as error:
        reason = f"{BASELINE}: {error}"
        check = harness.failed_check(reason)
        return {**cell, "check": check, "left_out": [{"name": BASELINE, "reason": reason}]}
    auto = Candidate(AUTO, problem, problem.sampler("auto"))
    settling = settle(auto, wanted, allowed)
    baseline = Candidate.fixed(BASELINE, auto, [sequential] * problem.model.config.num_blocks)
    costs, again = costs_of(auto)
    baseline.run(wanted, allowed)
    windows, cell["not_run"] = try_windows(auto, baseline, again, wanted, allowed)
    candidates = [baseline, *windows, auto]
    if problem.plan is not None:
        shapes = [stage.shape for stage in auto.sampler.flow.stages]
        solvers = make_solvers("auto", None, problem.plan, dtype=DTYPES[problem.dtype], shapes=shapes)
        candidates.append(Candidate.fixed(PLANNED, auto, solvers))
        settle(candidates[-1], wanted, allowed)
    passed = [each for each in candidates if each.reason is None]
    samples = take_turns(passed, rounds)
    runs = {run["name"]: run for run in harness.runs_of(samples)}
    failed = harness.left_out({each.name: each for each in candidates})
    worst = max((each.error for each in passed if each.error is not None), default=None)
    cell |= {"backend": auto.sampler.backend, "check": harness.check_of(failed, worst, allowed), "left_out": failed}
    cell |= {"costs": [{"token": each.token, "passes": list(each.passes.items())} for each in (costs, again)]}
    cell |= {"settling": settling, "runs": [each.entry(runs) for each in passed]}
    if samples:
        cell["first"] = settling["runs"][0]["seconds"] / runs[BASELINE]["median"]
        cell["verdict"] = judge(samples)
    return cell
