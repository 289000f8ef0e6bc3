"""A run that starts from a model has its sizes, and data of its classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load
from ..data import ImageData
from ..data.values import PICTURE_CHANNELS
from ..errors import ArgumentError
from ..models.tarflow import TarFlow
from .config import NETWORK, TrainConfig

READ_WITH = ("patch_size", "in_channels", "head_dim", "img_size")  # the weights of a .pth leave these open


@dataclass(frozen=True)
class Start:
    """A `Start` is the model that a run starts from. name: what the run records of where it comes from."""

    model: TarFlow
    name: str


Init = Start | TarFlow | str | os.PathLike[str]


def read_init(init: Init, given: Mapping[str, Any]) -> Start:
    """Returns the model that a run starts from, read from a file if `init` is a path.

    given: the options of the run that were given. Raises ArgumentError for what is neither a TarFlow nor a path, and
    what `load` raises.
    """
    if isinstance(init, Start):
        return init
    if isinstance(init, TarFlow):
        return Start(init, "a model in memory")
    if not isinstance(init, (str, os.PathLike)):
        raise ArgumentError("init", "a TarFlow or a path", type(init).__name__)
    path = Path(init)
    open_sizes = READ_WITH if path.suffix.lower() == ".pth" else ()
    return Start(load(path, **{name: given[name] for name in open_sizes if name in given}), path.name)


def given_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that differ from the defaults."""
    values = ((field.name, getattr(config, field.name), field.default) for field in fields(config))
    return {name: value for name, value, default in values if value != default}


def sizes_of(model: TarFlow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a run takes from the model that it starts from.

    given: the options of the run that were given. Raises ArgumentError where they differ.
    """
    sizes = {name: getattr(model.config, name) for name in NETWORK}
    if model.config.layout == "tokens":
        sizes["layout"] = "tokens"  # the rest is read off the data
    else:
        sizes |= {name: getattr(model.config, name) for name in ("patch_size", "img_size")}
        if model.config.in_channels in PICTURE_CHANNELS:
            sizes["in_channels"] = model.config.in_channels
    sizes["conditional"] = model.config.num_classes > 0
    for name, value in sizes.items():
        if given.get(name, value) != value:
            raise ArgumentError(name, f"{value!r}, as in the model that the run starts from", repr(given[name]))
    return sizes


def with_classes_of(classes: int, names: Sequence[str] | None, data: ImageData) -> ImageData:
    """Returns the data with the labels and class names of the model that a run starts from.

    classes: the number of the model's classes. names: the names of these, or None. Labels that are numbers are the
    model's own, whichever of them the data has. Raises ArgumentError where the data has names and they are not the
    model's, and for labels that the model does not know.
    """
    if classes == 0:
        return data
    if names and data.class_names and list(names) != list(data.class_names):
        raise ArgumentError(
            "init", f"a model of the data's classes {list(data.class_names)!r}", f"one of {list(names)!r}"
        )
    if data.labels is not None and data.numbers is not None:
        data = replace(data, labels=torch.tensor(data.numbers, device="cpu")[data.labels], numbers=None)
    if data.class_names is None and names and data.labels is not None and data.num_classes <= classes == len(names):
        data = replace(data, class_names=tuple(names))
    if data.num_classes > classes or (data.class_names is not None and data.num_classes != classes):
        raise ArgumentError("init", f"a model of the data's {data.num_classes} classes", f"one of {classes}")
    return data
