"""The features of images come from a network, from a folder that keeps them, or are there already."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .outputs import output_folder

if TYPE_CHECKING:
    import torch

    from ..evaluation import Extractor, Features, FeatureSet, ImageSource
    from ..models.tarflow import TarFlow


def features_folder(path: str | None, *parts: str) -> Path | None:
    """Returns the folder of --features. Raises click.UsageError for what is none, and where processes need one.

    parts: patterns of the names of what it may hold already; without any it is that of one run.
    """
    from ..sampling.sharded import processes_of_environment

    if path is not None and not parts:
        return run_folder("--features", path)
    if path is not None:
        folder = output_folder("--features", path)
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        for name in names:
            if not any(fnmatch.fnmatch(name, part) for part in (".*", *parts)):
                expected = "a new or empty folder, or that of the same command"
                raise click.UsageError(f"--features: expected {expected}, got {path!r}, which holds {name!r}")
        return folder
    if (world := processes_of_environment()[1]) > 1:
        raise click.UsageError(f"--features: {world} processes divide the work by a folder that they share; give one")
    return None


def run_folder(option: str, path: str | Path) -> Path:
    """Returns the folder of a run. Raises click.UsageError of that option where it cannot be one."""
    from ..errors import ArgumentError
    from ..sampling.sharded.job import check_folder

    folder = output_folder(option, str(path))
    try:
        check_folder(folder)
    except ArgumentError as error:
        raise click.UsageError(f"{option}: expected {error.expected}, got {error.got}") from error
    return folder


def check_pictures(model: TarFlow) -> None:
    """Raises UsageError for a model whose samples are no pictures, of which Inception-v3 has no features."""
    channels = model.config.in_channels
    if model.config.kind == "sequences" or channels not in (1, 3):
        what = "sequences" if model.config.kind == "sequences" else f"images of {channels} channels"
        raise click.UsageError(f"--model: expected a model of pictures, of which Inception-v3 has features, got {what}")


def own_device(name: str | None) -> torch.device:
    """Returns the device of this process: of several GPUs that of torchrun's LOCAL_RANK, unless one is named."""
    from ..checks import environment_count
    from ..devices import check_device, pick_device

    device = pick_device(name)
    local = environment_count("LOCAL_RANK", 0, 0)
    return check_device(f"cuda:{local}") if device.type == "cuda" and name in (None, "cuda") else device


def add_features(
    found: FeatureSet,
    source: ImageSource,
    extractor: Extractor,
    folder: Path | None,
    *,
    batch_size: int,
    bars: bool,
    desc: str,
) -> None:
    """Adds the features of images to those that were found, of several processes in the first one.

    folder: where they are kept, if anywhere. desc: the text before the bar.
    """
    from ..evaluation import compute_features, read_features, write_features
    from ..progress import Bar
    from ..sampling.sharded import processes_of_environment

    if folder is None:
        with Bar(total=source.n, unit="image", desc=desc, disable=not bars) as bar:
            add_all(found, compute_features(source.batches(batch_size), extractor), bar.update)
        return
    write_features(source, extractor, folder, batch_size=batch_size, progress=bars)
    if processes_of_environment()[0] == 0:
        add_all(found, read_features(folder, batch_size))


def add_all(found: FeatureSet, parts: Iterator[Features], told: Callable[[int], object] = lambda count: None) -> None:
    for part in parts:
        found.add(part)
        told(len(part))
