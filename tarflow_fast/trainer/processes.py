"""A run is shared by its processes: one, or as many as `torchrun` started."""

from __future__ import annotations

import gc
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import check_device, pick_device
from ..errors import ArgumentError, BackendError, ProcessLost, TrainingStopped
from .lifeline import Lifeline

JOIN_TIMEOUT = timedelta(minutes=10)  # all processes have so long to start
NOTICE_SECONDS = 5.0  # word of which process is gone comes so long after the failure of a collective


@dataclass(frozen=True)
class Processes:
    """A `Processes` is this process among all: number `rank` of `world`, on one device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Returns x, into which the sum over processes is put."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Returns x, into which the mean over processes is put."""
        return self.sum(x).div_(self.world)

    def any(self, flag: bool) -> bool:
        """Returns whether any process has its flag up."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.world > 1:
            self.any(False)


def _environment_count(name: str, default: int, low: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < low:
        raise ArgumentError(name, f"an integer >= {low} in the environment", repr(text))
    return int(text)


def _device(name: str, local_rank: int) -> torch.device:
    """Returns the device of that name: for "auto" a GPU where there is one, else the CPU; of GPUs that of this process.

    Raises ArgumentError for a device that cannot be had.
    """
    try:
        device = pick_device(None if name == "auto" else name, ("cuda", "cpu"))
        return check_device(f"cuda:{local_rank}") if device.type == "cuda" and name in ("auto", "cuda") else device
    except BackendError as error:
        raise ArgumentError("device", "a device of this machine", f"{name!r} ({error})") from error


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the process group that torchrun's environment names, if any (gloo on CPUs, NCCL on GPUs).

    Where one of the processes ends before its time, the others do within a minute: by ProcessLost, or, where they hang
    in a collective, by a line on standard error and exit code 1.
    """
    world = _environment_count("WORLD_SIZE", 1, 1)
    picked = _device(device, _environment_count("LOCAL_RANK", 0, 0))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world == 1:
        yield Processes(0, 1, picked)
        return
    lifeline = _join("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), picked)
        dist.barrier()  # a process that ends while another still talks to it can be aborted by its own gloo threads
    except TrainingStopped:  # all processes stop at once
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # DistributedDataParallel in the frames would keep the group
        if _is_of_collective(error):
            reason = lifeline.wait(NOTICE_SECONDS) or f"a process of this run is gone ({_gist(error)})"
            lifeline.fail(reason)
            raise ProcessLost(reason) from None
        lifeline.fail(str(error))
        raise
    except BaseException as error:
        lifeline.fail(type(error).__name__)
        raise
    finally:
        gc.collect()  # DistributedDataParallel lies in cycles
        dist.destroy_process_group()
        lifeline.close()


def _join(backend: str) -> Lifeline:
    # This module's functions have as a default argument the group of the moment when it is first imported, which
    # DistributedDataParallel does. That must not be this group: its threads would outlive destroy_process_group, and a
    # thread that is there when the interpreter goes can abort the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        lifeline = Lifeline(store, rank, world, os.environ["MASTER_ADDR"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise BackendError(f"the {os.environ['WORLD_SIZE']} processes did not come together: {_gist(error)}") from error
    return lifeline


def _is_of_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _gist(error: Exception) -> str:
    """Returns the first line of the error, without the place in gloo's sources."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rpartition("] ")[2]
