"""`python -m bench kernels`: what kernels compile to for every architecture, held to its limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ...common import options
from ...common.suite import Suite
from . import cuda, linted
from .compiled import Compiled, resource_usage
from .linted import cuda_findings

ARCHITECTURES = ("80", "90", "100")
EVERY = "All shapes and all tiles that there are to choose from: some 20 minutes."


def kernels(architectures: tuple[str, ...], only: str | None, every: bool) -> None:
    """Compile the Triton kernels as the engine would, and look into the CUDA engine's as built, without a GPU.

    Prints registers, spilled bytes and shared memory of each. Exit code 1 if a kernel spills, wants more registers or
    shared memory than the architecture has, or breaks a rule of `lint.py`. Triton's by default for typical shapes, in
    the tiles of first choice; CUDA's with the shared memory that the most demanding of the bench's models asks for.
    """
    faults = 0
    click.echo(f"{'kernel':<28}{'sm':>4}{'registers':>11}{'spilled':>9}{'shared':>9}  tile")
    for row in _rows(only, list(map(int, architectures)), every):
        mark = "" if row.fault is None else f"  FAULT: {row.fault}"
        mark += "".join(f"\n    later: {each}" for each in row.findings if each not in linted.faults(row.findings))
        faults += row.fault is not None
        click.echo(
            f"{row.kernel:<28}{row.architecture:>4}{row.registers:>11}{row.stack:>9}{row.shared:>9}  "
            f"{row.tile} warps={row.warps}{mark}"
        )
    if faults:
        raise click.ClickException(f"{faults} kernels spill, do not fit or break a rule")


def _rows(only: str | None, architectures: list[int], every: bool) -> Iterator[Compiled]:
    if only != "cuda":
        from tarflow_fast.kernels.launch import interpreting  # Triton is there on Linux only

        from . import triton

        if interpreting():
            raise click.ClickException("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
        yield from triton.survey(triton.WHOLE if every else triton.SHORT, architectures, every=every)
    if only != "triton":
        path = cuda.module_path()
        if path is None and only is None:
            click.echo("CUDA: not built here")
            return
        if path is None:
            raise click.ClickException("the CUDA engine was not built here; csrc/README.md says when it is")
        rows = list(cuda.survey(resource_usage(path), architectures, cuda_findings(path)))
        for absent in sorted(set(architectures) - {row.architecture for row in rows}):
            click.echo(f"CUDA: not built for {absent}")
        yield from rows


class KernelsSuite(Suite[None]):
    """Kernels are compiled and looked at here; nothing is timed, and no record is left."""

    name = "kernels"

    def commands(self) -> list[click.Command]:
        of: dict[str, Any] = {"type": ARCHITECTURES, "default": ARCHITECTURES, "help": "Compute capabilities"}
        params: list[click.Parameter] = [
            options.several("--arch", "architectures", **of),
            options.option("--only", type=click.Choice(["triton", "cuda"]), help="The kernels of one engine."),
            options.option("--every", is_flag=True, help=EVERY),
        ]
        return [click.Command(self.name, callback=kernels, params=params, help=kernels.__doc__)]


SUITE = KernelsSuite()
