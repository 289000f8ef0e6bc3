"""`python -m bench flows`: samples of autoregressive flows, ours beside those of zuko, nflows and normflows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor, nn

from tarflow_fast import accelerate
from tarflow_fast.devices import torch_threads

from ..common import harness, options, plot
from ..common.harness import Case
from ..common.record import hardware
from ..common.roofline import Work
from ..common.suite import Suite
from ..common.table import labelled

TOLERANCE = 1e-3  # fp32, of samples of order 1, and of log q over √D: trained weights amplify rounding
TRANSFORMS, CONTEXT = 5, 8
LEAST = 2**16  # bytes at which the machine's bandwidth is measured, at least
OWN_STEPS = 200  # a library's own inverse takes so many passes at most, else it is left out for its time
DENSITY, OWN = "density, theirs", "sample, theirs"
OURS = "sample with log q, {}"
COLUMNS = (
    "run: {name} | seconds: {median:.4g} | p20-p80: {p20:.4g}-{p80:.4g} | n: {n} | of a density pass: {passes:.2f} | "
    "than theirs: {gain:.0f}x | of limit: {fraction_of_limit:.1%} | error: {error}"
)
STYLES = {DENSITY: (plot.GREY, "s"), OWN: (plot.COLOURS[2], "v"), OURS.format("sequential"): (plot.COLOURS[1], "o")}


def _zuko(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    import zuko

    of = {"maf": zuko.flows.MAF, "nsf": zuko.flows.NSF}[family]
    return of(dims, context, transforms=TRANSFORMS, hidden_features=(hidden, hidden))


def _nflows(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    from nflows import distributions, flows, transforms
    from nflows.transforms import autoregressive

    sizes = {"features": dims, "hidden_features": hidden, "context_features": context or None, "num_blocks": 2}
    of = functools.partial(autoregressive.MaskedAffineAutoregressiveTransform, use_residual_blocks=False)
    if family == "nsf":
        spline = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        of = functools.partial(spline, num_bins=8, tails="linear", tail_bound=5.0)
    steps = [step for _ in range(TRANSFORMS) for step in (transforms.ReversePermutation(dims), of(**sizes))]
    return flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([dims]))


def _normflows(family: str, dims: int, hidden: int, context: int) -> nn.Module:
    import normflows

    splines = [normflows.flows.AutoregressiveRationalQuadraticSpline(dims, 2, hidden) for _ in range(TRANSFORMS)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dims, trainable=False), splines)


LIBRARIES: dict[str, Callable[[str, int, int, int], nn.Module]] = {
    "zuko": _zuko,
    "nflows": _nflows,
    "normflows": _normflows,
}


def sample(library: str, flow: Any, number: int, context: Tensor | None, seed: int) -> Tensor:
    """Returns samples, (number, D), of a library's flow or of its fast counterpart, which takes the same calls."""
    torch.manual_seed(seed)
    if library == "zuko":
        drawn: Tensor = flow(context).sample((number,) if context is None else ())
    elif library == "nflows":
        drawn = flow.sample(number) if context is None else flow.sample(1, context)[:, 0]
    else:
        drawn, _ = flow.sample(number)
    return drawn


def sample_with_log_prob(
    library: str, flow: Any, number: int, context: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns samples of a fast counterpart, (number, D), and their log q, (number,), in nats."""
    torch.manual_seed(seed)
    if library == "zuko":
        drawn = flow(context).rsample_and_log_prob((number,) if context is None else ())
    elif library == "nflows":
        drawn = flow.sample_and_log_prob(number) if context is None else flow.sample_and_log_prob(1, context)
        drawn = drawn if context is None else (drawn[0][:, 0], drawn[1][:, 0])
    else:
        drawn = flow.sample(number)
    return drawn[0], drawn[1]


def log_prob(library: str, flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """Returns log q of points, (B,), in nats, by a library's density pass."""
    if library == "zuko":
        found: Tensor = flow(context).log_prob(x)
    else:
        found = flow.log_prob(x) if context is None else flow.log_prob(x, context)
    return found


def density_of(number: int, dims: int, context: Tensor | None, generator: torch.Generator) -> Tensor:
    """Returns samples, (number, D), of a bent chain: x_i = 0.6 x_{i−1} + 0.5 sin(2 x_{i−1}) + 0.5 u_i, whose first
    value is one of two clusters; the mean of the context moves all of it."""
    x = torch.randn(number, dims, generator=generator)
    x[:, 0] = 0.3 * x[:, 0] + torch.randint(0, 2, (number,), generator=generator) * 2 - 1
    for i in range(1, dims):
        x[:, i] = 0.6 * x[:, i - 1] + 0.5 * torch.sin(2 * x[:, i - 1]) + 0.5 * x[:, i]
    return x if context is None else x + context.mean(1, keepdim=True)


@functools.lru_cache(1)
def trained(library: str, family: str, dims: int, hidden: int, context: bool, steps: int, seed: int) -> nn.Module:
    """Returns a flow that has learnt that density in so many steps of 256 samples."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow = LIBRARIES[library](family, dims, hidden, CONTEXT if context else 0)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(steps):
        c = torch.randn(256, CONTEXT, generator=generator) if context else None
        loss = -log_prob(library, flow, density_of(256, dims, c, generator), c).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    return flow.eval().requires_grad_(False)


class Flows(Suite):
    """Samples of masked autoregressive flows: an inverse with a cache of activations against the libraries' own.

    Flows of five transforms, two hidden layers, trained for some steps on a bent chain. A library inverts a transform
    of D dimensions by D passes; ours evaluates each unit once, and gives log q of the samples in the same pass. All
    draw from the same seed: a cell is timed only if samples are equal within 1e-3, and log q within 1e-3·√D of the
    library's own density pass of these samples, which is the floor that the rest is set against. The machine's limit
    is that of the products with the weights that no mask takes away.

    \b
    Flows:
      zuko maf, zuko nsf, nflows maf, nflows nsf, normflows nsf (its MAF is an inverse one, whose samples are quick)
    """

    name = "flows"
    baseline = DENSITY
    held = True
    options = (
        options.several("--library", "libraries", type=LIBRARIES, default=tuple(LIBRARIES), help="Libraries"),
        options.several("--family", "families", type=("maf", "nsf"), default=("maf", "nsf"), help="Families of flows"),
        options.several("--dims", "dims", type=click.IntRange(2), default=(8, 16, 64, 200), help="Dimensions"),
        options.batches(1, 1000),
        options.several("--solver", "solvers", type=("sequential", "adaptive", "auto"), default=("sequential",),
                        help="Our solvers"),
        options.option("--context", is_flag=True, help=f"Give the flows a context of {CONTEXT} values a sample."),
        options.count("--hidden", "Units of a hidden layer.", default=256),
        options.count("--steps", "Steps of training.", default=50),
        options.EVERY_THREADS,
        *options.of_every_suite("flows", 20.0),
    )  # fmt: skip

    def prepare(self) -> None:
        for library in self.chosen.libraries:
            if find_spec(library) is None:
                raise click.ClickException(f"{library} is not installed; pip install 'tarflow_fast[flows]'")
        if self.chosen.context and "normflows" in self.chosen.libraries:
            raise click.ClickException("--context: the bench has no conditional flow of normflows; give --library")

    def cases(self) -> list[Case]:
        lists = (getattr(self.chosen, name) for name in ("libraries", "families", "dims", "batches", "threads"))
        names = ("library", "family", "dims", "batch", "threads")
        found = [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]
        return [self._case(label) for label in found if (label["library"], label["family"]) != ("normflows", "maf")]

    def _case(self, label: dict[str, Any]) -> Case:
        D, H = label["dims"], self.chosen.hidden
        outputs = D * (2 if label["family"] == "maf" else 23)
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
        chosen, label, seed = self.chosen, case.label, self.chosen.seed
        library, number = label["library"], label["batch"]
        with torch_threads(case.threads):
            with torch.enable_grad():
                which = (library, label["family"], label["dims"], chosen.hidden, chosen.context)
                flow = trained(*which, chosen.steps, seed)
            context = None
            if chosen.context:
                context = torch.randn(number, CONTEXT, generator=torch.Generator().manual_seed(seed))

            def draw(model: Any) -> tuple[Tensor, Tensor]:
                return sample_with_log_prob(library, model, number, context, seed)

            fast = {solver: accelerate(flow, solver=solver, threads=case.threads) for solver in chosen.solvers}
            x, log_q = draw(next(iter(fast.values())))
            scale = label["dims"] ** -0.5

            def density() -> Tensor:
                return x + scale * (log_prob(library, flow, x, context) - log_q)[:, None]

            candidates: dict[str, harness.Candidate] = {DENSITY: lambda: density}
            if label["dims"] <= OWN_STEPS:
                own = functools.partial(sample, library, flow, number, context, seed)
                candidates[OWN] = lambda: own
            for solver, model in fast.items():
                candidates[OURS.format(solver)] = functools.partial(functools.partial, self._samples, draw, model)
            exact = sample(library, flow, number, context, seed) if OWN in candidates else x
            return harness.measure_cell(case, candidates, self.rounds, exact=exact, tolerance=TOLERANCE)

    @staticmethod
    def _samples(draw: Callable[[Any], tuple[Tensor, Tensor]], model: Any) -> Tensor:
        return draw(model)[0]

    def lines(self, record: Any) -> list[str]:
        rows = []
        for cell in record["cells"]:
            times = {run["name"]: run["median"] for run in cell["runs"]}
            for run in cell["runs"]:
                part = {**run, "passes": run["median"] / times[DENSITY]}
                part |= {"gain": times[OWN] / run["median"]} if OWN in times else {}
                rows.append((cell, part))
        return [*labelled(COLUMNS, rows), *self.failed(record)]

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each flow and batch, on one thread if that was measured: seconds against dimensions."""
        panels: dict[str, plot.Panel] = {}
        threads = min((cell["label"]["threads"] for cell in record["cells"]), default=1)
        points: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for cell in record["cells"]:
            label = cell["label"]
            name = f"{label['library']} {label['family'].upper()}, {label['batch']:,} samples"
            panels.setdefault(name, plot.Panel(name, axes={"xscale": "log", "yscale": "log"}))
            for run in cell["runs"] if label["threads"] == threads else []:
                points.setdefault((name, run["name"]), []).append((label["dims"], run["median"]))
        for (name, kind), found in points.items():
            colour, marker = STYLES.get(kind, (plot.COLOURS[4], "x"))
            x, y = zip(*sorted(found), strict=True)
            panels[name].series.append(plot.Series(kind, x, y, {"color": colour, "marker": marker}))
        below = f"{hardware(record)}, torch {record['machine']['torch']}, threads: {threads}; medians"
        return plot.draw(list(panels.values()), 3, (3.4, 2.8), below, ylabel="seconds, over dimensions")


SUITE = Flows()
