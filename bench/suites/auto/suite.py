"""`python -m bench auto`: whether solver="auto" is as fast as the best fixed choice, for a model, dtype and batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from tarflow_fast import NonFiniteError, Sampler, SolverPlan, TarFlow
from tarflow_fast.backend import choose_backend
from tarflow_fast.devices import check_device
from tarflow_fast.engine.backend import Request

from ...common import options, plot
from ...common.models import DTYPES
from ...common.record import hardware, title, values
from ...common.suite import Suite
from ...common.table import aligned, row, shown
from . import cases
from .cases import ALLOWED, BASELINE, HOPELESS, Problem

RUNS = {
    "run": "{name}", "passes": "{passes}", "evaluations": "{evaluations:.0f}", "seconds": "{median:.4g}",
    "p20-p80": "{p20:.3g}-{p80:.3g}", "n": "{n}", "faster": "{faster}", "max error": "{max_error:.1e}",
}  # fmt: skip
VERDICTS = ["best fixed", "auto / best", "p20-p80", "first", "runs", "windows", "rule"]
LEGEND = """\
passes: dependent steps of all blocks. evaluations: tokens evaluated for each image. faster: than sequential, side by
side; - where a window was too slow to be timed again (n: of its first runs). max error: from the sequential result.
auto / best: time of auto, settled, over that of the best fixed choice, median over the rounds; the rule is at most
{allowed:g}. The best is the fixed choice of the least median, which with few rounds is luck in part, to auto's
disadvantage. first: auto's very first run, set-up included, over sequential's median. runs: until auto settled; + if it
did not. windows: of auto by block, in the order of sampling; 1 is the sequential pass."""
STYLES = {  # colour and marker; windows are small grey points
    "sequential": (plot.GREY, "s"),
    "auto": (plot.COLOURS[1], "o"),
    "auto with plan": (plot.COLOURS[3], "^"),
}


def learn_plan(model: TarFlow, backend: str, device: torch.device, images: int | None, seed: int) -> SolverPlan | None:
    """A plan learnt in fp32 from images that no case draws, of every class that there is."""
    if images is None:
        return None
    sampler = Sampler(model, backend=backend, device=device, dtype=torch.float32, solver="sequential")
    return sampler.learn_plan(images, range(model.config.num_classes) or None, seed=seed + 1)


def _distinct(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    if len({path.name for path in paths}) < len(paths):
        raise click.BadParameter("cells are told apart by the files' names, and two of these are the same")
    return paths


def _runs(cell: Any) -> Iterator[list[str]]:
    for run in cell["runs"]:
        slow = {"faster": "-"} if "ratio" not in run and run["name"] != BASELINE else {}
        yield [*values(cell), *row(RUNS, {**shown(run), **slow})]
    for what, outs in (("not run", cell["not_run"]), ("FAILED", cell["left_out"])):
        for out in outs:
            yield [*values(cell), *row({**RUNS, "max error": what}, out)]


def _verdict(cell: Any) -> list[str]:
    verdict, settling = cell["verdict"], cell["settling"]
    if verdict is None:
        return [*values(cell), *["-"] * 6, "FAILED"]
    spread = f"{1 / verdict['ratio']['p80']:.3g}-{1 / verdict['ratio']['p20']:.3g}"
    judged = [verdict["best"], f"{verdict['slower']:.3f}", spread, f"{cell['first']:.2f}"]
    runs = f"{len(settling['runs'])}{'' if settling['settled'] else '+'}"
    windows = " ".join(map(str, reversed(settling["runs"][-1]["windows"])))
    return [*values(cell), *judged, runs, windows, "met" if verdict["met"] else "FAILED"]


def _costs(cell: Any) -> Iterator[str]:
    for what, costs in zip(("auto", "again"), cell["costs"], strict=False):
        token = costs["token"]
        passes = ", ".join(f"of {width} {seconds / token:.3g}" for width, seconds in costs["passes"])
        yield f"{', '.join(values(cell))}, {what}: token {1e3 * token:.3g} ms; passes, in tokens: {passes}"


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
        options.several("--model", "paths", callback=_distinct, help=options.MODEL_HELP, **options.MODEL),
        options.batches(1, 16, 64),
        options.dtypes(),
        *options.engine(),
        options.option("--plan", type=click.IntRange(2), metavar="N", help="Time auto with a plan of N images too."),
        options.threads(),
        *options.of_every_suite("auto", 60.0),
    )

    def prepare(self) -> None:
        self.device = check_device(self.chosen.device)
        chosen = {each: (self.chosen.backend, Request(self.device, DTYPES[each])) for each in self.chosen.dtypes}
        self.reasons = {dtype: choose_backend(*how)[1] for dtype, how in chosen.items()}

    def settings(self) -> dict[str, Any]:
        chosen = self.chosen
        found = {"device": self.device.type, "dtype": ", ".join(chosen.dtypes), "backend": chosen.backend}
        found |= {"backend_reasons": self.reasons, "plan_images": chosen.plan}
        return {**found, "allowed": ALLOWED, "hopeless": HOPELESS}

    def cases(self) -> Iterator[Problem]:
        backend, seed = self.chosen.backend, self.chosen.seed
        for path in self.chosen.paths or (None,):
            name, model = options.load_model(path, self.device)
            plan = learn_plan(model, backend, self.device, self.chosen.plan, seed)
            for dtype in self.chosen.dtypes:
                for batch in self.chosen.batches:
                    yield Problem(name, model, dtype, batch, backend, self.device, seed, plan)

    def measure(self, case: Problem) -> Any:
        try:
            return cases.measure(case, self.rounds)
        except NonFiniteError as error:
            return cases.failed(case, f"{BASELINE}: {error}")

    def verdicts(self, record: Any) -> list[str]:
        """A line for each cell where auto takes longer than it may."""
        judged = [(title(cell["label"]), cell["verdict"]) for cell in record["cells"] if cell["verdict"] is not None]
        return [
            f"{label}: auto takes {found['slower']:.3f} times as long as {found['best']}, allowed {ALLOWED}"
            for label, found in judged
            if not found["met"]
        ]

    def lines(self, record: Any) -> list[str]:
        """A line for each candidate, and for each cell what auto chose."""
        cells, failures = record["cells"], record["failures"]
        labels = list(cells[0]["label"])
        runs = [[*labels, *RUNS], *(row for cell in cells for row in _runs(cell))]
        verdicts = [[*labels, *VERDICTS], *map(_verdict, cells)]
        names = [", ".join(values(cell)) for cell in cells]
        not_run = [
            f"{name}, {out['name']}: {out['reason']}"
            for name, cell in zip(names, cells, strict=True)
            for out in cell["not_run"]
        ]
        checks = zip(names, (cell["check"] for cell in cells), strict=True)
        failed = [f"{name}: {check['reason']}" for name, check in checks if not check["passed"]]
        tables = [*aligned(runs, len(labels) + 1), "", *aligned(verdicts, len(labels) + 1), ""]
        tables += LEGEND.format(allowed=record["settings"]["allowed"]).splitlines()
        costs = [
            "",
            "costs, as auto measured them and measured again:",
            *(line for cell in cells for line in _costs(cell)),
        ]
        backends = ", ".join(dict.fromkeys(cell["backend"] for cell in cells))
        not_run = ["", "not run:", *not_run] if not_run else []
        return [
            f"backend: {backends}",
            "",
            *tables,
            *costs,
            *not_run,
            *(f"FAILED {each}" for each in failed + failures),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Each candidate's time over that of the best fixed choice: a column of points for each cell, and a line where
        the rule is. Of auto the median of the rounds' ratios, and a line from p20 to p80; of others their medians."""
        cells, allowed = record["cells"], record["settings"]["allowed"]
        figure = plot.new_figure(max(7.6, 1.0 * len(cells) + 1.5), 5.2)
        axes, handles = figure.subplots(), {}
        for position, cell in enumerate(cells):
            verdict = cell["verdict"]
            if verdict is None:
                axes.annotate(plot.FAILED, (position, 1), ha="center", color=plot.RED)
                continue
            medians = {run["name"]: run["median"] for run in cell["runs"]}
            heights = {name: median / medians[verdict["best"]] for name, median in medians.items()}
            for name, height in (heights | {"auto": verdict["slower"]}).items():
                colour, marker = STYLES.get(name, ("#c8c8c8", "."))
                order = 3 if name in STYLES else 2
                (point,) = axes.plot(position, height, marker, color=colour, zorder=order)
                handles[name if name in STYLES else "a fixed window"] = point
            axes.vlines(position, 1 / verdict["ratio"]["p80"], 1 / verdict["ratio"]["p20"], color=STYLES["auto"][0])
        axes.axhline(1, color=plot.GREY, linewidth=1, zorder=0)
        line = axes.axhline(allowed, color=plot.RED, linewidth=1, linestyle="--", zorder=1)
        handles[f"allowed, {allowed:g}"] = line
        axes.set_yscale("log")
        axes.set_ylabel("time over the best fixed choice's; line from p20 to p80")
        columns = [(name.removesuffix(".safetensors"), dtype, f"batch {n}") for name, dtype, n in map(values, cells)]
        axes.set_xticks(range(len(cells)), map("\n".join, columns), fontsize=7)
        axes.set_xlim(-0.6, len(cells) - 0.4)
        plot.footer(axes, f"{hardware(record)}, torch {record['machine']['torch']}")
        plot.plain(axes)
        plot.legend(figure, handles)
        return figure


SUITE = AutoSuite()
