"""`python -m bench flows`: samples of autoregressive flows, ours beside those of zuko, nflows, normflows and sbi."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import accelerate
from tarflow_fast.devices import torch_threads

from ...common import harness, options, plot
from ...common.harness import Case
from ...common.record import counted, hardware
from ...common.roofline import Work
from ...common.suite import Suite
from ...common.table import labelled
from .libraries import (
    BINS,
    CONTEXT,
    LIBRARIES,
    TRANSFORMS,
    compiled,
    log_prob,
    sample,
    sample_with_log_prob,
    trained,
)

TOLERANCE = 1e-3  # fp32, of samples of order 1, and of log q over √D: trained weights amplify rounding
LEAST = 2**16  # bytes at which the machine's bandwidth is measured, at least
PART = 500  # samples from which on time is linear in them: what takes long is measured on so many at least
LONGEST = 0.5  # seconds beyond which a candidate is run on a part of the samples
DENSITY, OWN, COMPILED = "density, theirs", "sample, theirs", "{}, compiled"
OURS = "sample, ours, {}"
Run = Callable[[int], tuple[Tensor | None, Tensor | None]]
STYLES = {DENSITY: (plot.GREY, "s"), OWN: (plot.COLOURS[2], "v"), OURS.format("sequential"): (plot.COLOURS[1], "o")}
SUMMARY = "our time, that as a multiple of their density pass's, and how many times faster than their sampling"
COLUMNS = (
    "run: {name} | seconds: {about}{median:.3g} | n: {n} | of density: {floor:.2f} | than theirs: {gain:.3g}x | "
    "of limit: {fraction_of_limit:.1%} | passes: {passes} | error: {error}"
)


class Subject:
    """The flow of a case, with its fast counterparts, and all that is measured of them.

    What is run is a function of the number of samples; it returns samples, or log q, or both.
    """

    def __init__(self, label: dict[str, Any], flow: Any, solvers: tuple[str, ...], context: bool, seed: int):
        self.library, self.flow, self.number, self.seed = label["library"], flow, label["batch"], seed
        self.scale = label["dims"] ** -0.5
        self.passes = 1 if (self.library, label["family"]) == ("sbi", "nsf") else label["dims"]  # that is a coupling
        generator = torch.Generator().manual_seed(seed)
        self.context = torch.randn(self.number, CONTEXT, generator=generator) if context else None
        self.fast = {each: accelerate(flow, solver=each, threads=label["threads"]) for each in solvers}
        self.drawn = functools.lru_cache(2)(functools.partial(self.ours, next(iter(self.fast.values()))))

    def _context(self, number: int) -> Tensor | None:
        return None if self.context is None else self.context[:number]

    def ours(self, fast: Any, number: int) -> tuple[Tensor, Tensor]:
        """Returns samples and their log q by a fast counterpart."""
        return sample_with_log_prob(self.library, fast, number, self._context(number), self.seed)

    def own(self, flow: Any, number: int) -> tuple[Tensor, None]:
        """Returns samples by the library, or of a posterior by its fast counterpart too."""
        return sample(self.library, flow, number, self._context(number), self.seed), None

    def density(self, log_prob: Callable[..., Tensor], number: int) -> tuple[None, Tensor]:
        """Returns log q of our samples by the library's density pass."""
        return None, log_prob(self.library, self.flow, self.drawn(number)[0], self._context(number))

    def error(self, found: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Returns by how much samples, and log q over √D, differ from those of our first solver."""
        x, log_q = found
        expected = self.drawn(len(next(each for each in found if each is not None)))
        parts = [] if x is None else [(x - expected[0]).abs().max()]
        parts += [] if log_q is None else [self.scale * (log_q - expected[1]).abs().max()]
        return torch.stack(parts).max()

    def _part(self, run: Run) -> tuple[int, float]:
        """Returns how many of the samples are run, and the seconds that one of them takes."""
        some = min(self.number, PART)
        run(some)
        seconds = harness.wall(lambda: run(some)) / some
        return min(self.number, max(some, round(LONGEST / seconds))), seconds

    def runs(self, own_seconds: float, with_compiled: bool) -> tuple[dict[str, tuple[Run, int]], dict[str, str]]:
        """Returns the candidates, each with how many samples it is run on, and why others are left out."""
        density: Run = functools.partial(self.density, log_prob)
        part, seconds = self._part(density)
        runs, left_out = {DENSITY: (density, part)}, dict[str, str]()
        longest, some = own_seconds / (self.passes * seconds), min(self.number, PART)  # an inverse is so many passes
        if self.number > 2 * PART:
            left_out[OWN] = f"as with {counted(2 * PART, 'sample')}, time is linear in them"
        elif some <= longest:
            runs[OWN] = functools.partial(self.own, self.flow), self.number if self.number <= longest else some
        else:
            left_out[OWN] = f"{counted(some, 'sample')} would take some {some * self.passes * seconds:.0f} s"
        if with_compiled and self.library != "sbi":
            made: dict[str, Run] = {DENSITY: functools.partial(self.density, torch.compile(log_prob))}
            if OWN in runs:
                made[OWN] = functools.partial(self.own, compiled(self.flow))
            for name, again in made.items():
                try:
                    again(runs[name][1])
                    runs[COMPILED.format(name)] = again, runs[name][1]
                except Exception as error:  # whatever stops the compiler
                    left_out[COMPILED.format(name)] = harness.in_a_line(error)
        for solver, fast in self.fast.items():
            ours: Run = functools.partial(self.own if self.library == "sbi" else self.ours, fast)
            runs[OURS.format(solver)] = ours, self._part(ours)[0]
        return runs, left_out


class Flows(Suite):
    """Samples of masked autoregressive flows: an inverse with a cache of activations against the libraries' own.

    Flows of five transforms, two hidden layers, trained for some steps on a bent chain. A library inverts a transform
    of D dimensions by D passes; ours evaluates each unit once, and gives log q of the samples in the same pass. All
    draw from the same seed: a cell is timed only if samples are equal within 1e-3, and log q within 1e-3·√D of the
    library's own density pass of these samples, which is the floor that the rest is set against. The machine's limit
    is that of the products with the weights that no mask takes away.

    What takes long is measured on a part of the samples, 500 at least, from which on time is linear in them, and
    scaled: ≈ in the table, and the "part" in the record. A library's own samples are left out where they would take
    longer than --own-seconds, by its density pass, and with more than 1,000 samples.

    \b
    Flows:
      maf and nsf of zuko, nflows and normflows (its MAF is an inverse one, reversed here); of sbi the posteriors with
      its maf, its nsf, which is a coupling, and its zuko_nsf, sampled end to end with all that sbi does besides
    """

    name = "flows"
    baseline = DENSITY
    held = True
    options = (
        options.several("--library", "libraries", type=LIBRARIES, default=tuple(LIBRARIES), help="Libraries"),
        options.several("--family", "families", type=("maf", "nsf"), default=("maf", "nsf"), help="Families of flows"),
        options.several("--dims", "dims", type=click.IntRange(2), default=(8, 16, 64, 200, 1000), help="Dimensions"),
        options.batches(1, 1000, 100_000),
        options.several("--solver", "solvers", type=("sequential", "adaptive", "auto"), default=("sequential",),
                        help="Our solvers"),
        options.option("--context", is_flag=True, help=f"Give the flows a context of {CONTEXT} values a sample."),
        options.option("--compile", is_flag=True, help="Add the libraries as torch.compile makes them."),
        options.option("--own-seconds", type=click.FloatRange(0), default=9.0,
                       help="The longest that a library's own sampling may take."),
        options.count("--hidden", "Units of a hidden layer.", default=256),
        options.count("--steps", "Steps of training.", default=30),
        options.EVERY_THREADS,
        *options.of_every_suite("flows", 0.5),
    )  # fmt: skip

    def prepare(self) -> None:
        warnings.filterwarnings("ignore", module=r"sbi|nflows|torch\._(dynamo|inductor)")
        for library in self.chosen.libraries:
            if find_spec(library) is None:
                raise click.ClickException(f"{library} is not installed; pip install 'tarflow_fast[flows]'")

    def cases(self) -> list[Case]:
        lists = [getattr(self.chosen, name) for name in ("dims", "batches", "threads")]
        found = [
            {"library": library, "family": family, "dims": dims, "batch": batch, "threads": threads}
            for library, family in self._flows()
            for dims, batch, threads in itertools.product(*lists)
        ]
        return [self._case(label) for label in found if self._fits(label)]

    def _flows(self) -> Iterator[tuple[str, str]]:
        for library in self.chosen.libraries:
            for family in LIBRARIES[library][1]:
                if family.removeprefix("zuko_") in self.chosen.families:
                    yield library, family

    def _fits(self, label: dict[str, Any]) -> bool:
        """Returns whether a library has such flows: sbi's have a context of their own, and few dimensions."""
        if label["library"] == "sbi":
            return label["dims"] <= 64 and not self.chosen.context
        return not (self.chosen.context and (label["library"], label["family"]) == ("normflows", "maf"))

    def _case(self, label: dict[str, Any]) -> Case:
        D, H = label["dims"], self.chosen.hidden
        outputs = D * (2 if label["family"] == "maf" else 3 * BINS - 1)
        weights = (D * H + H * H + H * outputs) // 2  # what autoregressive masks leave, about
        work = Work(
            flops=2 * TRANSFORMS * weights * label["batch"],
            bytes=4 * TRANSFORMS * weights,
            weight_bytes=max(4 * weights, LEAST),
            working_set=max(4 * weights, LEAST),
        )
        sizes = SimpleNamespace(to_dict=lambda: {"dims": D, "hidden": H, "transforms": TRANSFORMS})
        return Case(label, sizes, work, threads=label["threads"])

    @torch.no_grad()
    def measure(self, case: Case) -> Any:
        chosen, label = self.chosen, case.label
        which = (label["library"], label["family"], label["dims"], chosen.hidden, chosen.context)
        with torch_threads(case.threads):
            flow = trained(*which, chosen.steps, chosen.seed)
            subject = Subject(label, flow, chosen.solvers, chosen.context, chosen.seed)
            runs, left_out = subject.runs(chosen.own_seconds, chosen.compile)
            candidates: Any = {name: lambda run=run: functools.partial(*run) for name, run in runs.items()}
            cell = harness.measure_cell(
                case,
                candidates,
                self.rounds,
                exact=torch.zeros(()),
                tolerance=TOLERANCE,
                view=subject.error,
                once=dict.fromkeys(runs, 0.5),
                parts={name: part / subject.number for name, (_, part) in runs.items() if part < subject.number},
            )
        cell["left_out"] += [{"name": name, "reason": reason} for name, reason in left_out.items()]
        for run in cell["runs"]:
            fast: Any = subject.fast.get(run["name"].removeprefix(OURS.format("")))
            if getattr(fast, "passes", ()):
                run["passes"] = list(fast.passes)
        return cell

    def lines(self, record: Any) -> list[str]:
        rows = []
        for cell in record["cells"]:
            times = {run["name"]: run["median"] for run in cell["runs"]}
            for run in cell["runs"]:
                part = {"about": "≈" if "part" in run else "", **run, "error": f"{run['max_error']:.0e}"}
                part |= {"floor": run["median"] / times[DENSITY]}
                part |= {"gain": times[OWN] / run["median"]} if OWN in times else {}
                part |= {"passes": _range(run["passes"])} if "passes" in run else {}
                rows.append((cell, part))
            rows += [(cell, out) for out in cell["left_out"]]
        return [*labelled(COLUMNS, rows), "", *self._summary(record), *self.failed(record)]

    def _summary(self, record: Any) -> list[str]:
        """Returns tables in Markdown, for each batch and number of threads: flows down, dimensions across."""
        found: dict[tuple[int, int], dict[str, dict[int, str]]] = {}
        ours = OURS.format("sequential")
        for cell in record["cells"]:
            label, times = cell["label"], {run["name"]: run["median"] for run in cell["runs"]}
            if ours in times:
                gain = f", {times[OWN] / times[ours]:.3g}×" if OWN in times else ""
                seconds, about = times[ours], "≈ " * any("part" in run for run in cell["runs"] if run["name"] == ours)
                time = f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
                text = f"{about}{time}, {seconds / times[DENSITY]:.2f}{gain}"
                rows = found.setdefault((label["batch"], label["threads"]), {})
                rows.setdefault(f"{label['library']} {label['family']}", {})[label["dims"]] = text
        lines = []
        for (batch, threads), rows in sorted(found.items()):
            dims = sorted({each for row in rows.values() for each in row})
            lines += [f"{counted(batch, 'sample')}, {counted(threads, 'thread')}: {SUMMARY}", ""]
            lines += [f"| | {' | '.join(f'D = {each}' for each in dims)} |", f"|---|{'---|' * len(dims)}"]
            lines += [f"| {flow} | {' | '.join(row.get(each, '') for each in dims)} |" for flow, row in rows.items()]
            lines.append("")
        return lines

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each flow and batch, on one thread if that was measured: seconds against dimensions."""
        panels: dict[str, plot.Panel] = {}
        threads = min((cell["label"]["threads"] for cell in record["cells"]), default=1)
        points: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for cell in record["cells"]:
            label = cell["label"]
            name = f"{label['library']} {label['family']}, {counted(label['batch'], 'sample')}"
            at = sorted({each["label"]["dims"] for each in record["cells"]})
            axes = {"xscale": "log", "yscale": "log", "xticks": at, "xticklabels": at}
            panels.setdefault(name, plot.Panel(name, axes=axes))
            for run in cell["runs"] if label["threads"] == threads else []:
                points.setdefault((name, run["name"]), []).append((label["dims"], run["median"]))
        others = itertools.cycle(plot.COLOURS[3:])
        styles = dict(STYLES)
        for (name, kind), found in points.items():
            colour, marker = styles.setdefault(kind, (next(others), "x"))
            x, y = zip(*sorted(found), strict=True)
            panels[name].series.append(plot.Series(kind, x, y, {"color": colour, "marker": marker, "markersize": 4}))
        below = f"{hardware(record)}, torch {record['machine']['torch']}, on {counted(threads, 'thread')}; medians; "
        below += "what takes long is scaled from a part of the samples"
        columns = len({cell["label"]["batch"] for cell in record["cells"]}) or 1
        return plot.draw(list(panels.values()), columns, (3.2, 2.1), below, ylabel="seconds, over dimensions")


def _range(passes: list[int]) -> str:
    """Returns the fewest and the most passes that a transform took, "7-12"."""
    return "-".join(map(str, sorted({min(passes), max(passes)})))


SUITE = Flows()
