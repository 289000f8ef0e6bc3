"""`python -m bench auto`: whether solver="auto" is as fast as the best fixed choice, for a model, dtype and batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import click
import torch
from torch import Tensor

from tarflow_fast import NonFiniteError, Sampler, SolverPlan, TarFlow
from tarflow_fast.backend import choose_backend
from tarflow_fast.engine import Condition
from tarflow_fast.engine.backend import Request
from tarflow_fast.solvers import TOL, Auto, Costs, CostTable, Solver, adaptive, make_solvers, sequential, widths

from ..common import harness, models, options, plot
from ..common.models import DTYPES
from ..common.record import hardware, title, values
from ..common.suite import Suite
from ..common.table import labelled

BASELINE, AUTO, PLANNED, WINDOW = "sequential", "auto", "auto with plan", "a fixed window"
BOUND = 1e-3  # fp32: what the default tol promises of trained weights
BOUND_IMAGES = 16  # the largest difference of one image says little about a dtype
ALLOWED = 1.05  # of the best fixed choice's time
HOPELESS = 2.0  # times the fastest fixed choice: not timed again, and not run if it takes so long at best
QUICK = 0.5  # seconds: a run as short is done whatever is expected, and twice if it looks hopeless, as by a hiccup
MOST_RUNS = 12  # of auto, to settle
RUNS = (
    "run: {name} | passes: {passes} | evaluations: {evaluations:.0f} | seconds: {median:.4g} | "
    "p20-p80: {p20:.3g}-{p80:.3g} | n: {n} | faster: {faster} | max error: {error}"
)
VERDICTS = (
    "best fixed: {best} | auto / best: {median:.3f} | p20-p80: {p20:.3g}-{p80:.3g} | first: {first:.2f} | "
    "runs: {runs} | windows: {windows} | rule: {rule}"
)
LEGEND = """\
passes: dependent steps of all blocks. evaluations: tokens evaluated for each image. faster: than sequential, side by
side; - where a window was too slow to be timed again (n: of its first runs). max error: from the sequential result.
auto / best: time of auto, settled, over that of the best fixed choice, median over the rounds; the rule is at most
{allowed:g}. The best is the fixed choice of the least median, which with few rounds is luck in part, to auto's
disadvantage. first: auto's very first run, set-up included, over sequential's median. runs: until auto settled; + if it
did not. windows: of auto by block, in the order of sampling; 1 is the sequential pass."""
PLAN = "Time auto with a plan of N images too."
STYLES = {
    WINDOW: {"color": "#c8c8c8", "marker": "."},
    BASELINE: {"color": plot.GREY, "marker": "s"},
    AUTO: {"color": plot.COLOURS[1], "marker": "o"},
    PLANNED: {"color": plot.COLOURS[3], "marker": "^"},
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

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        return models.inputs(self.model.config, self.batch, self.seed, self.device, none=True)

    def sampler(self, solver: str) -> Sampler:
        how: dict[str, Any] = {"backend": self.backend, "device": self.device, "dtype": DTYPES[self.dtype]}
        return Sampler(self.model, solver=solver, **how)

    def sequential(self) -> Tensor:
        return self.sampler(BASELINE).reverse(*self.inputs)

    def yardstick(self) -> tuple[Tensor, float]:
        """Returns images of the sequential pass in the problem's dtype, and how far from them others may be: in bf16
        that is by how far that pass is off from fp32."""
        if self.dtype == "float32":
            return self.sequential(), BOUND
        enough = replace(self, batch=max(self.batch, BOUND_IMAGES))
        wanted, exact = enough.sequential(), replace(enough, dtype="float32").sequential()
        allowed = harness.half_tolerance(float((wanted - exact).abs().max()), wanted, DTYPES[self.dtype])
        return wanted[: self.batch], allowed


@dataclass
class Candidate:
    """One way to invert the batch. seconds: of the runs that were checked, without set-up; error: the largest of them.
    reason: why the last run failed, None if it did not. report: the sampler's, of the last run."""

    name: str
    problem: Problem
    sampler: Sampler
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    reason: str | None = None
    report: Any = None

    def other(self, name: str, solvers: Sequence[Solver]) -> Candidate:
        """Returns a candidate with the same engines, so that weights are as warm in the caches for all."""
        return Candidate(name, self.problem, self.sampler.with_solvers(solvers))

    def reverse(self) -> Tensor:
        """Returns the images; this is what is timed."""
        return self.sampler.reverse(*self.problem.inputs)

    def sample(self) -> Tensor:
        """Returns the same images, and keeps the report."""
        n, (_, y) = self.problem.batch, self.problem.inputs
        samples = self.sampler.sample(n, y, seed=self.problem.seed, batch_size=n)
        self.report = samples.report
        return samples.images

    def run(self, wanted: Tensor, allowed: float) -> bool:
        """Runs it once, checked; returns whether it passed."""
        trial = harness.admit(lambda: self.sample, wanted, allowed)
        self.reason = trial.reason
        if trial.error is not None:
            self.error = max(trial.error, self.error or 0.0)
        if self.reason is None:
            self.seconds.append(self.report.seconds - self.report.setup_seconds)
        return self.reason is None

    def windows(self) -> list[int]:
        """Returns the window of each block; 1 is the sequential pass."""
        return [block.window for block in self.report.blocks]

    def settle(self, wanted: Tensor, allowed: float) -> dict[str, Any]:
        """Runs it until two runs in a row have the same windows. Returns what each run took and chose."""
        taken: list[dict[str, Any]] = []
        settled = False
        while not settled and len(taken) < MOST_RUNS and self.run(wanted, allowed):
            run = {"seconds": self.report.seconds, "setup": self.report.setup_seconds, "windows": self.windows()}
            settled = bool(taken) and taken[-1]["windows"] == run["windows"]
            taken.append(run)
        return {"settled": settled, "runs": taken}

    def entry(self, run: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns a run of the record. run: what the rounds say of it; without that, its first runs are listed."""
        blocks = [asdict(block) for block in self.report.blocks]
        passes, evaluations = (sum(block[name] for block in blocks) for name in ("passes", "evaluations"))
        found = {"passes": passes, "evaluations": evaluations / self.problem.batch, "max_error": self.error}
        return {**(run or harness.timed(self.name, self.seconds)), **found, "blocks": blocks}


def costs_of(auto: Candidate) -> tuple[Costs, Costs]:
    """Returns what auto has measured for this batch, and the same measured again: if auto is mistaken, what it is
    compared with must not be chosen by that mistake."""
    (z, y), solver, engine = auto.problem.inputs, cast(Auto, auto.sampler.solvers[0]), auto.sampler.engines[0]
    state = engine.begin(z, Condition(y))
    return solver.costs.of(engine, state), CostTable().of(engine, state)


def try_windows(baseline: Candidate, costs: Costs, wanted: Tensor, allowed: float) -> tuple[list[Candidate], list[Any]]:
    """Returns a candidate for each window, run once, from narrow to wide; and {name, reason} of those that are not run.

    At best a window of so many times the tokens takes as many times fewer passes: what it takes at best follows from
    the last window that was run (the sequential pass, which has passed, is one of 1) and from the costs of a pass.
    """
    tried, not_run = [], []
    sizes, tol = baseline.problem.model.config, TOL[DTYPES[baseline.problem.dtype]]
    fastest = last = min(baseline.seconds)
    each = costs.token  # seconds of a pass for each token of its window, of the last one
    for window in widths(sizes.num_patches):
        name, cost = f"window {window}", costs.of_pass(window) / window
        at_best = last * cost / each
        if at_best > max(HOPELESS * fastest, QUICK):
            times = f"{at_best / fastest:.1f} times as long as the fastest at best"
            not_run.append({"name": name, "reason": f"takes {times}"})
            continue
        candidate = baseline.other(name, [functools.partial(adaptive, tol=tol, window=window)] * sizes.num_blocks)
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


def measure(problem: Problem, rounds: harness.Rounds) -> dict[str, Any]:
    """Returns one of the record's "cells".

    costs: of a token and of passes by width, as auto measured them, and measured again. first: auto's first run over
    sequential's median. verdict: `judge`, None if sequential or auto failed: then nothing is timed. Windows that are
    too slow for the rounds have the seconds of their first runs and no "ratio".
    """
    sizes = problem.model.config
    cell: dict[str, Any] = {"label": problem.label, "backend": problem.backend, "tokens": sizes.num_patches, "runs": []}
    cell |= {"costs": [], "settling": {"settled": False, "runs": []}, "first": None, "verdict": None, "not_run": []}
    try:
        yardstick = problem.yardstick()
    except NonFiniteError as error:  # there is nothing to compare with
        failed = [{"name": BASELINE, "reason": str(error)}]
        return {**cell, "check": harness.check_of(failed), "left_out": failed}
    auto = Candidate(AUTO, problem, problem.sampler("auto"))
    cell |= {"backend": auto.sampler.backend, "settling": auto.settle(*yardstick)}
    costs, again = costs_of(auto)
    cell["costs"] = [{"token": each.token, "passes": list(each.passes.items())} for each in (costs, again)]
    fixed = [auto.other(BASELINE, [sequential] * sizes.num_blocks)]
    if fixed[0].run(*yardstick):
        windows, cell["not_run"] = try_windows(fixed[0], again, *yardstick)
        fixed += windows
    candidates = {each.name: each for each in (*fixed, auto)}
    if problem.plan is not None:
        shapes = [stage.shape for stage in auto.sampler.flow.stages]
        solvers = make_solvers("auto", None, problem.plan, dtype=DTYPES[problem.dtype], shapes=shapes)
        candidates[PLANNED] = auto.other(PLANNED, solvers)
        candidates[PLANNED].settle(*yardstick)
    passed = {name: each for name, each in candidates.items() if each.reason is None}
    runs: dict[str, Any] = {}
    if {BASELINE, AUTO} <= {*passed}:
        first = {each.name: min(each.seconds) for each in fixed if each.reason is None}
        slowest = HOPELESS * min(first.values())
        turns = {name: each.reverse for name, each in passed.items() if first.get(name, 0.0) <= slowest}
        samples = rounds.alternate({BASELINE: fixed[0].reverse, **turns})
        runs = {run["name"]: run for run in harness.runs_of(samples)}
        cell |= {"first": cell["settling"]["runs"][0]["seconds"] / runs[BASELINE]["median"], "verdict": judge(samples)}
    failed = harness.left_out(candidates)
    worst = max((each.error for each in passed.values() if each.error is not None), default=None)
    entries = [each.entry(runs.get(name)) for name, each in passed.items()]
    return {**cell, "check": harness.check_of(failed, worst, yardstick[1]), "left_out": failed, "runs": entries}


def _slower(verdict: Any) -> Any:
    """Returns auto's times over the best fixed choice's, as a spread."""
    return {"median": verdict["slower"], "p20": 1 / verdict["ratio"]["p80"], "p80": 1 / verdict["ratio"]["p20"]}


def _runs(cell: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    for run in cell["runs"]:
        yield cell, {**run, **({} if "ratio" in run or run["name"] == BASELINE else {"faster": "-"})}
    for what, outs in (("not run", cell["not_run"]), ("FAILED", cell["left_out"])):
        yield from ((cell, {"name": out["name"], "error": what}) for out in outs)


def _verdict(cell: Any) -> dict[str, Any]:
    verdict, settling = cell["verdict"], cell["settling"]
    if verdict is None:
        return {"rule": "FAILED"}
    runs = f"{len(settling['runs'])}{'' if settling['settled'] else '+'}"
    windows = " ".join(map(str, reversed(settling["runs"][-1]["windows"])))
    found = {"first": cell["first"], "runs": runs, "windows": windows, "rule": "met" if verdict["met"] else "FAILED"}
    return {"best": verdict["best"], **_slower(verdict), **found}


def _costs(cell: Any) -> Iterator[str]:
    for what, costs in zip(("auto", "again"), cell["costs"], strict=False):
        token = costs["token"]
        passes = ", ".join(f"of {width} {seconds / token:.3g}" for width, seconds in costs["passes"])
        yield f"{values(cell)}, {what}: token {1e3 * token:.3g} ms; passes, in tokens: {passes}"


class AutoSuite(Suite):
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
    is off from fp32 and half a unit. What fails is not timed. A window is run once first; one that took twice as long
    as the fastest fixed choice is not timed again, and one that would take so long at best, by the costs of passes and
    what narrower windows took, is not run, unless that is over at once. The others take turns.

    The rule is met in a cell if the median over the rounds of auto's time / the best fixed choice's is at most 1.05;
    the best is the one of the least median. Else, and where a check fails, the exit code is 1.
    """

    name = "auto"
    baseline = BASELINE
    options = (
        options.several("--model", "paths", help=options.MODEL_HELP, **options.MODEL),
        options.batches(1, 16, 64),
        options.dtypes(),
        *options.ENGINE,
        options.option("--plan", "plan_images", type=click.IntRange(2), metavar="N", help=PLAN),
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
        return {"backend_reasons": self.reasons, "allowed": ALLOWED, "hopeless": HOPELESS}

    def cases(self) -> Iterator[Problem]:
        chosen = self.chosen
        for path in chosen.paths or (None,):
            name, model = options.load_model(path, self.device)
            case = Problem(name, model, "float32", 1, chosen.backend, self.device, chosen.seed)
            if chosen.plan_images is not None:  # learnt from images that no case draws, of every class that there is
                labels = range(model.config.num_classes) or None
                plan = case.sampler(BASELINE).learn_plan(chosen.plan_images, labels, seed=chosen.seed + 1)
                case = replace(case, plan=plan)
            for dtype, batch in itertools.product(chosen.dtypes, chosen.batches):
                yield replace(case, dtype=dtype, batch=batch)

    def measure(self, case: Problem) -> Any:
        return measure(case, self.rounds)

    def verdicts(self, record: Any) -> list[str]:
        """Returns a line for each cell where auto takes longer than it may."""
        missed = [cell for cell in record["cells"] if cell["verdict"] is not None and not cell["verdict"]["met"]]
        told = [(title(cell["label"]), cell["verdict"]["slower"], cell["verdict"]["best"]) for cell in missed]
        return [
            f"{what}: auto takes {times:.3f} times as long as {best}, allowed {ALLOWED}" for what, times, best in told
        ]

    def lines(self, record: Any) -> list[str]:
        """Returns a line for each candidate, and for each cell what auto chose."""
        cells = record["cells"]
        not_run = [f"{values(cell)}, {out['name']}: {out['reason']}" for cell in cells for out in cell["not_run"]]
        return [
            f"backend: {', '.join(dict.fromkeys(cell['backend'] for cell in cells))}",
            "",
            *labelled(RUNS, (row for cell in cells for row in _runs(cell))),
            "",
            *labelled(VERDICTS, ((cell, _verdict(cell)) for cell in cells)),
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
        line where the rule is. Auto's are ratios by round; those of others are of their medians."""
        cells, allowed = record["cells"], record["settings"]["allowed"]
        points: dict[str, list[tuple[int, Any]]] = {name: [] for name in STYLES}
        for position, cell in enumerate(cells):
            medians = {run["name"]: run["median"] for run in cell["runs"]}
            for run, median in medians.items() if cell["verdict"] else ():
                alone = plot.exactly(median / medians[cell["verdict"]["best"]])
                each = _slower(cell["verdict"]) if run == AUTO else alone
                points[run if run in STYLES else WINDOW].append((position, each))
        series = []
        for name, found in points.items():
            series.append(plot.Series(name, [place for place, _ in found], [each for _, each in found], STYLES[name]))
        ends, dashed = (-0.6, len(cells) - 0.4), {"color": plot.RED, "linewidth": 1, "linestyle": "--"}
        series.append(plot.Series(f"allowed, {allowed:g}", ends, (allowed, allowed), dashed))
        failed: list[tuple[float, float]] = [
            (position, 1.0) for position, cell in enumerate(cells) if cell["verdict"] is None
        ]
        labels = (cell["label"] for cell in cells)
        names = [f"{x['model'].removesuffix('.safetensors')}\n{x['dtype']}\nbatch {x['batch']}" for x in labels]
        axes = {"yscale": "log", "xlim": ends, "xticks": range(len(cells)), "xticklabels": names}
        axes |= {"ylabel": "time over the best fixed choice's; line from p20 to p80"}
        size, below = (max(6.9, len(cells) + 0.8), 4.0), f"{hardware(record)}, torch {record['machine']['torch']}"
        return plot.draw([plot.Panel(series=series, failed=failed, level=1, axes=axes)], 1, size, below)


SUITE = AutoSuite()
