"""The data of a run are read once for all of its processes, and say what model learns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import ImageData, matched
from ..errors import ArgumentError
from ..models.config import TarFlowConfig
from .config import NETWORK, TrainConfig
from .processes import Processes
from .shared import load_once


def model_config(config: TrainConfig, data: ImageData) -> TarFlowConfig:
    """Returns the sizes of the model that learns these data."""
    network: dict[str, Any] = {name: getattr(config, name) for name in NETWORK}
    network["num_classes"] = data.num_classes if config.conditional else 0
    if data.sequences:
        return TarFlowConfig.for_tokens(*data.images.shape[1:], **network)
    channels, height, width = data.images.shape[1:]
    return TarFlowConfig(channels, (height, width), config.patch_size, **network)


def run_metadata(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Returns what the model's file records besides weights."""
    metadata: dict[str, Any] = {"noise_type": config.noise_type}
    if config.noise_type == "gaussian":
        metadata["noise_std"] = config.noise_std
    if data.images.is_floating_point():
        metadata["values"] = "raw"
    if config.conditional and data.names:
        metadata["class_names"] = list(data.names)
    return metadata


@dataclass(frozen=True)
class DataReader:
    """A `DataReader` reads the data of a run. bar: whether a bar shows meanwhile."""

    config: TrainConfig
    group: Processes
    bar: bool

    def read(self, path: str, split: str) -> ImageData:
        """Returns data of this split. Raises ArgumentError with the names of the run's options."""
        config = self.config
        try:
            return load_once(
                self.group,
                path,
                cache=config.cache,
                split=split,
                size=config.img_size,
                channels=config.in_channels,
                layout=config.layout,
                values=config.values,
                progress=self.bar,
            )
        except ArgumentError as error:
            if error.argument == "size":
                raise ArgumentError("img_size", error.expected, error.got) from error
            raise

    def read_held_out(self, data: ImageData, own: ImageData) -> ImageData | None:
        """Returns the held-out images with the model's labels, or None. own: the data with its own class names."""
        if self.config.eval_data is None:
            return None
        held_out = self.read(self.config.eval_data, "test")
        wanted, got = tuple(data.images.shape[1:]), tuple(held_out.images.shape[1:])
        if got != wanted:
            raise ArgumentError("eval_data", f"{data.kind} of shape {wanted}", got)
        if held_out.images.dtype != data.images.dtype:
            raise ArgumentError("eval_data", f"{data.kind} of {data.images.dtype}", held_out.images.dtype)
        if self.config.conditional:
            if held_out.labels is None:
                raise ArgumentError("eval_data", f"labels of {data.num_classes} classes", "none")
            held_out = matched(held_out, data.names, data.num_classes, "eval_data", own.names or ())
        return held_out.spread(self.config.eval_images)
