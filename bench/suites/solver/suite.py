"""`python -m bench solver`: in how many passes the adaptive solver and the published ones invert each block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from tarflow_fast.backend import choose_backend
from tarflow_fast.engine.backend import Request

from ...common import options, plot
from ...common.record import hardware, short, title
from ...common.suite import Suite
from ...common.table import table
from .cases import BASELINE, BOUND, FINAL, TOLS, Problem, candidates, measure, problems

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
