"""`python -m bench kernels`: what kernels compile to for every architecture, held to its limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # Triton is there on Linux only
    from .compiled import Compiled

ARCHITECTURES = ("80", "90", "100")


@click.command("kernels")
@click.option(
    "--arch", "architectures", multiple=True, type=click.Choice(ARCHITECTURES),
    default=ARCHITECTURES, help="Compute capabilities; may be given more than once.",
)  # fmt: skip
@click.option("--only", type=click.Choice(["triton", "cuda"]), help="The kernels of one engine.")
@click.option("--every", is_flag=True, help="All shapes and all tiles that there are to choose from: some 20 minutes.")
def kernels_command(architectures: tuple[str, ...], only: str | None, every: bool) -> None:
    """Compile the Triton kernels as the engine would, and look into the CUDA engine's as built, without a GPU.

    Prints registers, spilled bytes and shared memory of each. Exit code 1 if a kernel spills, or wants more registers
    or shared memory than the architecture has. Triton's by default for typical shapes, in the tiles of first choice;
    CUDA's with the shared memory that the most demanding of the bench's models asks for.
    """
    faults = 0
    click.echo(f"{'kernel':<28}{'sm':>4}{'registers':>11}{'spilled':>9}{'shared':>9}  tile")
    for row in _rows(only, list(map(int, architectures)), every):
        mark = "" if row.fault is None else f"  FAULT: {row.fault}"
        faults += row.fault is not None
        click.echo(
            f"{row.kernel:<28}{row.architecture:>4}{row.registers:>11}{row.stack:>9}{row.shared:>9}  "
            f"{row.tile} warps={row.warps}{mark}"
        )
    if faults:
        raise click.ClickException(f"{faults} kernels spill or do not fit")


def _rows(only: str | None, architectures: list[int], every: bool) -> Iterator[Compiled]:
    from tarflow_fast.kernels.launch import interpreting

    from . import compiled, cuda_compiled

    if only != "cuda":
        if interpreting():
            raise click.ClickException("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
        cases = compiled.WHOLE if every else compiled.SHORT
        yield from compiled.survey(cases, architectures, every=every)
    if only != "triton":
        path = cuda_compiled.module_path()
        if path is None and only is None:
            click.echo("CUDA: not built here")
            return
        if path is None:
            raise click.ClickException("the CUDA engine was not built here; csrc/README.md says when it is")
        rows = list(cuda_compiled.survey(cuda_compiled.resource_usage(path), architectures))
        for absent in sorted(set(architectures) - {row.architecture for row in rows}):
            click.echo(f"CUDA: not built for {absent}")
        yield from rows
