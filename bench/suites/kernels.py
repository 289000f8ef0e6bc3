"""`python -m bench kernels`: what kernels compile to for every architecture, held to its limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import click
import torch

from tarflow_fast import TarFlow
from tarflow_fast.backend.cuda import survey as cuda
from tarflow_fast.machine_code import Compiled

from ..common import options
from ..common.models import MODELS
from ..common.suite import Suite

ARCHITECTURES = ("80", "90", "100")
ROW = "{:<28}{:>4}{:>11}{:>9}{:>9}  {}"
LARGE, SMALL = ("afhq", "imagenet"), ("small", "wide heads", "volume-preserving")
SHAPES = {name: MODELS[name].block_shape for name in (*LARGE, *SMALL)}
HALF, FULL = torch.bfloat16, torch.float32
# The Triton engine's cases: a model, images, whether they are guided, tokens at once, and the dtype.
TYPICAL: list[tuple[str, int, bool, int, torch.dtype]] = [
    *(("afhq", 16, True, 1, HALF), ("afhq", 1, False, 1, HALF), ("imagenet", 256, False, 1, HALF)),
    *(("afhq", 1, True, 64, HALF), ("small", 4, True, 1, FULL)),
]
WHOLE = [
    *((name, batch, guided, 1, HALF) for name in LARGE for batch in (1, 2, 4, 16, 128) for guided in (False, True)),
    *((name, batch, True, 1, HALF) for name in SMALL for batch in (1, 8, 64)),
    *((name, batch, False, 1, FULL) for name in SHAPES for batch in (1, 16, 64)),
    *((name, batch, False, 1, torch.float16) for name in ("afhq", "small") for batch in (1, 16)),
    *((n, b, False, tokens, d) for n in SHAPES for b in (1, 16) for tokens in (4, 48) for d in (HALF, FULL)),
]


def _triton(architectures: list[int], every: bool) -> Iterator[Compiled]:
    from tarflow_fast.backend.triton import survey as triton  # Triton is there on Linux only
    from tarflow_fast.kernels.launch import interpreting

    if interpreting():
        raise click.ClickException("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    with torch.device("meta"):
        weights = {name: TarFlow.from_config(MODELS[name]).block_weights(0) for name in SHAPES}
    cases = [triton.Case(weights[name], b, guided, t, d) for name, b, guided, t, d in (WHOLE if every else TYPICAL)]
    yield from triton.survey(cases, architectures, list(SHAPES.values()), every=every)


def _cuda(architectures: list[int], required: bool) -> Iterator[Compiled]:
    path = cuda.module_path()
    if path is None and required:
        raise click.ClickException("the CUDA engine was not built here; csrc/README.md says when it is")
    rows = [] if path is None else list(cuda.survey(path, architectures, list(SHAPES.values())))
    absent = set(architectures) - {row.architecture for row in rows}
    if absent:
        click.echo(f"CUDA: not built for {', '.join(map(str, sorted(absent)))}")
    yield from rows


class KernelsSuite(Suite):
    """Compile the Triton kernels as the engine would, and look into the CUDA engine's as built, without a GPU.

    Prints registers, spilled bytes and shared memory of each; nothing is timed, and no record is left. Exit code 1 if a
    kernel spills, wants more registers or shared memory than the architecture has, or breaks a rule of
    `tarflow_fast/machine_code/lint.py`. Triton's by default for typical shapes, in the tiles of first choice; CUDA's
    with the shared memory that the most demanding of the bench's models asks for.
    """

    name = "kernels"
    options = (
        options.several("--arch", type=ARCHITECTURES, default=ARCHITECTURES, help="Compute capabilities"),
        options.option("--only", type=click.Choice(["triton", "cuda"]), help="The kernels of one engine."),
        options.option("--every", is_flag=True, help="All shapes and all tiles: some 20 minutes."),
    )

    def run(self) -> None:
        only, architectures, faults = self.chosen.only, list(map(int, self.chosen.arch)), 0
        click.echo(ROW.format("kernel", "sm", "registers", "spilled", "shared", "tile"))
        of_triton = _triton(architectures, self.chosen.every) if only != "cuda" else ()
        for row in itertools.chain(of_triton, _cuda(architectures, only == "cuda") if only != "triton" else ()):
            mark = "" if row.fault is None else f"  FAULT: {row.fault}"
            faults += row.fault is not None
            numbers = (row.architecture, row.registers, row.stack, row.shared)
            click.echo(ROW.format(row.kernel, *numbers, f"{row.tile} warps={row.warps}{mark}"))
        if faults:
            raise click.ClickException(f"{faults} kernels spill, do not fit or break a rule")


SUITE = KernelsSuite()
