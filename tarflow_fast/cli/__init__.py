"""`tarflow-fast` is the command line: each command has a file of its own, and imports torch when it runs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import TarFlowWarning
from .check import check_command
from .convert import convert_command
from .eval import eval_command
from .fid import fid_command
from .flows import flows_command
from .info import info_command
from .messages import error_text, in_flags
from .options import Command
from .prepare_stats import prepare_stats_command
from .sample import sample_command
from .terminal import (
    FAILED,
    INTERRUPTED,
    TERMINATED,
    Interrupted,
    Terminated,
    echo,
    give_up_output,
    lost_stop,
    one_line,
    stoppable,
)
from .train import train_command
from .tune import tune_command


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Shows each TarFlowWarning as one line on standard error, unless the command is to be quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TarFlowWarning)
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            context = click.get_current_context(silent=True)
            if not issubclass(category, TarFlowWarning):
                show_others(message, category, *where, **more)
            elif context is None or not context.params.get("quiet"):
                text = one_line(message)
                command = None if context is None else context.command
                echo("Warning: " + (in_flags(command, text) if isinstance(command, Command) else text), err=True)

        warnings.showwarning = show
        yield


def _stopped(stop: BaseException) -> int:
    """Tells that a signal has ended the command, and returns the exit code."""
    terminated = isinstance(stop, Terminated)
    echo(*getattr(stop, "__notes__", ()), "Terminated" if terminated else "Interrupted", err=True)
    return TERMINATED if terminated else INTERRUPTED


class _Group(click.Group):
    """A `_Group` lists commands in the order they were added, and tells failures by one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with stoppable():
            try:
                return super().main(*args, **kwargs)
            except (Interrupted, Terminated) as stop:  # before the command began, or after its end
                sys.exit(_stopped(stop))
            except OSError as error:  # --help and the like fail here, as click prints their text
                give_up_output()
                echo(f"Error: {error_text(error)}", err=True)
                sys.exit(FAILED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except (KeyboardInterrupt, Interrupted, Terminated) as stop:
            ctx.exit(_stopped(stop))
        except Exception as error:
            if (lost := lost_stop(error)) is not None:
                ctx.exit(_stopped(lost))
            if isinstance(error, click.ClickException):
                vars(error)["message"] = one_line(error.message)
            raise


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="""\b
Exit codes: 0 done, 1 failed (one line on standard error), 2 wrong usage, 130 interrupted (Ctrl-C),
143 terminated.

\b
Examples:
  tarflow-fast sample                        a grid of images from the shipped model, samples.png
  tarflow-fast sample -m model.pth -n 16     16 images from an ml-tarflow checkpoint
  tarflow-fast info                          which backends can run here, and why
  tarflow-fast check                         prove the backends of a GPU on this device
  tarflow-fast COMMAND --help                what a command can do, with examples
""",
)
@click.option(
    "--traceback",
    is_flag=True,
    envvar="TARFLOW_FAST_TRACEBACK",
    help="Show Python's traceback of a failure, as TARFLOW_FAST_TRACEBACK=1 does too.",
)
@click.version_option(package_name="tarflow_fast", prog_name="tarflow-fast", message="%(prog)s %(version)s")
def main(traceback: bool) -> None:
    """Fast sampling from TarFlow, the transformer autoregressive flow, and all that goes with it."""
    # OpenMP's libraries read this when torch loads them, which it does in a command. Beside other processes torch's
    # threads would spin while they wait for one that has no core, and keep that core from it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (
    *(sample_command, train_command, eval_command, convert_command, info_command, check_command),
    *(fid_command, prepare_stats_command, tune_command, flows_command),
):
    main.add_command(command)
