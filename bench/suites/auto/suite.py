"""`python -m bench auto`: whether solver="auto" is as fast as the best fixed choice, for a model, dtype and batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from tarflow_fast import Sampler, SolverPlan, TarFlow
from tarflow_fast.backend import choose_backend
from tarflow_fast.engine.backend import Request

from ...common import options, plot
from ...common.models import DTYPES
from ...common.record import hardware, title, values
from ...common.suite import Suite
from ...common.table import labelled
from .cases import ALLOWED, AUTO, BASELINE, HOPELESS, PLANNED, Problem, measure

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


def learn_plan(model: TarFlow, backend: str, device: torch.device, images: int | None, seed: int) -> SolverPlan | None:
    """Returns a plan learnt in fp32 from images that no case draws, of every class that there is."""
    if images is None:
        return None
    sampler = Sampler(model, backend=backend, device=device, dtype=torch.float32, solver="sequential")
    return sampler.learn_plan(images, range(model.config.num_classes) or None, seed=seed + 1)


def _distinct(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    if len({path.name for path in paths}) < len(paths):
        raise click.BadParameter("cells are told apart by the files' names, and two of these are the same")
    return paths


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
        options.several("--model", "paths", callback=_distinct, help=options.MODEL_HELP, **options.MODEL),
        options.batches(1, 16, 64),
        options.dtypes(),
        *options.ENGINE,
        options.option("--plan", type=click.IntRange(2), metavar="N", help="Time auto with a plan of N images too."),
        options.THREADS,
        *options.of_every_suite("auto", 60.0),
    )

    def prepare(self) -> None:
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
                spread = dict.fromkeys(("median", "p20", "p80"), run["median"] / best)
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
