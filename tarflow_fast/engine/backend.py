"""The description of a backend: where it can run, which blocks it takes, and how its engines are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .contract import BlockEngine
from .shape import BlockShape
from .weights import BlockWeights

Maker = Callable[[BlockWeights], BlockEngine]


class Request(NamedTuple):
    """The device, dtype and options that engines are requested with.

    Attributes:
        device: The device that the engines run on.
        dtype: The dtype of weights and KV cache.
        compile: Whether the engines use torch.compile.
        threads: The number of threads, for a backend that has threads of its own. None is the backend's default.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    compile: bool = False
    threads: int | None = None


# The defaults have names, so that a backend can be sent to another process.
def _takes_all(shape: BlockShape, dtype: torch.dtype) -> None:
    return None


def _lacks_nothing() -> None:
    return None


def _no_variants(request: Request) -> dict[str, Maker]:
    return {}


@dataclass(frozen=True)
class Backend:
    """A backend, as `registry.register` takes it.

    Attributes:
        name: The name that `backend=` selects it by.
        devices: The kinds of device that it can run on, spelt as in `torch.device.type`.
        missing: A function of a request that returns why the backend cannot serve it and what would mend that, or None
            if it can. It may raise BackendError for a request that is a mistake, where no other backend should stand
            in.
        maker: A function of a request that returns the function that makes the engines of one model. The returned
            function is called once for each block, with the block's weights.
        describe: A function of a device that returns, in a few words, what runs there.
        unsupported: A function that returns why the backend cannot take blocks of this shape in this dtype, or None if
            it can.
        not_installed: A function that returns what this installation lacks for the backend on any device, or None if it
            lacks nothing.
        has_threads: Whether the backend takes `Request.threads`.
        probed: Whether backend="auto" considers this backend, and takes it where a probe has proven its engines on the
            device at hand (see `probe/`). The probe runs in a process of its own, to which the backend is sent by
            pickle: its functions then have names in a module.
        variants: A function of a request that returns makers of the same engines launched in other ways, by a name for
            each. A probe holds them to the same bits.
    """

    name: str
    devices: tuple[str, ...]
    missing: Callable[[Request], str | None]
    maker: Callable[[Request], Maker]
    describe: Callable[[torch.device], str]
    unsupported: Callable[[BlockShape, torch.dtype], str | None] = _takes_all
    not_installed: Callable[[], str | None] = _lacks_nothing
    has_threads: bool = False
    probed: bool = False
    variants: Callable[[Request], Mapping[str, Maker]] = _no_variants
