"""`python -m bench kernels`: compile every Triton kernel for every architecture, and hold it to its limits."""

from __future__ import annotations

import click

ARCHITECTURES = ("80", "90", "100")


@click.command("kernels")
@click.option(
    "--arch", "architectures", multiple=True, type=click.Choice(ARCHITECTURES),
    default=ARCHITECTURES, help="Compute capabilities; may be given more than once.",
)  # fmt: skip
@click.option("--every", is_flag=True, help="All shapes and all tiles that there are to choose from: some 20 minutes.")
def kernels_command(architectures: tuple[str, ...], every: bool) -> None:
    """Compile the Triton kernels as the engine would, for each architecture, without a GPU.

    Prints registers, spilled bytes and shared memory of each. Exit code 1 if a kernel spills, or wants more shared
    memory than the architecture has. By default for typical shapes, in the tiles of first choice.
    """
    # Triton is there on Linux only
    from tarflow_fast.kernels.launch import interpreting

    from .compiled import SHORT, WHOLE, survey

    if interpreting():
        raise click.ClickException("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    faults = 0
    click.echo(f"{'kernel':<28}{'sm':>4}{'registers':>11}{'spilled':>9}{'shared':>9}  tile")
    for row in survey(WHOLE if every else SHORT, map(int, architectures), every=every):
        mark = "" if row.fault is None else f"  FAULT: {row.fault}"
        faults += row.fault is not None
        click.echo(
            f"{row.kernel:<28}{row.architecture:>4}{row.registers:>11}{row.stack:>9}{row.shared:>9}  {row.tile}{mark}"
        )
    if faults:
        raise click.ClickException(f"{faults} kernels spill or do not fit")
