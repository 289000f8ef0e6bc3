"""`python -m bench`: the commands of every suite, and `show` to look at a finished run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tarflow_fast import TarFlowError

from .common.plot import require_matplotlib
from .common.record import read
from .suites import find_suites, suite_of


class _Group(click.Group):
    """The commands of every suite that there is; a failure that is not a bug is one line and exit code 1."""

    def _found(self) -> dict[str, click.Command]:
        return {suite.name: suite.command() for suite in find_suites()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*self._found(), *self.commands])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return self.commands.get(name) or self._found().get(name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TarFlowError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Measure tarflow_fast against its peers and against the machine's own limits.

    Every suite checks results before it shows a time, measures the candidates side by side in one process
    (A B A B …), and gives ratios with their spread. Beside them stands the roofline: what the arithmetic
    and the memory traffic cost at the rates that this machine reached in the same run.

    A run leaves one JSON file with every sample, the machine, the versions and the commit, and a PNG drawn from
    it; a table is printed. Use an idle machine: a second process on the same cores spoils both sides unevenly.
    Exit codes: 0 done, 1 a check or the run failed, 2 wrong usage.

    Example: python -m bench peers --ml-tarflow PATH, with PATH a checkout of github.com/apple/ml-tarflow.
    """


@main.command()
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def show(path: Path) -> None:
    """Print the table of a run, and draw its PNG beside FILE, the JSON that the run left."""
    require_matplotlib()
    picture = path.with_suffix(".png")
    try:
        record = read(path)
        suite = suite_of(record)
        text = suite.table(record)
        suite.draw(record, picture)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, LookupError, TypeError) as error:
        raise click.BadParameter(f"not a record of this bench: {error!r}", param_hint="FILE") from error
    click.echo(f"{text}\n\n{picture}")


if __name__ == "__main__":
    main(prog_name="python -m bench")
