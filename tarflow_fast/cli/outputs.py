"""The files that `tarflow-fast sample` writes are checked before the work, and written as it goes on.

What has been drawn is not lost. Single pictures are written batch by batch. A grid, animation or `.npz` file takes
its name when it holds all images; if the work ends before, those that were drawn are put into a file of their own,
`NAME.partial.SUFFIX`, and whatever bears the name stays as it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling.report import Samples
    from .layout import Layout


def output_path(option: str, path: str, suffixes: Sequence[str]) -> Path:
    """Returns the path of a file that can be written. Raises click.UsageError of that option for any other."""
    from ..errors import ArgumentError
    from ..images import check_path

    try:
        return check_path(option, path, suffixes)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error


def output_folder(option: str, path: str) -> Path:
    """Returns a folder that can be written to or made. Raises click.UsageError of that option for any other."""
    folder = Path(path)
    there = next((place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise click.UsageError(f"{option}: expected a folder that can be written to, got {path!r}")
    return folder


@dataclass(frozen=True)
class Run:
    """A `Run` draws n images from number `first` on.

    layout: how the images lie in grid and animation. scale: each pixel of these is enlarged to scale×scale. how: the
    model, seed and options, which the files record. class_names: the names of the classes in their order, perhaps none.
    """

    n: int
    first: int
    layout: Layout
    scale: int
    how: dict[str, Any]
    class_names: Sequence[str]


@dataclass(frozen=True)
class Outputs:
    """The `Outputs` of a run are the paths that its samples go to, each None where it was not asked for."""

    grid: Path | None
    singles: Path | None
    npz: Path | None
    gif: Path | None

    @classmethod
    def checked(cls, out: str | None, singles: str | None, npz: str | None, gif: str | None) -> Outputs:
        """Returns the outputs of these paths. Raises click.UsageError for a path that cannot be written."""
        from ..images import PICTURE_SUFFIXES

        return cls(
            None if out is None else output_path("--out", out, PICTURE_SUFFIXES),
            None if singles is None else output_folder("--singles", singles),
            None if npz is None else output_path("--npz", npz, (".npz",)),
            None if gif is None else output_path("--gif", gif, (".gif",)),
        )

    def check(self, run: Run, shape: tuple[int, ...], frames: int) -> None:
        """Raises click.UsageError where the images are too many, too large or of too many channels for an output.

        shape: (ch, H, W) of an image, or (T, D) of a sequence, which only a .npz file takes. frames: the number of
        pictures of the animation.
        """
        from ..errors import ArgumentError
        from ..images import check_grid

        cells, columns = run.layout.size(run.first, run.n)
        try:
            for option, path, pictures in (("--out", self.grid, 1), ("--gif", self.gif, frames)):
                if path is not None:
                    check_grid(option, path, cells, shape, columns, scale=run.scale, frames=pictures)
        except ArgumentError as error:
            advice = "; --no-grid with --npz, --singles or --gif does without" if error.argument == "--out" else ""
            raise click.UsageError(f"{error}{advice}") from error
        if self.singles is not None and shape[0] not in (1, 3):
            raise click.UsageError(f"--singles: expected images of 1 or 3 channels, got {shape[0]} channels")
        if self.npz is not None:
            needed = 2 * 4 * run.n * math.prod(shape)  # they are collected, then copied
            free = shutil.disk_usage(self.npz.parent).free
            if needed > free:
                lacking = f"{run.n} images need {needed / 2**30:.1f} GiB while written, {free / 2**30:.1f} are free"
                raise click.UsageError(f"--npz: expected a disk that holds the images, but {lacking}")

    @contextlib.contextmanager
    def writing(self, run: Run) -> Iterator[Writing]:
        """Gives a `Writing`, which takes samples; what is not yet written is written when the block ends or raises.

        Exceptions get notes of what was kept.
        """
        with contextlib.ExitStack() as stack:
            writing = Writing(run, self, stack)
            try:
                yield writing
                writing.finish()
            except BaseException as error:
                with contextlib.suppress(Exception):  # the first failure is the one to tell
                    writing.finish()
                for note in writing.kept:
                    error.add_note(note)
                raise

    def to_dict(self) -> dict[str, str]:
        return {name: str(path) for name, path in vars(self).items() if path is not None}


class _Output(Protocol):
    """An `_Output` is one file, or folder. count: the number of images that it has taken."""

    path: Path
    count: int

    def add(self, part: Samples) -> None: ...

    def write(self, path: Path) -> None: ...


class Writing:
    """A `Writing` feeds the outputs of one run. kept: lines that say which files hold a part of the images."""

    def __init__(self, run: Run, outputs: Outputs, stack: contextlib.ExitStack):
        self._n = run.n
        self.kept: list[str] = []
        self._outputs: list[_Output] = []
        if outputs.npz is not None:
            self._outputs.append(_Npz(outputs.npz, run, stack))
        if outputs.singles is not None:
            self._outputs.append(_Singles(outputs.singles, run))
        if outputs.grid is not None:
            self._outputs.append(_Grid(outputs.grid, run))
        if outputs.gif is not None:
            self._outputs.append(_Gif(outputs.gif, run))

    def add(self, part: Samples) -> None:
        """Takes the next images into every output, also where one of them fails; then raises what failed first."""
        failures: list[Exception] = []
        for output in self._outputs:
            with _kept(failures):
                output.add(part)
                output.count += len(part.images)
        if failures:
            raise failures[0]

    def finish(self) -> None:
        """Writes each output that was not yet tried, under a name of its own if it does not have all images.

        Raises what failed first, when all have been tried.
        """
        failures: list[Exception] = []
        while self._outputs:
            output = self._outputs.pop(0)
            path, whole = output.path, output.count == self._n
            if not whole:
                path = path.with_name(f"{path.stem}.partial{path.suffix}")
            if output.count:
                with _kept(failures):
                    output.write(path)
                    if not whole and not isinstance(output, _Singles):
                        self.kept.append(f"{path}: the first {output.count} of {self._n} images")
        if failures:
            raise failures[0]


@contextlib.contextmanager
def _kept(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failures.append(error)


def _facts(run: Run, count: int, labels: list[Tensor]) -> dict[str, Any]:
    """Returns what a file of `count` images records of them. labels: the labels of each batch."""
    facts = {**run.how, "first": run.first, "images": count}
    if labels:
        facts["labels"] = [y for part in labels for y in part.tolist()]
        if run.class_names:
            facts["class_names"] = list(run.class_names)
    return facts


class _Sheet:
    """A `_Sheet` collects 8-bit images, which come batch by batch and lie in a grid."""

    def __init__(self, run: Run):
        self._run, self._parts = run, list[Any]()

    def add(self, images: Tensor) -> None:
        from ..images import to_uint8

        self._parts.append(to_uint8(images))

    def laid_out(self) -> tuple[Tensor, int]:
        """Returns all cells of the grid, of which those without an image are white, and its number of columns."""
        import torch

        from ..images import PAD_VALUE

        images = torch.cat(self._parts)
        shown = (self._run.first, len(images))
        cells, columns = self._run.layout.size(*shown)
        sheet = torch.full((cells, *images.shape[1:]), PAD_VALUE, dtype=torch.uint8)
        sheet[list(self._run.layout.places(*shown))] = images
        return sheet, columns


class _Grid:
    def __init__(self, path: Path, run: Run):
        self.path, self.count = path, 0
        self._run, self._sheet, self._labels = run, _Sheet(run), list[Any]()

    def add(self, part: Samples) -> None:
        self._sheet.add(part.images)
        if part.labels is not None:
            self._labels.append(part.labels)

    def write(self, path: Path) -> None:
        from ..images import save_grid

        sheet, columns = self._sheet.laid_out()
        save_grid(sheet, path, columns, scale=self._run.scale, info=_facts(self._run, self.count, self._labels))


class _Gif:
    """A `_Gif` shows the noise, the images after each block, and the denoised images if there are any."""

    def __init__(self, path: Path, run: Run):
        self.path, self.count = path, 0
        self._run, self._sheets = run, list[_Sheet]()

    def add(self, part: Samples) -> None:
        frames = [*(part.trajectory or ()), *([part.images] if self._run.how["options"]["denoise"] else ())]
        if not self._sheets:
            self._sheets = [_Sheet(self._run) for _ in frames]
        for sheet, frame in zip(self._sheets, frames, strict=True):
            sheet.add(frame)

    def write(self, path: Path) -> None:
        from ..images import save_gif

        frames = [sheet.laid_out() for sheet in self._sheets]
        save_gif([frame for frame, _ in frames], path, frames[0][1], scale=self._run.scale)


class _Singles:
    def __init__(self, path: Path, run: Run):
        self.path, self.count, self._run = path, 0, run
        path.mkdir(parents=True, exist_ok=True)

    def add(self, part: Samples) -> None:
        from ..images import save_png

        numbers = range(self._run.first + self.count, self._run.first + self.count + len(part.images))
        labels = [None] * len(numbers) if part.labels is None else part.labels.tolist()
        for number, image, label in zip(numbers, part.images.cpu(), labels, strict=True):
            facts = {**self._run.how, "number": number, "label": label}
            if label is not None and 0 <= label < len(self._run.class_names):
                facts["class_name"] = self._run.class_names[label]
            save_png(image, self.path / f"{number:05d}.png", info=facts, sweep=number == self._run.first)

    def write(self, path: Path) -> None:
        """Does nothing: `add` has written each picture already."""


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Makes an OSError of the block name this file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class _Npz:
    """An `_Npz` collects numbers on the disk, in a file without a name, which nobody sees and which ends with the
    process."""

    def __init__(self, path: Path, run: Run, stack: contextlib.ExitStack):
        self.path, self.count, self._run = path, 0, run
        with _about(path):
            self._spool = stack.enter_context(tempfile.TemporaryFile(dir=path.parent, buffering=0))  # noqa: SIM115
        self._shape: tuple[int, ...] = ()
        self._labels, self._log_prob = list[Any](), list[Any]()

    def add(self, part: Samples) -> None:
        images = part.images.float().cpu().contiguous().numpy()
        self._shape, rest = images.shape[1:], images.data.cast("B")
        with _about(self.path):
            self._spool.seek(self.count * images[0].nbytes)
            while rest:
                rest = rest[self._spool.write(rest) :]
        if part.labels is not None:
            self._labels.append(part.labels.numpy())
        if part.log_prob is not None:
            self._log_prob.append(part.log_prob.cpu().numpy())

    def write(self, path: Path) -> None:
        import json

        import numpy as np

        from ..files import replacing

        how = self._run.how
        arrays: dict[str, Any] = {
            "images": np.memmap(self._spool, np.float32, "r", shape=(self.count, *self._shape)),
            "seed": how["seed"],
            "first": self._run.first,
            "options": json.dumps({"model": how["model"], **how["options"]}),
        }
        if self._labels:
            arrays["labels"] = np.concatenate(self._labels)
        if self._labels and self._run.class_names:
            arrays["class_names"] = np.array(self._run.class_names)
        if self._log_prob:
            arrays["log_prob"] = np.concatenate(self._log_prob)
        with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)
