"""What a model of time says of the CUDA kernel on an H100 or H200, at real sizes and without a GPU.

The emulation runs the kernel's own source, and csrc/cuda/emulation/timing.h counts what each thread waits for. All that
is printed is a model's figure and no measurement. `python tests/cuda_depth.py` prints the cases of CASES.

    time of a step = T(n + 1 steps) − T(n steps) over fewer layers, scaled to all layers

The launches that are compared begin at the middle token, T/2, and have LAYERS layers; what is not proj_in, proj_out or
the update of tokens is scaled to the model's layers. The L2 cache is made smaller where it needs to be, to half of what
a step of so few layers reads: weights and keys are then forgotten from one step to the next, as they are in the whole
model, but not within a layer.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from cuda_emulation import SOURCES, build

from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.models.config import TarFlowConfig
from tarflow_fast.models.tarflow import TarFlow

# As in csrc/cuda/params.h, and in emulation/timing.h.
PHASES = ("EMBED", "QKV", "ATTENTION", "PROJ", "FC1", "FC2", "PROJ_OUT", "update")
SECTIONS = (
    "other", "staging", "norm", "multiply", "sums", "epilogue", "attend", "merge", "fetch", "update", "await", "barrier"
)  # fmt: skip
CAUSES = ("instructions", "shared memory", "L2", "DRAM", "tensor cores", "sync_block", "barrier", "sent data")
TOTALS = ("dram", "l2", "shared", "waited", "flights", "instructions")
ONCE = ("EMBED", "PROJ_OUT", "update")  # the phases that do not come once a layer
MULTIPROCESSORS = 132
DRAM = {"H100": 3.0e12, "H200": 4.3e12}  # bytes/s, what copies attain
L2_BYTES = 40e6
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """A step of a model, or a pass over a window of each sample, whose model has so many layers."""

    config: TarFlowConfig
    batch: int
    guided: bool
    window: int = 0  # tokens of each sample in a parallel pass, or 0 for a sequential step


AFHQ = TarFlowConfig(3, 256, 8, 768, 8, 8, num_classes=3)
CASES = {
    "afhq-b1": Case(AFHQ, 1, True),
    "afhq-b16": Case(AFHQ, 16, True),
    "afhq-window64": Case(AFHQ, 1, True, window=32),
}


@dataclass(frozen=True)
class Timing:
    """A model's times. spent: (phases, sections) µs along the critical path; causes: (causes,) µs along it; totals:
    (phases, sections, totals), of all threads."""

    microseconds: float
    spent: np.ndarray
    causes: np.ndarray
    totals: np.ndarray


@functools.cache
def timed() -> ModuleType:
    """Returns the module `_cuda` with the model of time, for bf16."""
    sources = [SOURCES / "kernel_bf16.cu", SOURCES / "bindings.cpp", *SOURCES.glob("emulation/*.cpp")]
    return build("_cuda", sources, ["-DTARFLOW_WARPS=8", "-DTARFLOW_TIMED"])


def last_timing(native: ModuleType) -> Timing:
    """Returns what the model says of the last launch."""
    library = ctypes.CDLL(native.__file__)
    library.tarflow_timing.restype = ctypes.c_char_p
    found = json.loads(library.tarflow_timing())
    spent = np.array(found["spent"]).reshape(len(PHASES), len(SECTIONS))
    totals = np.array(found["totals"]).reshape(len(PHASES), len(SECTIONS), len(TOTALS))
    return Timing(found["microseconds"], spent, np.array(found["causes"]), totals)


def set_gpu(native: ModuleType, **values: float) -> None:
    """Sets parameters of the model, by their names in emulation/timing.h."""
    for name, value in values.items():
        if not ctypes.CDLL(native.__file__).tarflow_set_gpu(name.encode(), ctypes.c_double(value)):
            raise KeyError(name)


def step(case: Case, gpu: str = "H200", sinks: bool = False, **values: float) -> Timing:
    """Returns the model's time of one step or pass of a case, scaled to all layers.

    gpu: a key of DRAM. sinks: whether loads may sink to their first use, unless a sync_warp holds them.
    values: other parameters of the model.
    """
    native = timed()
    native.set_device(MULTIPROCESSORS, 227 * 1024)
    ratio = case.config.layers_per_block / LAYERS
    set_gpu(native, dram=DRAM[gpu], l2_bytes=min(L2_BYTES, step_bytes(case) / 2), sinks=sinks, **values)
    engine = _engine(case.config)
    first, second = (_run(engine, case, native, count) for count in (1, 2))
    scale = np.array([1.0 if name in ONCE else ratio for name in PHASES])
    spent = (second.spent - first.spent) * scale[:, None]
    time = spent.sum()
    causes = second.causes - first.causes
    totals = (second.totals - first.totals) * scale[:, None, None]
    return Timing(float(time), spent, causes * time / causes.sum(), totals)


def step_bytes(case: Case) -> float:
    """Returns the bytes of weights and of keys and values that a step at token T/2 reads in LAYERS layers."""
    shape = case.config.block_shape
    keys = case.batch * (2 if case.guided else 1) * shape.tokens // 2 * 2 * shape.channels
    return 2.0 * LAYERS * (shape.channels * (4 * shape.channels + 2 * shape.hidden) + keys)


@functools.cache
def _engine(config: TarFlowConfig) -> CudaEngine:
    cuda_engine.load_native = timed
    torch.manual_seed(0)
    model = TarFlow(**asdict(replace(config, layers_per_block=LAYERS, num_blocks=1)))
    return CudaEngine(model.block_weights(0), device=torch.device("cpu"), dtype=torch.bfloat16)


def _run(engine: CudaEngine, case: Case, native: ModuleType, count: int) -> Timing:
    T, D = engine.shape.tokens, engine.shape.token_dim
    z = torch.randn(case.batch, T, D)
    guidance = Guidance(2.0) if case.guided else Guidance()
    condition = Condition(torch.zeros(case.batch, dtype=torch.long), guidance)
    state = engine.begin(z, condition)
    state.cache.keys_values.zero_()
    if case.window:
        trail: Any = SimpleNamespace(values=torch.zeros(4, case.batch, T), tol=0.0, stream=0.0, rounding=0.0)
        engine.iterate_on_device(
            state, state.x.clone(), [T // 2] * case.batch, trail, window=case.window, max_passes=count
        )
    else:
        engine.reverse(state, start=T // 2, stop=T // 2 + count)
    return last_timing(native)


def table(name: str, timing: Timing, gpu: str) -> str:
    """Returns the critical path by phase and section, and what each phase moves, as text."""
    lines = [f"{name}: {timing.microseconds:.1f} µs on {gpu} parameters — a model's figure, not a measurement"]
    columns = [j for j in range(len(SECTIONS)) if timing.spent[:, j].sum() > 0.05]
    head = "".join(f"{SECTIONS[j]:>9}" for j in columns)
    lines.append(f"  {'µs':9}{head}{'all':>9}{'DRAM MB':>9}{'L2 MB':>8}{'in flight':>10}")
    for i, phase in enumerate(PHASES):
        dram, l2, _, waited, flights, _ = timing.totals[i].sum(0)
        cells = "".join(f"{timing.spent[i, j]:9.1f}" for j in columns)
        flying = f"{flights / waited:10.1f}" if waited else f"{'':10}"
        lines.append(f"  {phase:9}{cells}{timing.spent[i].sum():9.1f}{dram / 1e6:9.1f}{l2 / 1e6:8.1f}{flying}")
    cells = "".join(f"{timing.spent[:, j].sum():9.1f}" for j in columns)
    lines.append(f"  {'all':9}{cells}{timing.microseconds:9.1f}")
    causes = ", ".join(f"{cause} {time:.1f}" for cause, time in zip(CAUSES, timing.causes, strict=True))
    lines.append(f"  waiting for: {causes} µs")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--gpu", default="H200", choices=DRAM)
    parser.add_argument("--sinks", action="store_true", help="let loads sink to their first use, as a compiler may")
    options = parser.parse_args(arguments)
    for name in options.cases:
        print(table(name, step(CASES[name], options.gpu, options.sinks), options.gpu), flush=True)


if __name__ == "__main__":
    main()
