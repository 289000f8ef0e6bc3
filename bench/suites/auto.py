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

from ..common import harness, models, options, plot
from ..common.harness import Case
from ..common.models import DTYPES
from ..common.record import hardware, title
from ..common.suite import Suite
from ..common.table import labelled

BASELINE, AUTO, WINDOW = "sequential", "auto", "a fixed window"
BOUND = 1e-3  # fp32: what the default tol promises of trained weights
BOUND_IMAGES = 16  # the largest difference of one image says little about a dtype
ALLOWED = 1.05  # of the best fixed choice's time
HOPELESS = 2.0  # times the fastest fixed choice: not timed
MOST_RUNS = 12  # of auto, to settle
RUNS = (
    "run: {name} | passes: {passes} | evaluations: {evaluations:.0f} | seconds: {median:.4g} | "
    "p20-p80: {p20:.3g}-{p80:.3g} | n: {n} | faster: {faster} | max error: {error}"
)
VERDICTS = (
    "best fixed: {best} | auto / best: {median:.3f} | p20-p80: {p20:.3g}-{p80:.3g} | first: {first:.2f} | "
    "runs: {runs} | windows: {windows} | rule: {rule}"
)
STYLES = {
    WINDOW: {"color": "#c8c8c8", "marker": "."},
    BASELINE: {"color": plot.GREY, "marker": "s"},
    AUTO: {"color": plot.COLOURS[1], "marker": "o"},
}


def judge(runs: list[Any]) -> dict[str, Any]:
    """Holds auto to the fixed choice of the least median. ratio: best / auto, by round. slower: median auto / best.

    The least of several medians is lower by chance too: that is to auto's disadvantage.
    """
    best = min((run for run in runs if run["name"] != AUTO), key=lambda run: run["median"])
    (auto,) = (run for run in runs if run["name"] == AUTO)
    slower = harness.ratio(auto["seconds"], best["seconds"])["median"]
    ratio = harness.ratio(best["seconds"], auto["seconds"])
    return {"best": best["name"], "ratio": ratio, "slower": slower, "met": slower <= ALLOWED}


def report_of(sampler: Sampler, batch: int, y: Tensor | None, seed: int) -> Any:
    """Returns how a sampler fared with the latents of all candidates."""
    return sampler.sample(batch, y, seed=seed, batch_size=batch).report


def settle(sample: Any) -> dict[str, Any]:
    """Runs auto until two runs in a row have the same windows. Returns what each run took and chose, by block; 1 is the
    sequential pass. sample: returns the report of a run."""
    taken: list[dict[str, Any]] = []
    while len(taken) < MOST_RUNS and (len(taken) < 2 or taken[-1]["windows"] != taken[-2]["windows"]):
        report = sample()
        taken.append({"seconds": report.seconds, "windows": [block.window for block in report.blocks]})
    return {"settled": taken[-1]["windows"] == taken[-2]["windows"], "runs": taken}


def _slower(verdict: Any) -> Any:
    """Returns auto's times over the best fixed choice's, as a spread."""
    return {"median": verdict["slower"], "p20": 1 / verdict["ratio"]["p80"], "p80": 1 / verdict["ratio"]["p20"]}


def _runs(cell: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    for run in cell["runs"]:
        yield cell, {**run, **({} if "ratio" in run or run["name"] == BASELINE else {"faster": "-"})}
    yield from ((cell, {"name": out["name"], "error": out["reason"]}) for out in _left_out(cell))


def _left_out(cell: Any) -> list[Any]:
    return [*cell["left_out"], *cell.get("not_run", [])]  # which older records have by themselves


def _verdict(cell: Any) -> dict[str, Any]:
    verdict, settling = cell["verdict"], cell["settling"]
    if verdict is None:
        return {"rule": "FAILED"}
    runs = f"{len(settling['runs'])}{'' if settling['settled'] else '+'}"
    windows = " ".join(map(str, reversed(settling["runs"][-1]["windows"])))
    found = {"first": cell["first"], "runs": runs, "windows": windows, "rule": "met" if verdict["met"] else "FAILED"}
    return {"best": verdict["best"], **_slower(verdict), **found}


class AutoSuite(Suite):
    """solver="auto" against the sequential pass and every fixed window: never more than 5 % slower than the best?

    On trained weights: how many passes a block takes is a property of training. The whole inverse of one batch,
    unguided, the same latents for all; labels go round the classes and "no class".

    \b
    Candidates:
      sequential  T - 1 steps in every block; the baseline
      window W    the adaptive solver with this window in every block, at the default tol
      auto        once it has settled: two runs in a row with the same choices, of twelve

    Checked: every run is within 1e-3 of the sequential result in fp32, in bf16 within twice what the sequential result
    is off from fp32 and half a unit. What fails is not timed, nor is a window that took twice as long as the fastest
    fixed choice. The others take turns.

    The rule is met in a cell if the median over the rounds of auto's time / the best fixed choice's is at most 1.05;
    the best is the one of the least median. Else, and where a check fails, the exit code is 1.

    \b
    Columns of the tables:
      passes, evaluations  dependent steps of all blocks, and tokens evaluated for each image
      auto / best          auto's time, settled, over that of the best fixed choice
      first                auto's very first run, set-up included, over sequential's median
      runs                 until auto settled; + if it did not
      windows              of auto by block, in the order of sampling; 1 is the sequential pass
    """

    name = "auto"
    baseline = BASELINE
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
        requests = {dtype: Request(self.device, DTYPES[dtype]) for dtype in self.chosen.dtypes}
        self.reasons = {dtype: choose_backend(self.chosen.backend, request)[1] for dtype, request in requests.items()}

    def settings(self) -> dict[str, Any]:
        return {"backend_reasons": self.reasons, "allowed": ALLOWED, "hopeless": HOPELESS}

    def cases(self) -> list[Case]:
        choices = itertools.product(self.models, self.chosen.dtypes, self.chosen.batches)
        return [
            Case({"model": name, "dtype": dtype, "batch": batch}, self.models[name].config, dtype=dtype)
            for name, dtype, batch in choices
        ]

    def sampler(self, model: TarFlow, dtype: str, solver: str) -> Sampler:
        how: dict[str, Any] = {"backend": self.chosen.backend, "device": self.device, "dtype": DTYPES[dtype]}
        return Sampler(model, solver=solver, **how)

    def yardstick(self, case: Case) -> tuple[Tensor, float]:
        """Returns images of the sequential pass in the case's dtype, and how far from them others may be: in bf16 that
        is by how far that pass is off from fp32."""

        def images(batch: int, dtype: str) -> Tensor:
            inputs = models.inputs(case.sizes, batch, self.chosen.seed, self.device, none=True)
            return self.sampler(self.models[case.label["model"]], dtype, BASELINE).reverse(*inputs)

        batch = case.label["batch"]
        if case.dtype == "float32":
            return images(batch, case.dtype), BOUND
        wanted, exact = (images(max(batch, BOUND_IMAGES), dtype) for dtype in (case.dtype, "float32"))
        allowed = harness.half_tolerance(float((wanted - exact).abs().max()), wanted, DTYPES[case.dtype])
        return wanted[:batch], allowed

    def measure(self, case: Case) -> Any:
        """first: auto's first run over sequential's median. verdict: `judge`, None if sequential or auto failed."""
        batch, seed, tol = case.label["batch"], self.chosen.seed, TOL[DTYPES[case.dtype]]
        z, y = models.inputs(case.sizes, batch, seed, self.device, none=True)
        auto = self.sampler(self.models[case.label["model"]], case.dtype, AUTO)
        more: dict[str, Any] = {"backend": auto.backend, "settling": {}, "first": None, "verdict": None}

        def report(sampler: Sampler) -> Any:
            return report_of(sampler, batch, y, seed)

        try:
            wanted, allowed = self.yardstick(case)
            more["settling"] = settle(lambda: report(auto))
            windows = {f"window {w}": functools.partial(adaptive, tol=tol, window=w) for w in widths(z.shape[1])}
            # All have the same engines, so that weights are as warm in the caches for all.
            solvers: Any = {BASELINE: sequential, **windows}
            fixed = {name: auto.with_solvers([solver] * len(auto.engines)) for name, solver in solvers.items()}
            reports = {name: report(sampler) for name, sampler in fixed.items()}
        except NonFiniteError as error:  # there is nothing to compare with
            return {**harness.unmeasured(case, harness.check_of(f"{BASELINE}: {error}")), **more}
        times = {name: each.seconds - each.setup_seconds for name, each in reports.items()}
        slower = {name: seconds / min(times.values()) for name, seconds in times.items()}
        samplers = {name: sampler for name, sampler in fixed.items() if name == BASELINE or slower[name] <= HOPELESS}
        samplers[AUTO], reports[AUTO] = auto, report(auto)
        candidates = harness.ready({name: functools.partial(each.reverse, z, y) for name, each in samplers.items()})
        cell = harness.measure_cell(case, candidates, self.rounds, exact=wanted, tolerance=allowed)
        for run in cell["runs"]:
            blocks = reports[run["name"]].blocks
            run["passes"] = sum(block.passes for block in blocks)
            run["evaluations"] = sum(block.evaluations for block in blocks) / batch
        cell["left_out"] += [
            {"name": name, "reason": f"takes {slower[name]:.1f} times as long as the fastest"}
            for name in fixed
            if name not in samplers
        ]
        if {BASELINE, AUTO} <= {run["name"] for run in cell["runs"]}:
            more["first"] = more["settling"]["runs"][0]["seconds"] / cell["runs"][0]["median"]
            more["verdict"] = judge(cell["runs"])
        return {**cell, **more}

    def verdicts(self, record: Any) -> list[str]:
        """Returns a line for each cell where auto takes longer than it may."""
        told = [(title(cell["label"]), cell["verdict"]) for cell in record["cells"] if cell["verdict"] is not None]
        return [
            f"{what}: auto takes {verdict['slower']:.3f} times as long as {verdict['best']}, allowed {ALLOWED}"
            for what, verdict in told
            if not verdict["met"]
        ]

    def lines(self, record: Any) -> list[str]:
        """Returns a line for each candidate, and for each cell what auto chose."""
        cells = record["cells"]
        return [
            f"backend: {', '.join(dict.fromkeys(cell['backend'] for cell in cells))}",
            "",
            *labelled(RUNS, (row for cell in cells for row in _runs(cell))),
            "",
            *labelled(VERDICTS, ((cell, _verdict(cell)) for cell in cells)),
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
        series = [
            plot.Series(name, [at for at, _ in found], [each for _, each in found], STYLES[name])
            for name, found in points.items()
        ]
        ends, dashed = (-0.6, len(cells) - 0.4), {"color": plot.RED, "linewidth": 1, "linestyle": "--"}
        series.append(plot.Series(f"allowed, {allowed:g}", ends, (allowed, allowed), dashed))
        failed = [(float(position), 1.0) for position, cell in enumerate(cells) if cell["verdict"] is None]
        labels = (cell["label"] for cell in cells)
        names = [f"{x['model'].removesuffix('.safetensors')}\n{x['dtype']}\nbatch {x['batch']}" for x in labels]
        axes = {"yscale": "log", "xlim": ends, "xticks": range(len(cells)), "xticklabels": names}
        axes |= {"ylabel": "time over the best fixed choice's; line from p20 to p80"}
        size, below = (max(6.9, len(cells) + 0.8), 4.0), f"{hardware(record)}, torch {record['machine']['torch']}"
        return plot.draw([plot.Panel(series=series, failed=failed, level=1, axes=axes)], 1, size, below)


SUITE = AutoSuite()
