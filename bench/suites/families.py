"""`python -m bench families`: every family of flow, trained for the same time on the same data, and what it is then."""

from __future__ import annotations

import base64
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

from tarflow_fast import TarFlowWarning
from tarflow_fast.data import DEMONSTRATIONS, FlowData, load_flow_data
from tarflow_fast.evaluation import flow_score
from tarflow_fast.flows import FAMILIES, FamilyFlow
from tarflow_fast.trainer.family import model_for
from tarflow_fast.trainer.flow_config import FlowConfig

from ..common import harness, options, plot
from ..common.harness import Case
from ..common.record import hardware
from ..common.suite import Suite
from ..common.table import table

IMAGES = "images"
DATA = ("moons", "checkerboard", "breast-cancer", IMAGES, "dna", "sphere")
BATCH, IMAGE_BATCH = 256, 64
IMAGE_STEPS = 2000  # of images at most, as a demonstration has a number of epochs
IMAGE_LR, WARM, CLIP = 1e-3, 100, 1.0
PER = 1000  # samples, whose time is told
TRIAL = 8  # steps by which the time of the rest is reckoned, the first two apart
POINTS, PICTURES, TEXTS = 400, 4, 3  # samples that a record keeps
COLUMNS = (
    "data: {data} | family: {family} | held-out nats: {log_prob:.2f} | ±: {standard_error:.2f} | "
    "bits/dim: {bits:.3f} | parameters: {parameters:,} | steps: {steps} | training s: {training:.1f} | "
    "sample s: {sample[median]:.3g} | passes: {sample[evaluations]} | density s: {density[median]:.3g} | "
    "passes: {density[evaluations]} | inverse: {reconstruction:.0e}"
)


@functools.lru_cache(2)
def data_of(name: str, split: str, images: Path | None) -> FlowData:
    """Returns the data of a split by their name, the images from the folder that was given."""
    return load_flow_data(str(images) if name == IMAGES else name, split=split)


def fit(model: FamilyFlow, data: FlowData, most: int, seconds: float, seed: int) -> int:
    """Trains for so many seconds, or `most` steps of Adam where that is sooner; returns the number of steps.

    The learning rate rises for 100 steps, at most a tenth of all, and falls to 0 in a straight line.
    """
    rate = IMAGE_LR if data.kind == IMAGES else FAMILIES[model.name].lr
    optimizer, random = torch.optim.Adam(model.parameters(), rate), torch.Generator().manual_seed(seed)
    batch = min(IMAGE_BATCH if data.kind == IMAGES else BATCH, len(data))
    step, steps, started = 0, most, 0.0
    model.train()
    while step < steps:
        if step == 2:
            started = time.perf_counter()
        if step == TRIAL:
            steps = max(TRIAL, min(most, int(seconds * (TRIAL - 2) / (time.perf_counter() - started))))
        warm = min(1.0, (step + 1) / min(WARM, 1 + steps // 10))
        optimizer.param_groups[0]["lr"] = rate * warm * (1 - step / steps)
        x = data.values[torch.randint(len(data), (batch,), generator=random)]
        model.at_step(step, steps)
        optimizer.zero_grad()
        model.loss(x.float() if data.levels else x, generator=random).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
    model.eval()
    return steps


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
    `tarflow-fast train` take less, for those. Then it draws and evaluates 1,000 samples, or 50 where all would take
    longer than twice --budget, and is scored on 1,000 that were held out, then on 200. Nats are of log p(x), the higher
    the better; for images and tokens bits/dim say the same, the lower the better. Densities of cnf, flow-matching,
    rectified and riemannian are an ODE's, those of residual (images) and discrete are an estimate and a bound.

    \b
    Columns of the table:
      held-out nats, ±   the mean of log p(x), and its standard error
      training s, steps  how long it was trained, and by how many steps
      sample s, passes   the time for 1,000 samples, and the evaluations of the network where that is not one
      density s, passes  the same for log p of 1,000
      inverse            max |inverse(forward(x)) − x|

    The record of all that is measured by default takes some 15 minutes on two cores:

      python -m bench families --images /usr/share/datasets/fashion-mnist
    """

    name = "families"
    options = (
        options.several("--family", "families", type=tuple(FAMILIES), default=tuple(FAMILIES), help="Families"),
        options.several("--data", "data", type=(*DEMONSTRATIONS, IMAGES), default=DATA, help="Data to be learnt"),
        options.option("--images", type=click.Path(exists=True, path_type=Path), metavar="PATH",
                       help="A folder or file of images with a train and a test split, Fashion-MNIST's say; without "
                       "it none are measured.", show_default=False),
        options.option("--seconds", type=click.FloatRange(0, min_open=True), default=12.0,
                       help="How long each model is trained."),
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

    def measure(self, case: Case) -> Any:
        try:
            found, reason = self._measured(case.label["data"], case.label["family"]), None
        except Exception as error:  # one family's failure, NaNs included, must not cost the others their minutes
            found, reason = {"runs": []}, harness.in_a_line(error)
        return {"label": case.label, "check": harness.check_of(reason), **found}

    def _measured(self, name: str, family: str) -> dict[str, Any]:
        chosen = self.chosen
        train, test = (data_of(name, split, chosen.images) for split in ("train", "test"))
        torch.manual_seed(chosen.seed)
        model = model_for(FlowConfig(family), train, 0)
        most = IMAGE_STEPS if name == IMAGES else DEMONSTRATIONS[name].epochs * math.ceil(len(train) / BATCH)
        started = time.perf_counter()
        steps = fit(model, train, most, chosen.seconds, chosen.seed)
        found = {"steps": steps, "training": time.perf_counter() - started}
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(chosen.seed)
        drawn, sampling = self._timed("sample", model, lambda n: model.sample(n, generator=random))
        x = drawn.repeat(math.ceil(chosen.samples / len(drawn)), *(1 for _ in drawn.shape[1:]))
        _, density = self._timed("density", model, lambda n: model.log_prob(x[:n], generator=random))
        held_out = test.spread(max(1, density["count"], chosen.samples // 5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TarFlowWarning)  # the table has the error of the inverse
            score = flow_score(model, held_out, seed=chosen.seed)
        return {
            **found,
            "log_prob": score.log_prob,
            "standard_error": score.standard_error,
            "bits": score.bits_per_dim,
            "reconstruction": score.reconstruction,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "runs": [sampling, density],
            "samples": pack(drawn, train),
        }

    def _timed(self, way: str, model: FamilyFlow, run: Callable[[int], Tensor]) -> tuple[Tensor, Any]:
        """Returns what `run` makes of so many samples, and its seconds for each 1,000 of them.

        A twentieth is tried first, and it has to do where all would take longer than twice the budget.
        """
        made: list[Tensor] = []
        count = max(1, self.chosen.samples // 20)
        run(1)  # what is made at the first call is not of the time
        seconds = [self.rounds.seconds(lambda: made.append(run(count)))]
        evaluations = model.evaluations()
        if seconds[0] * 20 < 2 * self.chosen.budget_seconds:
            count = self.chosen.samples
            seconds = self.rounds.share(0.5).alternate({way: lambda: made.append(run(count))})[way]
        seconds = [each * PER / count for each in seconds]
        return made[-1], harness.timed(way, seconds, count=count, evaluations=evaluations)

    def lines(self, record: Any) -> list[str]:
        parts = [{**cell, **cell["label"], **{run["name"]: run for run in cell["runs"]}} for cell in record["cells"]]
        parts = [part for part in parts if part["runs"]]
        texts = [f"{part['data']}, {part['family']}: {', '.join(part['samples'])}" for part in parts if _is_text(part)]
        return [*table(COLUMNS, parts, 2), *([""] if texts else []), *texts, *self.failed(record)]

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
        seconds = f"{record['settings']['seconds']:g} s of training each"
        below = f"{hardware(record)}, torch {record['machine']['torch']}, {seconds}"
        return plot.draw(panels or [plot.Panel()], 8, (1.7, 1.8), below)


def _is_text(cell: Any) -> bool:
    return isinstance(cell["samples"], list)


SUITE = Families()
