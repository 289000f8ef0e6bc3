"""`python -m bench families`: every family of flow, trained for the same time on the same data, and what it is then."""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tarflow_fast import TarFlowWarning
from tarflow_fast.data import DEMONSTRATIONS, FlowData, load_flow_data
from tarflow_fast.evaluation import flow_score
from tarflow_fast.flows import FAMILIES, FamilyFlow
from tarflow_fast.flows.library import LibraryTransform
from tarflow_fast.trainer.family import model_for
from tarflow_fast.trainer.flow_config import FlowConfig

from ..common import harness, options, plot
from ..common.harness import Case
from ..common.limits import RATE, matrix_rate
from ..common.record import Limits, hardware
from ..common.suite import Suite
from ..common.table import table

IMAGES = "images"
DATA = ("moons", "checkerboard", "breast-cancer", IMAGES, "dna", "sphere")
BATCH, IMAGE_BATCH = 256, 64
IMAGE_STEPS = 2000  # of images at most, as a demonstration has a number of epochs
IMAGE_ODE = (("solver", "midpoint"), ("steps", 16))
IMAGE_LR, WARM, CLIP = 1e-3, 100, 1.0
STAGES = 1000  # parts of the time of training, by whose number families that train in stages know where they are
PER = 1000  # samples, whose time is told
COUNTED = 4  # samples, whose operations are counted
GROWTH = 16  # times as many samples are tried next, at most
POINTS, PICTURES, TEXTS = 400, 4, 3  # samples that a record keeps
COLUMNS = (
    "data: {data} | family: {family} | held-out nats: {log_prob:.2f} | ±: {standard_error:.2f} | of: {held_out} | "
    "bits/dim: {bits:.3f} | parameters: {parameters:,} | steps: {steps} | training s: {training:.1f} | "
    "sample s: {drawn} | of limit: {shares[0]:.1%} | passes: {passes[0]} | "
    "density s: {scored} | of limit: {shares[1]:.1%} | passes: {passes[1]} | inverse: {reconstruction:.0e}"
)
FEWER = "* from fewer than {:,} samples, as so many would have taken too long; the record has their count"


@functools.lru_cache(2)
def data_of(name: str, split: str, images: Path | None) -> FlowData:
    """Returns the data of a split by their name, the images from the folder that was given."""
    return load_flow_data(str(images) if name == IMAGES else name, split=split)


def fit(model: FamilyFlow, data: FlowData, most: int, seconds: float, seed: int) -> int:
    """Trains for so many seconds, or `most` steps of Adam where that is sooner; returns the number of steps.

    The learning rate rises for 100 steps, at most a tenth of all, and falls to 0 with the time that is left.
    """
    rate = IMAGE_LR if data.kind == IMAGES else FAMILIES[model.name].lr
    optimizer, random = torch.optim.Adam(model.parameters(), rate), torch.Generator().manual_seed(seed)
    batch = min(IMAGE_BATCH if data.kind == IMAGES else BATCH, len(data))
    step, done, started = 0, 0.0, time.perf_counter()
    model.train()
    while done < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1.0, max((step + 1) / WARM, 10 * done)) * (1 - done)
        x = data.values[torch.randint(len(data), (batch,), generator=random)]
        model.at_step(int(done * STAGES), STAGES)
        optimizer.zero_grad()
        model.loss(x.float() if data.levels else x, generator=random).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
        done = max(step / most, (time.perf_counter() - started) / seconds)
    model.eval()
    return step


def flops_of(run: Callable[[], object], model: FamilyFlow, timed: Any) -> float:
    """Returns the operations of products and convolutions that 1,000 samples or densities take, for a roofline.

    They are those that torch makes in `run`, for `COUNTED` samples and as many evaluations as were timed. A flow of
    zuko's counts one pass of it, as each unit has to be evaluated once in either direction.
    """
    if any(isinstance(module, LibraryTransform) for module in model.modules()):
        x = model.latents(COUNTED).requires_grad_()  # recorded, which the library's own operations are
        return min(counted(lambda: model.forward(x)), counted(lambda: model.inverse(x))) * PER / COUNTED
    found = counted(run)
    return found * PER / COUNTED * (timed["evaluations"] or 1) / (model.evaluations() or 1)


def counted(run: Callable[[], object]) -> int:
    """Returns how many operations of products and convolutions torch makes in a run, two for a multiply-add."""
    with Flops() as counter:
        run()
    return counter.total


class Flops(TorchDispatchMode):
    """Counts by torch's own formulas; torch's `FlopCounterMode` refuses to follow gradients into a module's input."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def pack(samples: Tensor, data: FlowData) -> Any:
    """Returns samples as a record keeps them: tokens as text, others as bytes of float16 or uint8 in base64."""
    if data.kind == "tokens":
        symbols = data.symbols or tuple(map(chr, range(33, 33 + data.vocabulary)))
        return ["".join(symbols[token] for token in row) for row in samples[:TEXTS].tolist()]
    if data.kind == IMAGES:
        kept = samples[:PICTURES].clamp(0, 255).byte().numpy()
        return {"shape": kept.shape, "uint8": base64.b64encode(kept.tobytes()).decode()}
    x = samples[:POINTS]
    if data.kind == "sphere":  # longitude and height keep areas
        x = torch.stack([torch.atan2(x[:, 1], x[:, 0]), x[:, 2]], 1)
    kept = x[:, :2].numpy().astype(np.float16)
    return {"shape": kept.shape, "float16": base64.b64encode(kept.tobytes()).decode()}


def unpack(packed: Any) -> Any:
    """Returns the array that `pack` made a record's samples of."""
    dtype = "uint8" if "uint8" in packed else "float16"
    return np.frombuffer(base64.b64decode(packed[dtype]), dtype).reshape(packed["shape"])


class Families(Suite):
    """Every family of flow on the same data: how well it fits them, and what its samples and densities cost.

    Each is trained with its default options, for the same time on the same machine, by Adam; where the epochs of
    `tarflow-fast train` take less, for those. Then it draws and evaluates 1,000 samples, and is scored on 1,000 that
    were held out; on fewer where that takes longer than twice --budget, or four times for what is held out. So no cell
    takes much longer than its training and ten times --budget. Nats are of log p(x), the higher the better; for images
    and tokens bits/dim say the same, the lower the better. Densities of cnf, flow-matching, rectified and riemannian
    are an ODE's, those of residual (images) and discrete are an estimate and a bound. ODEs of images are solved in 16
    steps of the midpoint method, others to a tolerance.

    \b
    Columns of the table:
      held-out nats, ±   the mean of log p(x) of so many held-out samples, and its standard error
      training s, steps  how long it was trained, and by how many steps
      sample s, passes   the time for 1,000 samples, and the evaluations of the network where that is not one
      density s, passes  the same for log p of 1,000
      of limit           the share of it that the products and convolutions alone would take at the rate of torch's
                         best product on this machine
      inverse            max |inverse(forward(x)) − x|

    A second table has a row for each family, with what it is for, as Markdown. The record of all that is measured by
    default takes some 15 minutes on two cores:

      python -m bench families --images /usr/share/datasets/fashion-mnist
    """

    name = "families"
    options = (
        options.several("--family", "families", type=tuple(FAMILIES), default=tuple(FAMILIES), help="Families"),
        options.several("--data", "data", type=(*DEMONSTRATIONS, IMAGES), default=DATA, help="Data to be learnt"),
        options.option("--images", type=click.Path(exists=True, path_type=Path), metavar="PATH",
                       help="A folder or file of images with a train and a test split, Fashion-MNIST's say; without "
                       "it none are measured.", show_default=False),
        options.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0,
                       help="How long each model is trained."),
        options.option("--image-seconds", type=click.FloatRange(0, min_open=True), default=25.0,
                       help="How long each model of images is trained."),
        options.count("--samples", "Samples that are drawn, evaluated and scored.", default=1000),
        options.THREADS,
        *options.of_every_suite("families", 4.0),
    )  # fmt: skip

    def prepare(self) -> None:
        for name in self.chosen.families:
            FAMILIES[name].load()  # raises where a library is missing

    def settings(self) -> dict[str, Any]:
        images = self.chosen.images
        return {} if images is None else {IMAGES: images.resolve().name}

    def cases(self) -> list[Case]:
        names = [name for name in self.chosen.data if name != IMAGES or self.chosen.images is not None]
        kinds = {name: DEMONSTRATIONS[name].kind if name != IMAGES else IMAGES for name in names}
        pairs = [(data, family) for data in names for family in self.chosen.families]
        return [Case({"data": d, "family": f}) for d, f in pairs if kinds[d] in FAMILIES[f].kinds]

    def limits(self, case: Case) -> Limits:
        return {RATE: matrix_rate()}

    def _hold(self, record: Any, cases: list[Any]) -> None:
        """Gives each run the share of the machine's best rate at which its products and convolutions went."""
        for run in (run for cell in record["cells"] for run in cell["runs"]):
            run["fraction_of_limit"] = run["flops"] / record["limits"][RATE] / run["median"]

    def measure(self, case: Case) -> Any:
        try:
            found, reason = self._measured(case.label["data"], case.label["family"]), None
        except Exception as error:  # one family's failure, NaNs included, must not cost the others their minutes
            found, reason = {"runs": []}, harness.in_a_line(error)
        return {"label": case.label, "check": harness.check_of(reason), **found}

    def _measured(self, name: str, family: str) -> dict[str, Any]:
        chosen, of_images = self.chosen, name == IMAGES
        train, test = (data_of(name, split, chosen.images) for split in ("train", "test"))
        torch.manual_seed(chosen.seed)
        solved = any(field.name == "solver" for field in dataclasses.fields(FAMILIES[family].load().Options))
        given = IMAGE_ODE if of_images and solved else ()
        model = model_for(FlowConfig(family, given), train, 0)
        most = IMAGE_STEPS if of_images else DEMONSTRATIONS[name].epochs * math.ceil(len(train) / BATCH)
        started = time.perf_counter()
        steps = fit(model, train, most, chosen.image_seconds if of_images else chosen.seconds, chosen.seed)
        found = {"steps": steps, "training": time.perf_counter() - started, "options": dict(given)}
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(chosen.seed)
        drawn, sampling = self._timed("sample", model, lambda n: model.sample(n, generator=random))
        sampling["flops"] = flops_of(lambda: model.sample(COUNTED, generator=random), model, sampling)
        x = drawn.repeat(math.ceil(chosen.samples / len(drawn)), *(1 for _ in drawn.shape[1:]))
        _, density = self._timed("density", model, lambda n: model.log_prob(x[:n], generator=random))
        density["flops"] = flops_of(lambda: model.log_prob(x[:COUNTED], generator=random), model, density)
        # A score takes a density and, of some, the inverse there and back.
        afforded = int(4 * chosen.budget_seconds * PER / (3 * density["median"]))
        held_out = test.spread(max(2, min(afforded, chosen.samples)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TarFlowWarning)  # the table has the error of the inverse
            score = flow_score(model, held_out, seed=chosen.seed)
        return {
            **found,
            "log_prob": score.log_prob,
            "standard_error": score.standard_error,
            "held_out": score.samples,
            "bits": score.bits_per_dim,
            "reconstruction": score.reconstruction,
            "figures": score.figures,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "runs": [sampling, density],
            "samples": pack(drawn, train),
        }

    def _timed(self, way: str, model: FamilyFlow, run: Callable[[int], Tensor]) -> tuple[Tensor, Any]:
        """Returns what `run` makes of so many samples, and its seconds for each 1,000 of them.

        One is tried first, and then more, as many as are reckoned to take twice the budget at most.
        """
        wanted, allowed, count = self.chosen.samples, 2 * self.chosen.budget_seconds, 1
        run(1)  # what is made at the first call is not of the time
        made, taken = self._once(run, 1)
        while count < wanted and 2 * taken < allowed:
            count = min(wanted, GROWTH * count, max(count + 1, int(count * allowed / taken)))
            made, taken = self._once(run, count)
        evaluations = model.evaluations()
        again = {way: lambda: run(count)} if count == wanted and taken < allowed else {}
        seconds = self.rounds.share(0.5).alternate(again).get(way, [taken])
        return made, harness.timed(way, [each * PER / count for each in seconds], count=count, evaluations=evaluations)

    def _once(self, run: Callable[[int], Tensor], count: int) -> tuple[Tensor, float]:
        """Returns what `run` makes of so many samples, and the seconds that it takes."""
        made: list[Tensor] = []
        seconds = self.rounds.seconds(lambda: made.append(run(count)))
        return made[0], seconds

    def lines(self, record: Any) -> list[str]:
        parts = [
            {**cell, **cell["label"], **{run["name"]: run for run in cell["runs"]}}
            for cell in record["cells"]
            if cell["runs"]
        ]
        wanted = record["settings"]["samples"]
        for part in parts:
            runs = part["sample"], part["density"]
            part |= dict(zip(("drawn", "scored"), (_seconds(run, wanted) for run in runs), strict=True))
            part["passes"] = [run["evaluations"] or 1 for run in runs]
            part["shares"] = [run.get("fraction_of_limit") for run in runs]
        fewer = [FEWER.format(wanted)] if any("*" in part["drawn"] + part["scored"] for part in parts) else []
        texts = [f"{part['data']}, {part['family']}: {', '.join(part['samples'])}" for part in parts if _is_text(part)]
        return [
            *table(COLUMNS, parts, 2),
            *fewer,
            *([""] if texts else []),
            *texts,
            "",
            *by_family(parts),
            *self.failed(record),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each family and data: samples as points, of tables their first two columns, or images."""
        panels = []
        for cell in record["cells"]:
            if not cell["runs"] or _is_text(cell):
                continue
            panel = plot.Panel(f"{cell['label']['data']}\n{cell['label']['family']}", axes={"xticks": [], "yticks": []})
            samples = unpack(cell["samples"])
            if samples.ndim == 4:
                grid = np.concatenate(
                    [np.concatenate(pair, -1) for pair in np.split(samples, 1 + (len(samples) % 2 == 0))], -2
                )
                panel.image = np.moveaxis(grid, 0, -1).squeeze()
            else:
                style = {"color": plot.COLOURS[1], "marker": ".", "markersize": 2, "linestyle": ""}
                x, y = samples.astype(float).T.tolist()
                panel.series.append(plot.Series("samples", x, y, style))
            panels.append(panel)
        settings = record["settings"]
        seconds = f"{settings['seconds']:g} s of training each, {settings['image_seconds']:g} s of images"
        below = f"{hardware(record)}, torch {record['machine']['torch']}, {seconds}"
        return plot.draw(panels or [plot.Panel()], 8, (1.7, 1.8), below)


def by_family(parts: list[Any]) -> list[str]:
    """Returns a Markdown table with a row for each family: what it is for, how well it fits, and what it costs.

    Fit is in nats, the higher the better, or in bits/dim of images and tokens, the lower the better. Times are for
    1,000 samples and 1,000 densities, of the first data that the family has, and of images.

    parts: cells with their labels and runs by name.
    """
    data = list(dict.fromkeys(part["data"] for part in parts))
    units = {part["data"]: "nats" if part["bits"] is None else "bits/dim" for part in parts}
    head = ["`--flow`", "what for", *(f"{name}, {units[name]}" for name in data)]
    times = ["1,000 samples / densities", *(["of images"] if IMAGES in data else [])]
    rows = [[*head, *times], ["---"] * 2 + ["---:"] * (len(data) + len(times))]
    for family in dict.fromkeys(part["family"] for part in parts):
        of = {part["data"]: part for part in parts if part["family"] == family}
        fits = [_fit(of[name]) if name in of else "" for name in data]
        costs = [f"{part['drawn']} / {part['scored']} s" for part in of.values()]
        costs = [costs[0], costs[-1] if IMAGES in of else ""][: len(times)]
        rows.append([f"`{family}`", FAMILIES[family].purpose, *fits, *costs])
    return [f"| {' | '.join(row)} |" for row in rows]


def _fit(part: Any) -> str:
    return f"{part['log_prob']:.2f}" if part["bits"] is None else f"{part['bits']:.2f}"


def _seconds(run: Any, wanted: int) -> str:
    """Returns the time of a run, marked where it is of fewer samples than were wanted."""
    return f"{run['median']:.3g}{'*' if run['count'] < wanted else ''}"


def _is_text(cell: Any) -> bool:
    return isinstance(cell["samples"], list)


SUITE = Families()
