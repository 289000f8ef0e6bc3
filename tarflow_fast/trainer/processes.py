"""The processes that share a run: one, or as many as `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError


@dataclass(frozen=True)
class Processes:
    """This process among all: rank < world, on one device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over processes, in place."""
        return self.sum(x).div_(self.world)

    def any(self, flag: bool) -> bool:
        """Whether any process has its flag up."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.world > 1:
            self.any(False)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto": a GPU where there is one, else the CPU; "cuda": the GPU of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError("device", "'auto', 'cpu' or 'cuda'", repr(name)) from error
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError("device", "'auto', 'cpu' or 'cuda'", repr(name))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "a device of this machine", "'cuda', but torch sees no GPU")
    return torch.device("cuda", local_rank) if name == "cuda" else device


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the process group that torchrun's environment names, if any (gloo on CPUs, NCCL on GPUs)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world == 1:
        yield Processes(0, 1, picked)
        return
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), picked)
        dist.barrier()  # a process that ends while another still talks to it can be aborted by its own gloo threads
    finally:
        dist.destroy_process_group()
