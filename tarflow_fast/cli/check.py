"""`tarflow-fast check` has every backend of a GPU prove itself on this device, in the open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .options import (
    BATCH,
    DTYPES,
    Command,
    device_option,
    json_option,
    load_model,
    model_options,
    option,
    print_json,
    progress_option,
    quiet_option,
    show_progress,
    torch_dtype,
)
from .terminal import FAILED, echo

if TYPE_CHECKING:
    import torch

    from ..engine.verdict import Row, Size, Verdict
    from ..probe.job import DensityJob
    from ..probe.parent import OnRow
    from ..probe.prober import Prober
    from ..progress import Bar

    Found = tuple[str, Verdict]

BATCHES = (1, 16, 64)


@click.command(
    "check",
    cls=Command,
    aliases={"file": "--model", "backend": "--backend"},
    short_help="Prove the backends of a GPU on this device.",
    epilog="""\b
Examples:
  tarflow-fast check                             the shipped model's sizes
  tarflow-fast check model.pth --batch 16 --guidance
  tarflow-fast check model.pth --again           after a new driver that has the same version
""",
)
@click.argument("file", required=False)
@model_options
@device_option
@option(
    "--dtype", type=click.Choice(DTYPES), section="Machine", show_default="the model's", help="Of weights and cache."
)
@option(
    "--batch",
    "batches",
    type=BATCH,
    multiple=True,
    metavar="N",
    section="Machine",
    show_default="1, 16 and 64",
    help="Size of batch; give it again for more. Sizes between two powers of two share a verdict.",
)
@option(
    "--guidance/--no-guidance", default=None, section="Machine", show_default="both", help="Guided batches, or not."
)
@option("--again", is_flag=True, section="Machine", help="Forget what is known, and probe again.")
@progress_option
@quiet_option
@json_option
def check_command(
    file: str | None,
    model_path: str | None,
    device: str | None,
    dtype: str | None,
    batches: tuple[int, ...],
    guidance: bool | None,
    again: bool,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
    **which: Any,
) -> None:
    """Try each backend that a GPU has beside PyTorch, for the sizes of a model, FILE: every pass against PyTorch's, at
    the batches and tokens where kernels change, with NaN in a sample, used memory, red zones round every buffer,
    repeats to the bit. Each is tried in a process of its own, which may crash or hang. What passes serves from then on
    where --backend is auto; what fails does not, and the exit code is 1. Without a GPU it says what is missing."""
    if file is not None and model_path is not None:
        raise click.UsageError("FILE and --model are two names for one thing; give one")
    bars = show_progress(progress, quiet)
    model = load_model(model_path if file is None else file, **which)
    from ..devices import check_dtype
    from ..engine.backend import Request
    from ..engine.verdict import Size
    from ..probe.prober import Prober
    from ..progress import Bar

    on, lines = _pick(device)
    verdicts: list[Found] = []
    if on is not None:
        shapes = [stage.shape for stage in model.flow(on).stages]
        prober = Prober(shapes, Request(on, check_dtype(torch_dtype(dtype) or model.dtype, on)))
        unsupported = {name: prober.unsupported(name) for name in prober.names}
        lines += [f"{name} does not take this model: {why}" for name, why in unsupported.items() if why is not None]
        guided = (False, True) if guidance is None else (guidance,)
        sizes = [Size(batch, each) for batch in batches or BATCHES for each in guided]
        if again:
            for size in sizes:
                prober.forget(size)
        tasks = _tasks(prober, [name for name, why in unsupported.items() if why is None], sizes)
        for number, (what, find) in enumerate(tasks):
            with Bar(desc=f"{what} ({number + 1} of {len(tasks)})", unit="check", disable=not bars) as bar:
                verdicts.append((what, find(functools.partial(_advance, bar))))
    if as_json:
        found = [{"what": what, **verdict.to_dict()} for what, verdict in verdicts]
        print_json({"device": None if on is None else str(on), "notes": lines, "verdicts": found})
    elif not quiet:
        echo(*lines, *(line for what, verdict in verdicts for line in _table(what, verdict)))
    if not all(verdict.proven for _, verdict in verdicts):
        raise click.exceptions.Exit(FAILED)


def _pick(device: str | None) -> tuple[torch.device | None, list[str]]:
    """Returns the device to check, or None where there is nothing to check, and what each backend lacks that cannot
    run there."""
    from ..backend.registry import backends, candidates
    from ..devices import check_device, device_missing
    from ..engine.backend import Request

    nothing = "Nothing to check: "
    if device is None and device_missing("cuda") is not None:
        lacking = [f"  {each.name} on {each.device}: {each.reason}" for each in backends() if each.device == "cuda"]
        return None, [f"{nothing}there is no GPU here. The backends of GPUs, and what each is missing:", *lacking]
    on = check_device(device or "cuda")
    able, missing = candidates(Request(on))
    lines = [f"{name} cannot run on {on}: {why}" for name, why in missing.items()]
    if able:
        return on, lines
    return None, [f"{nothing}no backend that can run on {on} has to be proven there.", *lines]


def _tasks(prober: Prober, names: list[str], sizes: list[Size]) -> list[tuple[str, Callable[[OnRow], Verdict]]]:
    """Returns a title and a function that finds the verdict, for each backend and size, and the density's kernel."""
    from ..probe.prober import settle
    from ..probe.store import Entry, density_key

    def engine(name: str, size: Size, on_row: OnRow) -> Verdict:
        return prober.settle(name, size, on_row)

    def density(job: DensityJob, on_row: OnRow) -> Verdict:
        return settle(job, Entry(density_key(job)), on_row=on_row)

    engines = [(f"{name}, {size}", functools.partial(engine, name, size)) for name in names for size in sizes]
    return [*engines, *((job.name, functools.partial(density, job)) for job in prober.density_jobs())]


def _advance(bar: Bar, row: Row, count: int) -> None:
    bar.total = count
    bar.set_postfix_str(row.check, refresh=False)
    bar.update()


def _table(what: str, verdict: Verdict) -> list[str]:
    """Returns a line for the verdict, and one for each check: what was tried, the error, what is allowed, the time."""
    state = "proven" if verdict.proven else "FAILED"
    if len(verdict.seconds) > 1:
        state += ", " + ", ".join(f"{1000 * taken:.3g} ms by {name}" for name, taken in verdict.seconds.items())
    lines = [f"{what}: {state} ({verdict.reason})"]
    for row in verdict.rows:
        error = "" if row.error is None or row.allowed is None else f"{row.error:.1e} of {row.allowed:.1e}"
        lines.append(f"  {row.check:<44} {error:>20} {row.seconds:7.2f} s  {row.fault or 'ok'}")
    return lines
