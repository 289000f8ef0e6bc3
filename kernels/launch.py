"""The parts that all kernels and launchers share: checks of operands, the interpreter, and dependent launches.

Kernels of one pass depend on each other in a chain, and each is over in microseconds, so what counts is how soon one
follows the other. On Hopper and later, a kernel may be launched while the one before still runs (*programmatic
dependent launch*, PDL). Every kernel therefore begins in the same order:

    1. `prefetch_lines` asks for its weights, which no kernel writes, to be brought from memory to the L2 cache;
    2. `launch_dependents` lets the kernel after it start doing the same;
    3. `wait` waits until all that the kernels before it have written can be seen.

Before 3, nothing is read that a kernel before may write, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tarflow_fast.checks import short
from tarflow_fast.errors import ArgumentError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that weights, keys and values may have."""


def interpreting() -> bool:
    """Returns whether kernels run in Triton's interpreter (the environment variable TRITON_INTERPRET), on the CPU."""
    return bool(triton.knobs.runtime.interpret)


INTERPRETING = tl.constexpr(interpreting())


def can_launch(device: torch.device) -> bool:
    """Returns whether kernels can run on tensors of this device, or be recorded for "meta", which has none."""
    return device.type in ("cuda", "meta") or (interpreting() and device.type == "cpu")


def dependent_launch(device: torch.device) -> bool:
    """Returns whether this device has programmatic dependent launch: compute capability 9.0 or higher."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def padded(size: int) -> int:
    """Returns the size of the block that holds so many values: a power of two, and enough for tensor cores."""
    return max(triton.next_power_of_2(size), 16)


def check_operand(
    name: str,
    x: Tensor,
    shape: Sequence[int],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
) -> Tensor:
    """Returns x if it is a contiguous tensor of this shape (−1: any size), one of these dtypes, and this device.

    Raises ArgumentError otherwise.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if not isinstance(x, Tensor):
        raise ArgumentError(name, f"a tensor of shape {tuple(shape)}", type(x).__name__)
    if x.dim() != len(shape) or any(want not in (-1, got) for want, got in zip(shape, x.shape, strict=True)):
        raise ArgumentError(name, f"shape {tuple(shape)}", tuple(x.shape))
    if x.dtype not in allowed:
        raise ArgumentError(name, " or ".join(map(short, allowed)), short(x.dtype))
    if device is not None and x.device != device:
        raise ArgumentError(name, f"a tensor on {device}", str(x.device))
    if not x.is_contiguous():
        raise ArgumentError(name, "a contiguous tensor", f"strides {x.stride()}")
    return x


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, which is launched by calling this object.

    constants: what the kernel is compiled for. warps: the number of warps of a program. pdl: whether this is a
    programmatic dependent launch. registers: the most that a thread may have, by default the compiler's choice.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, object]
    warps: int
    pdl: bool
    registers: int | None = None

    @property
    def options(self) -> dict[str, object]:
        """Returns the launch options of Triton."""
        # Fused multiply-adds are asked for by name: whether they are the default differs among Triton's versions.
        fixed = {"num_warps": self.warps, "enable_fp_fusion": True}
        registers = {} if self.registers is None else {"maxnreg": self.registers}
        return {**fixed, **registers, **({"launch_pdl": True} if self.pdl else {})}

    def __call__(self) -> None:
        """Launch the kernel."""
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)

    def compile(self) -> None:
        """Compile the kernel for the device at hand, without launching it."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self.constants, **self.options)


_record: ContextVar[list[Launch] | None] = ContextVar("record", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launch nothing within this context: the launches that would be made are gathered in the list that it gives."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def launch(this: Launch) -> None:
    """Launch a kernel, or record the launch within `recording`."""
    record = _record.get()
    if record is None:
        this()
    else:
        record.append(this)


@triton.jit
def wait():
    """Wait until the kernels before this one are over and what they wrote can be seen."""
    gdc_wait()


@triton.jit
def launch_dependents():
    """Let the next kernel start, which waits by itself for what it needs of this one."""
    gdc_launch_dependents()


@triton.jit
def prefetch_lines(pointer, mask):
    """Ask for the 128-byte lines at these addresses to be brought to L2. pointer, mask: blocks of one shape."""
    address = pointer.to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns acc + a b, with fp32 sums. a, b: blocks of one dtype.

    PRECISION: "ieee" or "tf32", for products of fp32.
    """
    if INTERPRETING:  # which would multiply the bits of bf16 values; their products are exact in fp32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@dataclass(frozen=True)
class Scratch:
    """Memory in which the programs that share a tile of a result meet: each leaves its part, and the last adds them up.

    partial: fp32. arrived: int32 counters, which are zero before and after each kernel. One kernel uses a scratch at a
    time, so one suffices for all kernels of a chain.
    """

    partial: Tensor
    arrived: Tensor

    @classmethod
    def allocate(cls, partial: int, arrived: int, device: torch.device) -> Scratch:
        """Returns a scratch of so many values and counters, at least one of each."""
        return cls(
            torch.empty(max(partial, 1), dtype=torch.float32, device=device),
            torch.zeros(max(arrived, 1), dtype=torch.int32, device=device),
        )

    @classmethod
    def fitting(cls, given: Scratch | None, partial: int, arrived: int, device: torch.device) -> Scratch:
        """Returns `given`, or a new scratch if it is None. Raises ArgumentError if it is too small."""
        if given is None:
            return cls.allocate(partial, arrived, device)
        if given.partial.numel() < partial or given.arrived.numel() < arrived:
            raise ArgumentError(
                "scratch",
                f"{partial} values and {arrived} counters",
                f"{given.partial.numel()} and {given.arrived.numel()}",
            )
        return given


@triton.jit
def arrive(counter):
    """Returns how many programs have arrived at this counter before. What they stored before can be read afterwards."""
    tl.debug_barrier()  # all threads of this program have stored their part
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return before
