"""`python -m bench pictures`: how fast a folder of pictures is read, beside Pillow on all cores."""

from __future__ import annotations

import functools
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow_fast.data import load_images
from tarflow_fast.evaluation import open_images, training_images

from ..common import harness, options, plot
from ..common.decoding import decode_all
from ..common.harness import Case
from ..common.machine import cores
from ..common.record import hardware
from ..common.roofline import Work
from ..common.suite import Suite
from ..common.table import labelled

THREADS, PROCESSES = "Pillow, a thread a core", "Pillow, a process a core"
OURS = ("load_images", "open_images", "training_images")
RUNS = (THREADS, PROCESSES, *OURS)
IN_A_TASK = 16  # pictures that Pillow's workers take at once
COLUMNS = "run: {name} | seconds: {median:.4g} | p20-p80: {p20:.4g}-{p80:.4g} | n: {n} | faster: {faster}"


def by_pillow(pool: Any, paths: list[str]) -> Tensor:
    return torch.tensor(decode_all(pool, paths, IN_A_TASK), dtype=torch.float64)


def by_load_images(folder: str, size: int) -> Tensor:
    return load_images(folder, size=size).images[:, :, 0].double().sum((1, 2))


def by_open_images(folder: str, size: int) -> Tensor:
    return torch.cat([part[:, :, 0].double().sum((1, 2)) for part in open_images(folder, size).batches(64)])


def by_training_images(folder: str, size: int) -> Tensor:
    """Returns the sums of as many pictures, whose levels are not those of the file: they are not compared."""
    return torch.cat([part[:, :, 0].double().sum((1, 2)) for part in training_images(folder, size).batches(64)])


def write_pictures(folder: Path, count: int, size: int, seed: int) -> None:
    """Writes PNGs that are about as hard to decode as photographs: smooth colours, and noise of a few levels."""

    def write(i: int) -> None:
        rng = np.random.default_rng([seed, i])
        colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:06d}.png", compress_level=1)

    folder.mkdir()
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(write, range(count)))


def verdict(cell: Any) -> str:
    """Returns a sentence on the slowest of ours beside the faster of Pillow's ways, by the median of their ratios."""
    seconds = {run["name"]: np.array(run["seconds"]) for run in cell["runs"]}
    pillow = np.minimum(seconds[THREADS], seconds[PROCESSES])
    ratio, slowest = min((float(np.median(pillow / seconds[name])), name) for name in OURS)
    size, holds = cell["label"]["size"], "at least as fast" if ratio >= 1 else "slower"
    return (
        f"{size} x {size} pixels: ours are {holds}: {slowest}, the slowest, {ratio:.2f} times as fast as Pillow's best"
    )


class Pictures(Suite):
    """A folder of PNGs: what `load_images`, which training calls, `open_images` (`fid`) and `training_images`
    (`prepare-stats`) take to read it, beside Pillow's decoder in as many threads, or processes, as there are cores.

    Pillow's part is the shortest that reads each file as an array and keeps nothing. Ours gives arrays of channels
    first, upright and on white, cropped to a size that the pictures have already; `training_images` also mirrors half
    of them. A cell is timed only if all give the same pixels (`training_images`, which has levels of its own: as many
    pictures). The files have been read once before.
    """

    name = "pictures"
    baseline = THREADS
    options = (
        options.several("--size", "sizes", type=click.IntRange(8), default=(32, 256), help="Pixels along a side"),
        options.count("--count", "Pictures in the folder.", default=10_000),
        *options.of_every_suite("pictures", 600.0),
    )

    def cases(self) -> list[Case]:
        count = self.chosen.count
        return [
            Case(
                {"pictures": count, "size": size},
                SimpleNamespace(to_dict=functools.partial(dict, count=count, size=size)),
                Work(bytes=3 * size * size * count, flops=0, weight_bytes=0, working_set=3 * size * size),
            )
            for size in self.chosen.sizes
        ]

    def measure(self, case: Case) -> Any:
        processes = ProcessPoolExecutor(cores(), mp_context=get_context("spawn"))
        with tempfile.TemporaryDirectory() as folder, processes as pool:
            place = os.path.join(folder, "pictures")
            write_pictures(Path(place), case.label["pictures"], case.label["size"], self.chosen.seed)
            return self.measure_folder(case, place, pool)

    def measure_folder(self, case: Case, folder: str, processes: Any) -> Any:
        """Returns the cell of a case. folder: where its pictures are. processes: a pool of them, one a core."""
        size, paths = case.label["size"], sorted(os.path.join(folder, name) for name in os.listdir(folder))

        def threads() -> Tensor:
            with ThreadPoolExecutor(cores()) as pool:
                return by_pillow(pool, paths)

        wanted = threads()

        def training() -> Tensor:
            found = by_training_images(folder, size)
            return wanted if found.shape == wanted.shape else found

        ours = (lambda: by_load_images(folder, size), lambda: by_open_images(folder, size), training)
        candidates = zip(RUNS, (threads, lambda: by_pillow(processes, paths), *ours), strict=True)
        makers = {name: functools.partial(lambda run: run, run) for name, run in candidates}
        return harness.measure_cell(case, makers, self.rounds, exact=wanted, tolerance=0.0)

    def lines(self, record: Any) -> list[str]:
        rows = [(cell, run) for cell in record["cells"] for run in cell["runs"]]
        verdicts = [verdict(cell) for cell in record["cells"] if len(cell["runs"]) == len(RUNS)]
        return [*labelled(COLUMNS, rows), "", *verdicts, *self.failed(record)] if rows else self.failed(record)

    def figure(self, record: Any) -> plot.Figure:
        """Returns bars of the ratio to Pillow's threads, in groups by size."""
        names = dict.fromkeys(run["name"] for cell in record["cells"] for run in cell["runs"])
        colours = {name: plot.COLOURS[index % len(plot.COLOURS)] for index, name in enumerate(names)}
        panel = plot.Panel(level=1, axes={"ylabel": f"times as fast as {THREADS}"})
        for cell in record["cells"]:
            bars = panel.groups.setdefault(f"{cell['label']['size']} pixels", [])
            bars += [
                plot.Bar(colours[run["name"]], f"{run['ratio']['median']:.2f}×", run["ratio"])
                for run in cell["runs"]
                if "ratio" in run
            ]
        footer = f"{hardware(record)}; median, line from p20 to p80"
        return plot.draw([panel], 1, (7.0, 3.4), footer, names=dict(list(colours.items())[1:]))


SUITE = Pictures()
