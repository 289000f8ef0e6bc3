"""`python -m bench auto`: whether solver="auto" is as fast as the best fixed choice, for a model, dtype and batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import NonFiniteError, Sampler, SolverPlan, TarFlow
from tarflow_fast.backend import choose_backend
from tarflow_fast.engine import Condition
from tarflow_fast.engine.backend import Request
from tarflow_fast.sampling.report import BlockReport, Report
from tarflow_fast.solvers import TOL, Auto, Costs, CostTable, Solver, adaptive, make_solvers, sequential, widths

from ..common import harness, models, options, plot
from ..common.harness import Rounds
from ..common.models import DTYPES
from ..common.record import hardware, title, values
from ..common.suite import Suite
from ..common.table import labelled

BASELINE, AUTO, PLANNED = "sequential", "auto", "auto with plan"
BOUND = 1e-3  # fp32: what the default tol promises of trained weights
BOUND_IMAGES = 16
ALLOWED = 1.05  # of the best fixed choice's time
HOPELESS = 2.0  # times the fastest fixed choice: not timed again, and not run if it takes so long at best
QUICK = 0.5  # seconds: a run as short is done whatever is expected, and twice if it looks hopeless, as by a hiccup
MOST_RUNS = 12  # of auto, to settle
RUNS = (
    "run: {name} | passes: {passes} | evaluations: {evaluations:.0f} | seconds: {median:.4g} | "
    "p20-p80: {p20:.3g}-{p80:.3g} | n: {n} | faster: {faster} | max error: {error}"
)
VERDICTS = (
    "best fixed: {best} | auto / best: {slower:.3f} | p20-p80: {low:.3g}-{high:.3g} | first: {first:.2f} | "
    "runs: {runs} | windows: {windows} | rule: {rule}"
)
LEGEND = """\
passes: dependent steps of all blocks. evaluations: tokens evaluated for each image. faster: than sequential, side by
side; - where a window was too slow to be timed again (n: of its first runs). max error: from the sequential result.
auto / best: time of auto, settled, over that of the best fixed choice, median over the rounds; the rule is at most
{allowed:g}. The best is the fixed choice of the least median, which with few rounds is luck in part, to auto's
disadvantage. first: auto's very first run, set-up included, over sequential's median. runs: until auto settled; + if it
did not. windows: of auto by block, in the order of sampling; 1 is the sequential pass."""
STYLES = {  # colour and marker; windows are small grey points
    BASELINE: (plot.GREY, "s"),
    AUTO: (plot.COLOURS[1], "o"),
    PLANNED: (plot.COLOURS[3], "^"),
}


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


def take_turns(passed: Mapping[str, Candidate], rounds: Rounds) -> dict[str, list[float]]:
    """Returns the seconds of the candidates that are not hopeless; of none if the baseline or auto failed."""
    if not {BASELINE, AUTO} <= {*passed}:
        return {}
    first = {name: min(each.seconds) for name, each in passed.items() if name not in (AUTO, PLANNED)}
    hopeless = {name for name in first if name != BASELINE and first[name] > HOPELESS * min(first.values())}
    return rounds.alternate({name: each.reverse for name, each in passed.items() if name not in hopeless})


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
    candidates = {each.name: each for each in (baseline, *windows, auto)}
    if problem.plan is not None:
        shapes = [stage.shape for stage in auto.sampler.flow.stages]
        solvers = make_solvers("auto", None, problem.plan, dtype=DTYPES[problem.dtype], shapes=shapes)
        candidates[PLANNED] = Candidate.fixed(PLANNED, auto, solvers)
        settle(candidates[PLANNED], wanted, allowed)
    passed = {name: each for name, each in candidates.items() if each.reason is None}
    samples = take_turns(passed, rounds)
    runs = {run["name"]: run for run in harness.runs_of(samples)}
    failed = harness.left_out(candidates)
    worst = max((each.error for each in passed.values() if each.error is not None), default=None)
    cell |= {"backend": auto.sampler.backend, "check": harness.check_of(failed, worst, allowed), "left_out": failed}
    cell |= {"costs": [{"token": each.token, "passes": list(each.passes.items())} for each in (costs, again)]}
    cell |= {"settling": settling, "runs": [each.entry(runs) for each in passed.values()]}
    if samples:
        cell["first"] = settling["runs"][0]["seconds"] / runs[BASELINE]["median"]
        cell["verdict"] = judge(samples)
    return cell


def _runs(cell: Any) -> Iterator[dict[str, Any]]:
    for run in cell["runs"]:
        yield {**run, **({} if "ratio" in run or run["name"] == BASELINE else {"faster": "-"})}
    for what, outs in (("not run", cell["not_run"]), ("FAILED", cell["left_out"])):
        yield from ({"name": out["name"], "error": what} for out in outs)


def _verdict(cell: Any) -> dict[str, Any]:
    verdict, settling = cell["verdict"], cell["settling"]
    if verdict is None:
        return {"rule": "FAILED"}
    return {
        **verdict,
        "low": 1 / verdict["ratio"]["p80"],
        "high": 1 / verdict["ratio"]["p20"],
        "first": cell["first"],
        "runs": f"{len(settling['runs'])}{'' if settling['settled'] else '+'}",
        "windows": " ".join(map(str, reversed(settling["runs"][-1]["windows"]))),
        "rule": "met" if verdict["met"] else "FAILED",
    }


def _costs(cell: Any) -> Iterator[str]:
    for what, costs in zip(("auto", "again"), cell["costs"], strict=False):
        token = costs["token"]
        passes = ", ".join(f"of {width} {seconds / token:.3g}" for width, seconds in costs["passes"])
        yield f"{values(cell)}, {what}: token {1e3 * token:.3g} ms; passes, in tokens: {passes}"


class AutoSuite(Suite[Problem]):
    """solver="auto" against the sequential pass and every fixed window: never more than 5 % slower than the best?

    On trained weights: how many passes a block takes is a property of training. The whole inverse of one batch,
    unguided, the same latents for all; labels go round the classes and "no class".

    \b
    Candidates:
      sequential      T - 1 steps in every block; the baseline
      window W        the adaptive solver with this window in every block, at the default tol
      auto            once it has settled: two runs in a row with the same choices, of twelve
      auto with plan  the same, with a plan learnt beforehand (--plan); not judged

    Checked: every run is within 1e-3 of the sequential result in fp32, in bf16 within twice what the sequential result
    is off from fp32 and half a unit. A candidate that fails is not timed. A window is run once first; one that took
    twice as long as the fastest fixed choice is not timed again, and one that would take so long at best, by the costs
    of passes and what narrower windows took, is not run, unless that is over at once. The others take turns.

    The rule is met in a cell if the median over the rounds of auto's time / the best fixed choice's is at most 1.05.
    The best is the one of the least median; with few rounds some of that is luck, to auto's disadvantage. Where a check
    fails or the rule is not met, the record is written all the same and the exit code is 1.
    """

    name = "auto"
    baseline = BASELINE
    options = (
        options.several("--model", "paths", help=options.MODEL_HELP, **options.MODEL),
        options.batches(1, 16, 64),
        options.dtypes(),
        *options.ENGINE,
        options.option("--plan", type=click.IntRange(2), metavar="N", help="Time auto with a plan of N images too."),
        options.THREADS,
        *options.of_every_suite("auto", 60.0),
    )

    def prepare(self) -> None:
        if len({path.name for path in self.chosen.paths}) < len(self.chosen.paths):
            message = "cells are told apart by the files' names, and two of these are the same"
            raise click.BadParameter(message, param_hint="'--model'")
        requests = {dtype: Request(self.device, DTYPES[dtype]) for dtype in self.chosen.dtypes}
        self.reasons = {dtype: choose_backend(self.chosen.backend, request)[1] for dtype, request in requests.items()}

    def settings(self) -> dict[str, Any]:
        chosen = self.chosen
        found = {"device": self.device.type, "dtype": ", ".join(chosen.dtypes), "backend": chosen.backend}
        found |= {"backend_reasons": self.reasons, "plan_images": chosen.plan}
        return {**found, "allowed": ALLOWED, "hopeless": HOPELESS}

    def cases(self) -> Iterator[Problem]:
        chosen = self.chosen
        for path in chosen.paths or (None,):
            name, model = options.load_model(path, self.device)
            case = Problem(name, model, "float32", 1, chosen.backend, self.device, chosen.seed)
            if chosen.plan is not None:  # learnt from images that no case draws, of every class that there is
                labels = range(model.config.num_classes) or None
                plan = case.sampler(BASELINE).learn_plan(chosen.plan, labels, seed=chosen.seed + 1)
                case = replace(case, plan=plan)
            for dtype, batch in itertools.product(chosen.dtypes, chosen.batches):
                yield replace(case, dtype=dtype, batch=batch)

    def measure(self, case: Problem) -> Any:
        return measure(case, self.rounds)

    def verdicts(self, record: Any) -> list[str]:
        """Returns a line for each cell where auto takes longer than it may."""
        judged = [(title(cell["label"]), cell["verdict"]) for cell in record["cells"] if cell["verdict"] is not None]
        return [
            f"{label}: auto takes {found['slower']:.3f} times as long as {found['best']}, allowed {ALLOWED}"
            for label, found in judged
            if not found["met"]
        ]

    def lines(self, record: Any) -> list[str]:
        """Returns a line for each candidate, and for each cell what auto chose."""
        cells = record["cells"]
        not_run = [f"{values(cell)}, {out['name']}: {out['reason']}" for cell in cells for out in cell["not_run"]]
        return [
            f"backend: {', '.join(dict.fromkeys(cell['backend'] for cell in cells))}",
            "",
            *labelled(RUNS, [(cell, part) for cell in cells for part in _runs(cell)]),
            "",
            *labelled(VERDICTS, [(cell, _verdict(cell)) for cell in cells]),
            "",
            *LEGEND.format(allowed=record["settings"]["allowed"]).splitlines(),
            "",
            "costs, as auto measured them and measured again:",
            *(line for cell in cells for line in _costs(cell)),
            *(["", "not run:", *not_run] if not_run else []),
            *self.failed(record),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Returns each candidate's time over that of the best fixed choice: a column of points for each cell, and a
        line where the rule is. Of auto the median of the rounds' ratios, and a line from p20 to p80; of others their
        medians."""
        cells, allowed = record["cells"], record["settings"]["allowed"]
        figure, (axes,) = plot.grid(1, 1, (max(7.6, 1.0 * len(cells) + 1.5), 5.2), (0, 0))
        handles: dict[str, Any] = {}
        for position, cell in enumerate(cells):
            verdict = cell["verdict"]
            if verdict is None:
                plot.say_failed(axes, position, 1)
                continue
            best = next(run["median"] for run in cell["runs"] if run["name"] == verdict["best"])
            for run in cell["runs"]:
                colour, marker = STYLES.get(run["name"], ("#c8c8c8", "."))
                spread: Any = dict.fromkeys(("median", "p20", "p80"), run["median"] / best)
                if run["name"] == AUTO:
                    spread = {"median": verdict["slower"], **{p: 1 / verdict["ratio"][p] for p in ("p20", "p80")}}
                name = run["name"] if run["name"] in STYLES else "a fixed window"
                handles[name] = plot.point(axes, position, spread, colour, marker)
        axes.axhline(1, color=plot.GREY, linewidth=1, zorder=0)
        line = axes.axhline(allowed, color=plot.RED, linewidth=1, linestyle="--", zorder=1)
        handles[f"allowed, {allowed:g}"] = line
        axes.set_yscale("log")
        axes.set_ylabel("time over the best fixed choice's; line from p20 to p80")
        labels = (cell["label"] for cell in cells)
        columns = [f"{x['model'].removesuffix('.safetensors')}\n{x['dtype']}\nbatch {x['batch']}" for x in labels]
        axes.set_xticks(range(len(cells)), columns, fontsize=7)
        axes.set_xlim(-0.6, len(cells) - 0.4)
        plot.footer(axes, f"{hardware(record)}, torch {record['machine']['torch']}")
        plot.legend(figure, handles)
        return figure


SUITE = AutoSuite()
