"""`python -m bench solver`: in how many passes the adaptive solver and the published ones invert each block."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import Sampler
from tarflow_fast.backend import choose_backend
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.solvers import Solution, adaptive, sequential

from ...common import models, options, plot
from ...common.harness import ADAPTIVE_BOUND as BOUND
from ...common.harness import Case, Rounds, measure_cell, ready
from ...common.record import hardware, short, title
from ...common.suite import Suite
from ...common.table import table
from .baselines import gs_jacobi, jacobi

TOLS, PUBLISHED_THRESHOLD = (1e-2, 1e-3, 1e-4), 0.5
BASELINE, PROMISED = "sequential", f"adaptive {TOLS[1]:g}"
FINAL = 1e-3  # a token is final if it is this near to the sequential one
COLUMNS = (
    "block: {block} | policy: {name} | passes: {passes} | evaluations: {evaluations:.0f} | max error: {error} | "
    "same error: {jacobi_evaluations} | seconds: {median:.4g} | p20-p80: {p20:.3g}-{p80:.3g} | n: {n} | "
    "faster: {faster}"
)
SHOWN = {  # colour and width, from the slowest on
    "all-Jacobi 0.001": ("#e07b1a", 3.2),
    "adaptive 0.0001": ("#1f4f94", 1.6),
    "adaptive 0.001": ("#63aee8", 1.6),
}


def candidates(segments: int, gs_passes: int) -> dict[str, functools.partial[Solution]]:
    """Returns the baseline and then the others, by name, with their settings, which the record has."""
    return {
        BASELINE: functools.partial(sequential),
        **{f"adaptive {tol:g}": functools.partial(adaptive, tol=tol) for tol in TOLS},
        **{f"all-Jacobi {x:g}": functools.partial(jacobi, threshold=x) for x in (PUBLISHED_THRESHOLD, *TOLS)},
        f"GS-Jacobi {segments}x{gs_passes}": functools.partial(gs_jacobi, segments=segments, passes=gs_passes),
    }


@dataclass
class Problem:
    """One block's inverse of one batch. z, wanted: (B, T, D), the input and the sequential result, in its own order."""

    block: int
    engine: BlockEngine
    z: Tensor
    condition: Condition
    wanted: Tensor = field(init=False)
    _reuse: BlockState | None = None

    def __post_init__(self) -> None:
        state = self.begin()
        sequential(self.engine, state)
        self.wanted = state.x

    @property
    def label(self) -> dict[str, Any]:
        return {"block": self.block}

    def begin(self) -> BlockState:
        self._reuse = self.engine.begin(self.z, self.condition, reuse=self._reuse)
        return self._reuse

    def final(self, x: Tensor) -> int:
        """Returns how many tokens, from the first on, are within FINAL of the sequential ones in the worst sample."""
        return int(((x - self.wanted).abs().amax(-1) <= FINAL).cumprod(1).sum(1).min())


def examine(problem: Problem, solve: Any) -> dict[str, Any]:
    """Returns what a run tells beside times and errors. final: of the state before the first pass and after each
    (`Problem.final`). evaluations: for each image."""
    state = problem.begin()
    final = [problem.final(state.x)]
    solution = solve(problem.engine, state, lambda tokens: final.append(problem.final(state.x)))
    return {
        "settings": solve.keywords,
        "passes": solution.passes,
        "evaluations": solution.evaluations / len(state.x),
        "final": final if len(final) == solution.passes + 1 else None,  # engines may report several steps at once
    }


def jacobi_errors(problem: Problem) -> list[float]:
    """Returns the largest error after 1, 2, … T − 1 passes over all tokens."""
    state, errors = problem.begin(), list[float]()

    def note(tokens: int) -> None:
        errors.append(float((state.x - problem.wanted).abs().max().nan_to_num(math.inf)))

    jacobi(problem.engine, state, note, threshold=0.0)
    return errors


def measure(problem: Problem, candidates: Mapping[str, Any], rounds: Rounds) -> dict[str, Any]:
    """Returns one of the record's "cells". A run of adaptive's has "jacobi_evaluations": what all-Jacobi evaluates
    until its error is no larger. Adaptive is held to BOUND · tol, the published ones to nothing but numbers."""

    def solved(solve: Any) -> Tensor:
        state = problem.begin()
        solve(problem.engine, state)
        return state.x

    T = problem.z.shape[1]
    bounds = {name: BOUND * solve.keywords.get("tol", math.inf) for name, solve in candidates.items()}
    runs = ready({name: functools.partial(solved, solve) for name, solve in candidates.items()})
    how: dict[str, Any] = {"exact": problem.wanted, "tolerance": 1.0, "slack": bounds}
    cell = measure_cell(Case(problem.label), runs, rounds, **how)
    for run in cell["runs"]:
        run |= examine(problem, candidates[run["name"]])
    errors = jacobi_errors(problem)
    for run in cell["runs"]:
        if "tol" in run["settings"]:
            passes = next((n for n, error in enumerate(errors, 1) if error <= run["max_error"]), T - 1)
            run["jacobi_evaluations"] = passes * (T - 1)
    return {**cell, "tokens": T}


def _total(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sums of one candidate's runs over all blocks."""
    figures = ("passes", "evaluations", "median", "jacobi_evaluations")
    total = {name: sum(run[name] for run in runs) for name in figures if all(name in run for run in runs)}
    return {"block": "all", "name": runs[0]["name"], **total}


def _model(settings: dict[str, Any]) -> str:
    return f"{settings['model']}, batch {settings['batch']}, guidance {short(settings['guidance'])}"


class SolverSuite(Suite):
    """The adaptive solver against the sequential pass and the published parallel ones, block by block.

    On trained weights, in fp32: how fast guesses converge is a property of training. Every block begins from the
    sequential result of the block before, so that all policies are given the same input. Labels go round the classes
    and "no class".

    \b
    Policies:
      sequential     T - 1 steps; the baseline
      adaptive TOL   ours: parallel passes over the tokens ahead of each sample's frontier
      all-Jacobi τ   passes over all tokens until none of the batch moves by τ: 0.5 is the rule
                     of SeJD (arXiv 2505.24791), the others are for comparison at equal errors
      GS-Jacobi GxP  G windows one after another, P passes each, values held to ±3
                     (arXiv 2505.12849)

    Checked: adaptive is within 20 TOL of the sequential result in every block, and takes no more passes than the
    sequential solver has steps; else the exit code is 1. What fails is not timed.

    \b
    Columns of the table:
      passes, evaluations  dependent steps, and tokens evaluated for each image
      same error           tokens that all-Jacobi evaluates for each image until its error is no larger
    """

    name = "solver"
    baseline = BASELINE
    options = (
        options.option("--model", "path", help=f"{options.MODEL_HELP}.", **options.MODEL),
        options.count("--batch", "Images at once.", default=16),
        options.option("--guidance", type=click.FloatRange(0), default=0.0, help="Scale of classifier-free guidance."),
        *options.ENGINE,
        options.count("--segments", "GS-Jacobi's windows in a block.", default=7),
        options.count("--gs-passes", "GS-Jacobi's passes over each window.", default=5),
        options.THREADS,
        *options.of_every_suite("solver", 30.0),
    )

    def prepare(self) -> None:
        self.model_name, self.model = options.load_model(self.chosen.path, self.device)
        self.backend, _ = choose_backend(self.chosen.backend, Request(self.device))

    def settings(self) -> dict[str, Any]:
        return {"model": self.model_name, "sizes": self.model.config.to_dict(), "backend": self.backend}

    @torch.no_grad()
    def cases(self) -> Iterator[Problem]:
        """Yields the blocks in the order of sampling, each from the sequential result of the one before."""
        chosen, model = self.chosen, self.model
        sampler = Sampler(model, backend=chosen.backend, device=self.device, solver=BASELINE)
        z, y = models.inputs(model.config, chosen.batch, chosen.seed, self.device, none=True)
        x = z * model.var.to(self.device).sqrt()
        for k, stage in reversed(list(enumerate(sampler.flow.stages))):
            problem = Problem(k, sampler.engines[k], stage.enter(x), Condition(y, Guidance(chosen.guidance)))
            yield problem
            x = stage.leave(problem.wanted)

    def measure(self, case: Problem) -> Any:
        return measure(case, candidates(self.chosen.segments, self.chosen.gs_passes), self.rounds)

    def verdicts(self, record: Any) -> list[str]:
        """Returns what is wrong if adaptive took more dependent steps in all than the sequential pass."""
        runs = [run for cell in record["cells"] for run in cell["runs"]]
        passes, steps = (sum(run["passes"] for run in runs if run["name"] == name) for name in (PROMISED, BASELINE))
        return [f"{PROMISED} took {passes} passes, the sequential solver {steps} steps"] if passes > steps else []

    def lines(self, record: Any) -> list[str]:
        """Returns a line for each candidate in each block, and over all blocks."""
        rows, settings, of = [], record["settings"], dict[str, list[Any]]()
        for cell in record["cells"]:
            rows += [{**part, **cell["label"]} for part in (*cell["runs"], *cell.get("left_out", []))]
            for run in cell["runs"]:
                of.setdefault(run["name"], []).append(run)
        rows += [_total(runs) for runs in of.values() if len(runs) == len(record["cells"])]
        head = f"model:   {_model(settings)}, {settings['backend']} backend, {settings['dtype']}"
        return [head, "", *table(COLUMNS, rows, 2), *self.failed(record)]

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each block, in the order of sampling: how many of its tokens are final after so many
        passes. Each is as wide as its slowest candidate takes passes."""
        settings, panels = record["settings"], []
        for cell in record["cells"]:
            T, finals = cell["tokens"], {run["name"]: run["final"] for run in cell["runs"] if run["final"]}
            series = [plot.Series(BASELINE, [0, T - 1], [1, T], {"linestyle": "--", "color": plot.GREY})]
            for name, (colour, width) in ((name, how) for name, how in SHOWN.items() if name in finals):
                how = {"color": colour, "linewidth": width, "marker": "o", "markersize": 2 * width, "clip_on": False}
                series.append(plot.Series(name, range(len(finals[name])), finals[name], how))
            widest = max([1, *(len(each.y) - 1 for each in series[1:])])
            axes = {"xlim": (0, widest), "ylim": (0, T), "xlabel": "passes"}
            axes |= {"xticks": range(0, widest + 1, -(-widest // 6))}
            panels.append(plot.Panel(title(cell["label"]), series=series, axes=axes))
        final = f"final: within {FINAL:g} of the sequential result, as all tokens before it"
        below = f"{_model(settings)}; {hardware(record)}\n{final}; a line that ends below the top has a larger error"
        return plot.draw(panels, 4, (3.1, 3.0), below, ylabel="tokens final, worst sample", sharey=True)


SUITE = SolverSuite()
