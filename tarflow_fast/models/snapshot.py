"""A snapshot tells whether weights that are shared with somebody else's model are still the same."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


class Snapshot:
    """A `Snapshot` holds checksums of a module's parameters and buffers, as they are when it is made."""

    def __init__(self, module: nn.Module):
        self._tensors = {name: value.detach() for name, value in module.state_dict().items()}
        self._checksums = {name: _checksum(value) for name, value in self._tensors.items()}
        self._versions = {name: value._version for name, value in self._tensors.items()}

    def check(self, thorough: bool = True) -> None:
        """Raises ArgumentError where the weights have changed since the snapshot.

        thorough: whether the values are read. Otherwise only those are that torch says were written to, which it does
        not of what was written by way of `.data` or NumPy.
        """
        for name, value in self._tensors.items():
            read = thorough or value._version != self._versions[name]
            if read and _checksum(value) != self._checksums[name]:
                expected = "the weights that the sampler was made of; make a new one of a model that has changed"
                raise ArgumentError("model", expected, f"another {name}")


def _checksum(x: Tensor) -> int:
    """Returns a checksum of the values."""
    if x.device.type == "cpu":
        return zlib.crc32(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int(x.contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
