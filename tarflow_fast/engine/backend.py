"""What a backend says of itself: where it can run, which blocks it takes, and how its engines are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .contract import BlockEngine
from .shape import BlockShape
from .weights import BlockWeights

Maker = Callable[[BlockWeights], BlockEngine]


class Request(NamedTuple):
    """What engines are asked for.

    device: where they run. dtype: of weights and KV cache. compile: whether by torch.compile. threads: of a backend
    that has threads of its own, None for its default.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    compile: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Backend:
    """A backend, as `registry.register` takes it.

    name: what `backend=` calls it. devices: the kinds of device, as torch.device.type has them, that it can run on.
    missing: why it cannot serve a request, with the mend, or None if it can; it may raise BackendError for what is a
    mistake and no reason to fall back. unsupported: why it cannot take blocks of this shape in this dtype, or None.
    maker: what makes the engines of one model, called once for each of its blocks. describe: in a few words what runs
    on a device. not_installed: what this installation lacks of it, whatever the device, or None. has_threads: whether
    it takes `Request.threads`.
    """

    name: str
    devices: tuple[str, ...]
    missing: Callable[[Request], str | None]
    maker: Callable[[Request], Maker]
    describe: Callable[[torch.device], str]
    unsupported: Callable[[BlockShape, torch.dtype], str | None] = lambda shape, dtype: None
    not_installed: Callable[[], str | None] = lambda: None
    has_threads: bool = False
