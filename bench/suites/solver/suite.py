"""`python -m bench solver`: in how many passes the adaptive solver and the published ones invert each block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow
from tarflow_fast.backend import choose_backend
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.solvers import Solution, adaptive, sequential

from ...common import options, plot
from ...common.harness import ADAPTIVE_BOUND as BOUND
from ...common.harness import Rounds, failed_check, runs_of
from ...common.models import labels, latents
from ...common.record import Check, hardware, short, title
from ...common.suite import Suite
from ...common.table import table
from .baselines import gs_jacobi, jacobi

TOLS = (1e-2, 1e-3, 1e-4)
PUBLISHED_THRESHOLD = 0.5
BASELINE = "sequential"
FINAL = 1e-3  # a token is final if it is this near to the sequential one
PROMISED = f"adaptive {TOLS[1]:g}"
COLUMNS = (
    "block: {block} | policy: {name} | passes: {passes} | evaluations: {evaluations:.0f} | gained: {advance:.1f} | "
    "max error: {error} | residual: {residual:.1e} | same error: {jacobi_evaluations} | seconds: {median:.4g} | "
    "p20-p80: {p20:.3g}-{p80:.3g} | n: {n} | faster: {faster}"
)
LEGEND = """\
passes: dependent steps. evaluations: tokens evaluated for each image. gained: tokens by a pass. max error: from the
sequential result of the same input. residual: as the solver states it, max |forward(x) - z|. same error: tokens that
all-Jacobi evaluates for each image until its error is no larger."""
SHOWN = {  # colour and width, from the slowest on
    "all-Jacobi 0.001": ("#e07b1a", 3.2),
    "adaptive 0.0001": ("#1f4f94", 1.6),
    "adaptive 0.001": ("#63aee8", 1.6),
}


@dataclass(frozen=True)
class Candidate:
    """A solver with its settings, as the record has them."""

    name: str
    solver: Callable[..., Solution]
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *how: Any) -> Solution:
        return self.solver(*how, **self.settings)


def candidates(segments: int, gs_passes: int) -> list[Candidate]:
    """Returns the baseline and then the others."""
    return [
        Candidate(BASELINE, sequential),
        *(Candidate(f"adaptive {tol:g}", adaptive, {"tol": tol}) for tol in TOLS),
        *(Candidate(f"all-Jacobi {x:g}", jacobi, {"threshold": x}) for x in (PUBLISHED_THRESHOLD, *TOLS)),
        Candidate(f"GS-Jacobi {segments}x{gs_passes}", gs_jacobi, {"segments": segments, "passes": gs_passes}),
    ]


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

    def solve(self, candidate: Candidate) -> Solution:
        return candidate(self.engine, self.begin(), None)

    def error(self, x: Tensor) -> float | None:
        """Returns max |x − wanted|; None if that is no number."""
        return finite((x - self.wanted).abs().max())

    def final(self, x: Tensor) -> int:
        """Returns how many tokens, from the first on, are within FINAL of the sequential ones in the worst sample."""
        return int(((x - self.wanted).abs().amax(-1) <= FINAL).cumprod(1).sum(1).min())


def finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@torch.no_grad()
def problems(
    model: TarFlow, backend: str, device: torch.device, *, batch: int, guidance: float, seed: int
) -> Iterator[Problem]:
    """Yields the blocks in the order of sampling, each from the sequential result of the one before."""
    sampler = Sampler(model, backend=backend, device=device, solver=BASELINE)
    condition = Condition(labels(model.config, batch, device, none=True), Guidance(guidance))
    x = latents(model.config, batch, seed, device) * model.var.to(device).sqrt()
    for k, stage in reversed(list(enumerate(sampler.flow.stages))):
        problem = Problem(k, sampler.engines[k], stage.enter(x), condition)
        yield problem
        x = stage.leave(problem.wanted)


def examine(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """Returns a run without times.

    final: of the state before the first pass and after each (`Problem.final`). advance: tokens gained by a pass.
    evaluations: for each image. residual: what the solver states; None if it states none.
    """
    state = problem.begin()
    B, T, _ = state.x.shape
    final = [problem.final(state.x)]
    solution = candidate(problem.engine, state, lambda tokens: final.append(problem.final(state.x)))
    return {
        "name": candidate.name,
        "settings": candidate.settings,
        "passes": solution.passes,
        "evaluations": solution.evaluations / B,
        "advance": (T - 1) / solution.passes if solution.passes else 0.0,
        "max_error": problem.error(state.x),
        "residual": finite(solution.residual.max()),
        "final": final if len(final) == solution.passes + 1 else None,  # engines may report several steps at once
        "seconds": [],
    }


@torch.no_grad()
def jacobi_errors(problem: Problem, until: float) -> list[float | None]:
    """Returns the largest error after 1, 2, … passes over all tokens, to the first that is no larger than `until`."""
    state = problem.begin()
    T = state.x.shape[1]
    errors: list[float | None] = []
    while len(errors) < T - 1 and not (errors and errors[-1] is not None and errors[-1] <= until):
        problem.engine.fixed_point(state, 1, T)
        errors.append(problem.error(state.x))
    return errors


def check(runs: Sequence[dict[str, Any]]) -> Check:
    """Holds adaptive's errors to BOUND · tol; the figures are of the run that is nearest to its bound, or beyond."""
    worst: Check = {"passed": True, "max_error": 0.0, "tolerance": math.inf, "reason": None}
    for run in (run for run in runs if "tol" in run["settings"]):
        error, tolerance = run["max_error"], BOUND * run["settings"]["tol"]
        if error is None:
            return {"passed": False, "max_error": None, "tolerance": tolerance, "reason": f"{run['name']}: not finite"}
        if error * worst["tolerance"] >= worst["max_error"] * tolerance:
            why = f"{run['name']}: {error:.1e} from sequential, allowed {tolerance:.1e}" if error > tolerance else None
            worst = {"passed": why is None, "max_error": error, "tolerance": tolerance, "reason": why}
    return worst


def measure(problem: Problem, candidates: Sequence[Candidate], rounds: Rounds) -> dict[str, Any]:
    """Returns one of the record's "cells"; its runs are there if the check failed too, with times if it passed.

    largest: the largest |x| of the sequential result; jacobi_errors: see there. A run of adaptive's has
    "jacobi_evaluations": what all-Jacobi evaluates until its error is no larger.
    """
    T, largest = problem.z.shape[1], finite(problem.wanted.abs().max())
    cell: dict[str, Any] = {"label": problem.label, "tokens": T, "largest": largest, "runs": [], "jacobi_errors": []}
    if largest is None:
        return {**cell, "check": failed_check("sequential: not finite")}
    runs = [examine(problem, candidate) for candidate in candidates]
    cell |= {"runs": runs, "check": check(runs)}
    ours = [run for run in runs if "tol" in run["settings"] and run["max_error"] is not None]
    cell["jacobi_errors"] = jacobi_errors(problem, min((run["max_error"] for run in ours), default=math.inf))
    for run in ours:
        passes = enumerate(cell["jacobi_errors"], 1)
        reached = (n for n, error in passes if error is not None and error <= run["max_error"])
        run["jacobi_evaluations"] = next(reached, T - 1) * (T - 1)
    if cell["check"]["passed"]:
        samples = rounds.alternate({each.name: functools.partial(problem.solve, each) for each in candidates})
        for run, times in zip(runs, runs_of(samples), strict=True):
            run.update(times)
    return cell


def _total(runs: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Returns the sums of one candidate's runs over all blocks, of so many tokens each."""
    total: dict[str, Any] = {"block": "all", "name": runs[0]["name"]}
    for figure in ("passes", "evaluations", "median", "jacobi_evaluations"):
        if all(figure in run for run in runs):
            total[figure] = sum(run[figure] for run in runs)
    return total | ({"advance": len(runs) * (tokens - 1) / total["passes"]} if total["passes"] else {})


def _model(settings: dict[str, Any]) -> str:
    return f"{settings['model']}, batch {settings['batch']}, guidance {short(settings['guidance'])}"


class SolverSuite(Suite[Problem]):
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
    sequential solver has steps. A block that fails is not timed, and the exit code is 1.
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
        self.backend, self.reason = choose_backend(self.chosen.backend, Request(self.device))

    def settings(self) -> dict[str, Any]:
        found = {"model": self.model_name, "sizes": self.model.config.to_dict(), "device": self.device.type}
        found |= {"dtype": "float32", "backend": self.backend, "backend_reason": self.reason}
        found |= {"batch": self.chosen.batch, "guidance": self.chosen.guidance}
        return {**found, "final": FINAL, "bound": BOUND}

    def cases(self) -> Iterator[Problem]:
        sizes = {"batch": self.chosen.batch, "guidance": self.chosen.guidance, "seed": self.chosen.seed}
        return problems(self.model, self.backend, self.device, **sizes)

    def measure(self, case: Problem) -> Any:
        return measure(case, candidates(self.chosen.segments, self.chosen.gs_passes), self.rounds)

    def verdicts(self, record: Any) -> list[str]:
        """Returns what is wrong if adaptive took more dependent steps in all than the sequential pass."""
        runs = [run for cell in record["cells"] for run in cell["runs"]]
        passes, steps = (sum(run["passes"] for run in runs if run["name"] == name) for name in (PROMISED, BASELINE))
        return [f"{PROMISED} took {passes} passes, the sequential solver {steps} steps"] if passes > steps else []

    def lines(self, record: Any) -> list[str]:
        """Returns a line for each candidate in each block, and over all blocks."""
        rows, settings = [], record["settings"]
        solved = [cell for cell in record["cells"] if cell["runs"]]
        for cell in record["cells"]:
            rows += [{"reason": "not finite", **run, **cell["label"]} for run in cell["runs"]]
            rows += [] if cell["check"]["passed"] else [{"name": "FAILED", **cell["label"]}]
        rows += [_total(runs, solved[0]["tokens"]) for runs in zip(*(cell["runs"] for cell in solved), strict=True)]
        sizes = ", ".join(f"{title(cell['label'])} {cell['largest']:.1f}" for cell in solved)
        return [
            f"model:   {_model(settings)}, {settings['backend']} backend, {settings['dtype']}",
            "",
            *table(COLUMNS, rows, 2),
            "",
            *LEGEND.splitlines(),
            f"largest |x| of the sequential results: {sizes}",
            *self.failed(record),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each block, in the order of sampling: how many of its tokens are final after so many
        passes. Each is as wide as its slowest candidate takes passes."""
        cells, settings = record["cells"], record["settings"]
        figure, panels = plot.grid(len(cells), 4, (3.1, 3.0), (0.6, 1.1), sharey=True)
        handles: dict[str, Any] = {}
        for axes, cell in zip(panels, cells, strict=True):
            T, widest = cell["tokens"], 1
            (handles["sequential"],) = axes.plot([0, T - 1], [1, T], "--", color=plot.GREY, linewidth=1.2)
            finals = {run["name"]: run["final"] for run in cell["runs"] if run["final"]}
            for name, (colour, width) in SHOWN.items():
                if name in finals:
                    how = {"color": colour, "linewidth": width, "markersize": 2 * width, "clip_on": False}
                    (handles[name],) = axes.plot(finals[name], marker="o", **how)
                    widest = max(widest, len(finals[name]) - 1)
            axes.set_title(title(cell["label"]), fontsize=11)
            if not cell["check"]["passed"]:
                axes.annotate("check failed", (0.96, 0.06), xycoords="axes fraction", ha="right", color=plot.RED)
            axes.set_xlim(0, widest)
            axes.set_ylim(0, T)
            axes.set_xlabel("passes")
            plot.whole_numbers(axes)
        for axes in panels[::4]:
            axes.set_ylabel("tokens final, worst sample")
        plot.legend(figure, handles)
        final = f"final: within {settings['final']:g} of the sequential result, as all tokens before it"
        below = f"{_model(settings)}; {hardware(record)}\n{final}; a line that ends below the top has a larger error"
        plot.footer(figure, below)
        return figure


SUITE = SolverSuite()
