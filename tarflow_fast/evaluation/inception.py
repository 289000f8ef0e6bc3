"""The features of Inception-v3 that published measures are of, computed by torch-fidelity."""

from __future__ import annotations

import functools
import hashlib
import importlib
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..devices import check_device
from ..errors import BackendError, first_line
from ..files import PathLike
from ..scalars import check_flag
from .features import Features

SPATIAL_CHANNELS = 7  # of ADM's sFID
NETWORK = "inception-v3-compat"


class Inception:
    """An `Inception` returns 2,048 features of each image: the pooled layer of Inception-v3 as ported from TensorFlow.

    Images of one channel are taken as grey ones; all are brought to 299×299 as TensorFlow 1 did. The weights are read
    when the first features are wanted; several threads may ask for features at once.

    Args:
        weights: torch-fidelity's file of weights, by default that of its cache, which is torch.hub's. It is read as
            data, no pickle running.
        device: The device that it runs on.
        download: Whether the file, 91 MB whose SHA-256 is checked, is fetched into that cache where it is not there.

    Raises:
        ArgumentError: There is no such device.
        BackendError: torch-fidelity is not installed, or there are no weights.
    """

    def __init__(self, weights: PathLike | None = None, *, device: str | torch.device = "cpu", download: bool = False):
        self.device = check_device(device)
        try:
            module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            why = f"torch-fidelity cannot be imported ({first_line(error)}); pip install 'tarflow_fast[fid]' brings it"
            raise BackendError(why) from error
        self._module = module
        self._download = check_flag("download", download)
        self.path = self._cached() if weights is None else Path(weights)
        if weights is not None and not self.path.is_file():
            raise BackendError(f"weights of Inception-v3: no such file as {str(self.path)!r}")
        if not self.path.is_file() and not self._download:
            why = f"torch-fidelity's file of them ({self._module.URL_INCEPTION_V3}) is not in its cache"
            mend = "weights=… or --inception FILE names it, download=True or --inception download fetches it"
            raise BackendError(f"weights of Inception-v3: {why}, {str(self.path)!r}; {mend}")
        self._seen = threading.local()
        self._loading = threading.Lock()

    def _cached(self) -> Path:
        """Returns where torch-fidelity, by way of torch.hub, keeps what it has downloaded."""
        return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(self._module.URL_INCEPTION_V3).path).name)

    @functools.cached_property
    def _loaded(self) -> Any:
        if not self.path.is_file():
            self._fetch()
        try:
            torch.load(self.path, map_location="cpu", weights_only=True)  # torch-fidelity lets pickle run
            made: Any = self._module.FeatureExtractorInceptionV3(
                NETWORK, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(self.path)
            )
        except Exception as error:  # whatever a file that is another one may raise
            mend = "give torch-fidelity's file of them"
            why = f"weights of Inception-v3 are not in {str(self.path)!r} ({first_line(error)}); {mend}"
            raise BackendError(why) from error
        made = made.to(self.device).eval()
        # TensorFlow's graph, and so ADM, calls it mixed_6/conv
        made.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: setattr(self._seen, "spatial", out))
        return made

    def _fetch(self) -> None:
        start = self.path.stem.rpartition("-")[2]  # of its SHA-256
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self._module.URL_INCEPTION_V3, str(self.path), start, progress=False)
        except Exception as error:  # whatever a download may raise
            mend = "give torch-fidelity's file of them"
            raise BackendError(f"weights of Inception-v3 cannot be downloaded ({first_line(error)}); {mend}") from error

    @property
    def network(self) -> Any:
        """torch-fidelity's module, with its weights. Raises BackendError where these cannot be read."""
        with self._loading:
            return self._loaded

    @functools.cached_property
    def name(self) -> str:
        """What its features depend on: the network, and the start of the SHA-256 of its weights, in hexadecimal."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{NETWORK} ({digest.hexdigest()[:16]})"

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features (B, 2048) fp32 of images (B, 1 or 3, H, W) uint8."""
        return self.features(images).pooled

    def features(self, images: Tensor) -> Features:
        """Returns all features of images (B, 1 or 3, H, W) uint8, in one pass."""
        network = self.network
        pictures = images.to(self.device).expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.to(self.device)
        with torch.inference_mode():
            pooled, logits = network(pictures.contiguous())
        spatial = self._seen.__dict__.pop("spatial")[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, logits)
