"""The features of Inception-v3 that published measures are of, computed by torch-fidelity."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import check_device
from ..errors import BackendError, first_line
from ..files import PathLike
from .features import Features

SPATIAL_CHANNELS = 7  # of ADM's sFID


class Inception:
    """An `Inception` returns 2,048 features of each image: the pooled layer of Inception-v3 as ported from TensorFlow.

    Images of one channel are taken as grey ones; all are brought to 299×299 as TensorFlow 1 did.

    Args:
        weights: torch-fidelity's file of weights, by default that of its cache, into which it downloads one.
        device: The device that it runs on.

    Raises:
        ArgumentError: There is no such device.
        BackendError: torch-fidelity is not installed, or there are no weights.
    """

    def __init__(self, weights: PathLike | None = None, *, device: str | torch.device = "cpu"):
        self.device = check_device(device)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            why = f"torch-fidelity cannot be imported ({first_line(error)}); pip install 'tarflow_fast[fid]' brings it"
            raise BackendError(why) from error
        path = None if weights is None else str(Path(weights))
        if path is not None and not Path(path).is_file():
            raise BackendError(f"weights of Inception-v3: no such file as {path!r}")
        try:
            made: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
            )
        except Exception as error:  # whatever a download, or a file that is another one, may raise
            where = "cannot be downloaded" if path is None else f"are not in {path!r}"
            mend = "give torch-fidelity's file of them"
            raise BackendError(f"weights of Inception-v3 {where} ({first_line(error)}); {mend}") from error
        self._network = made.to(self.device).eval()
        self._spatial: list[Tensor] = []
        # TensorFlow's graph, and so ADM, calls it mixed_6/conv
        self._network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: self._spatial.append(out))

    @functools.cached_property
    def name(self) -> str:
        """What its features depend on: the network, and the start of the SHA-256 of its weights, in hexadecimal."""
        digest = hashlib.sha256()
        for name, value in self._network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"inception-v3-compat ({digest.hexdigest()[:16]})"

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features (B, 2048) fp32 of images (B, 1 or 3, H, W) uint8."""
        return self.features(images).pooled

    def features(self, images: Tensor) -> Features:
        """Returns all features of images (B, 1 or 3, H, W) uint8, in one pass."""
        pictures = images.to(self.device).expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.to(self.device)
        self._spatial.clear()
        with torch.inference_mode():
            pooled, logits = self._network(pictures.contiguous())
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, logits)
