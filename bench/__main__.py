"""`python -m bench`: one subcommand a suite, and `show` to look at a finished run again."""

from __future__ import annotations

from typing import Any

import click

from tarflow_fast import TarFlowError

from .auto import auto_command
from .cpu import cpu_command
from .density import density_command
from .gpu import gpu_command
from .kernels import kernels_command
from .load import load_command
from .peers import peers_command
from .show import show_command
from .solver import solver_command


class _Group(click.Group):
    """A failure that is not a bug is one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TarFlowError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
)
def main() -> None:
    """Measure tarflow_fast against its peers and against the machine's own limits.

    Every suite checks results before it shows a time, measures the contestants side by side in one process
    (A B A B …), and gives ratios with their spread. Beside them stands the roofline: what the arithmetic
    and the memory traffic cost at the rates that this machine reached in the same run.

    A run leaves one JSON file with every sample, the machine, the versions and the commit, and a PNG drawn from
    it; a table is printed. Use an idle machine: a second process on the same cores spoils both sides unevenly.

    \b
    Exit codes: 0 done, 1 a check or the run failed, 2 wrong usage.

    \b
    Examples:
      git clone https://github.com/apple/ml-tarflow ../ml-tarflow
      python -m bench peers --ml-tarflow ../ml-tarflow --threads 2
      python -m bench peers --ml-tarflow ../ml-tarflow --config small --batch 1 --repeat 9
      python -m bench gpu --ml-tarflow ../ml-tarflow
      python -m bench solver --batch 16
      python -m bench auto --batch 16
      python -m bench density --threads 2
      python -m bench load
      python -m bench show bench/results/NAME.json
    """


for command in (
    peers_command,
    cpu_command,
    gpu_command,
    kernels_command,
    solver_command,
    auto_command,
    density_command,
    load_command,
    show_command,
):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="python -m bench")
