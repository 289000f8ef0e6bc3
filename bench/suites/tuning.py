"""`python -m bench tuning`: how far the shipped model's images are from Fashion-MNIST, by guidance and denoising."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from tarflow_fast import Sampler, load_images, load_pretrained
from tarflow_fast.evaluation import feature_sums, frechet_distance, tune

from ..common import harness, options, plot
from ..common.harness import Case
from ..common.record import hardware
from ..common.suite import Suite
from ..common.table import table

GUIDANCE, RATES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0), (0.0, 0.5, 1.0, 1.5)
FEATURES, BATCH, RATE = 64, 128, 2e-3


class Extractor(nn.Module):
    """A small classifier of 28×28 images, whose last hidden layer is the features: 64 values of an image."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((1, 16), (16, 32), (32, 64))
        layers = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())]
        self.hidden = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.ReLU())
        self.logits = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features (B, 64) of images (B, 1, 28, 28) uint8."""
        found: Tensor = self.hidden(images.float() / 127.5 - 1)
        return found

    def learn(self, images: Tensor, labels: Tensor, epochs: int) -> None:
        """Trains on images, left and right changing places in half of them, in an order of torch's seed."""
        steps = epochs * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(self.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
                x = images[rows]
                x = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x, x.flip(3))
                loss = nn.functional.cross_entropy(self.logits(self(x)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        found = torch.cat([self.logits(self(part)).argmax(1) for part in images.split(500)])
        return float((found == labels).double().mean())


class Tuning(Suite):
    """The Fréchet distance of the shipped model's images to Fashion-MNIST, for each guidance and denoising rate.

    Features are those of a small classifier, which is trained here on the training images first, so that distances
    compare with each other and with nothing else. The reference is the training images. Image i has the same noise and
    class at every point (common random numbers), classes taking turns. "floor" is the distance of as many test images.
    """

    name = "tuning"
    baseline = "training images"
    options = (
        options.option("--data", type=options.FOLDER, required=True, metavar="PATH", help="Fashion-MNIST's IDX files."),
        options.count("--count", "Images of each point.", default=2000),
        options.count("--epochs", "Epochs of the classifier.", default=4),
        options.several(
            "--guidance", "weights", type=click.FloatRange(0), default=GUIDANCE, help="Weights of guidance"
        ),
        options.several("--rate", "rates", type=click.FloatRange(0), default=RATES, help="Denoising rates"),
        options.THREADS,
        *options.of_every_suite("tuning", 60.0),
    )

    def prepare(self) -> None:
        train, test = (load_images(Path(self.chosen.data), split=split) for split in ("train", "test"))
        assert train.labels is not None
        assert test.labels is not None
        torch.manual_seed(self.chosen.seed)
        self.extractor = Extractor()
        self.extractor.learn(train.images, train.labels, self.chosen.epochs)
        self.extractor.eval()
        self.facts = {"accuracy": self.extractor.accuracy(test.images, test.labels)}
        reference = feature_sums(train.images.split(500), self.extractor)
        self.reference, self.facts["reference_images"] = reference.gaussian(), reference.n
        order = torch.randperm(len(test.images))[: self.chosen.count]
        floor = feature_sums(test.images[order].split(500), self.extractor).gaussian()
        self.facts["floor"] = frechet_distance(floor, self.reference)
        self.sampler = Sampler(load_pretrained(), device="cpu", solver="sequential", threads=torch.get_num_threads())

    def parts(self) -> dict[str, Any]:
        return {"extractor": self.facts}

    def cases(self) -> list[Case]:
        return [Case({"guidance": weight}) for weight in self.chosen.weights]

    def measure(self, case: Case) -> Any:
        points = tune(
            self.sampler,
            self.extractor,
            self.reference,
            self.chosen.count,
            list(range(10)),
            guidance=[case.label["guidance"]],
            denoise_scale=self.chosen.rates,
            seed=self.chosen.seed,
            on_nonfinite="redraw",
        )
        return {**harness.unmeasured(case, harness.check_of(None)), "points": [asdict(point) for point in points]}

    def lines(self, record: Any) -> list[str]:
        facts, rates = record["extractor"], [point["denoise_scale"] for point in record["cells"][0]["points"]]
        rows = [
            {"w": cell["label"]["guidance"], **{f"r{i}": point["fid"] for i, point in enumerate(cell["points"])}}
            for cell in record["cells"]
        ]
        columns = " | ".join(
            ["guidance: {w:g}", *(f"denoising {rate:g}: {{r{i}:.3f}}" for i, rate in enumerate(rates))]
        )
        return [f"floor {facts['floor']:.3f}, the classifier's accuracy {facts['accuracy']:.1%}", *table(columns, rows)]

    def figure(self, record: Any) -> plot.Figure:
        """Returns the distance over guidance, a line for each denoising rate."""
        cells, facts = record["cells"], record["extractor"]
        images, reference = record["settings"]["count"], facts["reference_images"]
        panel = plot.Panel(level=facts["floor"], axes={"xlabel": "guidance", "ylabel": "Fréchet distance"})
        weights = [cell["label"]["guidance"] for cell in cells]
        for i, point in enumerate(cells[0]["points"]):
            style = {"color": plot.COLOURS[i % len(plot.COLOURS)], "marker": "o", "markersize": 4}
            y = [cell["points"][i]["fid"] for cell in cells]
            panel.series.append(plot.Series(f"denoising rate {point['denoise_scale']:g}", weights, y, style))
        said = f"{images:,} images of the shipped model a point, against {reference:,}; features of a small classifier"
        said += f"\nhorizontal line: as many test images; {hardware(record)}"
        return plot.draw([panel], 1, (6.6, 4.0), said)


SUITE = Tuning()
