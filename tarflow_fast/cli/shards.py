"""`tarflow-fast sample --out FOLDER` draws any number of images, by any number of processes, into shards."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..sizes import by
from .labels import Chosen
from .options import print_json
from .terminal import echo

if TYPE_CHECKING:
    from ..evaluation import Extractor
    from ..sampling.sampler import Sampler
    from ..sampling.sharded import Format, Run

FORMATS = ("npz", "png", "tar", "features")
OF_A_GRID = ("columns", "scale", "singles", "npz", "gif")
OF_SHARDS = ("shards", "shard_size", "inception", "dry_run")


def wants_shards(given: dict[str, Any]) -> bool:
    """Returns whether --out names a folder, not the file of a grid: it has no suffix, or is there, or ends in "/"."""
    out = given["out"]
    if out is None:
        return False
    path = Path(out)
    return out.endswith(("/", os.sep)) or not path.suffix or path.is_dir()


def check_options(given: dict[str, Any]) -> None:
    """Raises click.UsageError for options of another kind of output than --out has.

    given: the options by name; those that were not given are None or False.
    """
    shards = wants_shards(given)
    for name in OF_A_GRID if shards else OF_SHARDS:
        if given[name] not in (None, False):
            flag = name.replace("_", "-")
            what = "a folder, where shards go" if shards else "no folder; shards need one"
            raise click.UsageError(f"--{flag} has no effect where --out is {what}")
    if given["inception"] is not None and given["shards"] != "features":
        raise click.UsageError("--inception has no effect without --shards features")


def draw_shards(
    sampler: Sampler,
    folder: Path,
    n: int,
    chosen: Chosen,
    given: dict[str, Any],
    rule: dict[str, Any],
    *,
    network: Extractor | None,
    bars: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Draws n images into shards, or with --dry-run tells what it would take, and prints what was done.

    Of several processes the first one prints. given: the options by name. rule: guidance and denoising. network:
    what makes features, where shards hold them.
    """
    from ..sampling.sharded import SHARD_SIZE, Run, estimate

    run = Run(
        sampler,
        folder,
        n,
        chosen.labels,
        seed=given["seed"],
        first=given["first"],
        format=_format(given["shards"], network),
        shard_size=given["shard_size"] or SHARD_SIZE,
        rule={**rule, "on_nonfinite": given["on_nonfinite"]},
    )
    if given["dry_run"]:
        facts = estimate(run, given["batch_size"])
        lines = _estimate_lines(run, facts)
    else:
        facts = run.draw(given["batch_size"], bars)
        lines = _run_lines(run, facts, chosen)
    if run.rank > 0:
        return
    if as_json:
        print_json({"out": str(folder), **facts})
    elif not quiet:
        echo(*lines)


def _format(name: str | None, network: Extractor | None) -> str | Format:
    from ..evaluation import feature_format

    return (name or FORMATS[0]) if network is None else feature_format(network)


def _run_lines(run: Run, facts: dict[str, Any], chosen: Chosen) -> list[str]:
    """Returns the lines that tell what a run did. facts: what `Run.draw` returned."""
    from ..sampling.sharded.job import MANIFEST

    guidance = run.checked.guidance
    how = f"guidance {guidance.scale:g}" if guidance.active else "unguided"
    how += ", denoised" if run.checked.denoise else ""
    shape = run.flow.data_shape
    kind, size = ("images", by(shape[1:])) if len(shape) == 3 else ("sequences", "×".join(map(str, shape)))
    lines = [
        f"{run.out}: {facts['images']} {kind} of {size} in {facts['shards']} shards ({run.format.described}), {how}",
        f"this process drew {facts['drawn']} of them in {facts['seconds']:.2f} s, "
        f"{facts['images_per_second']:.3g} {kind}/s",
    ]
    report = facts["report"]
    if report is not None:
        lines.append(
            f"backend {report['backend']} ({report['backend_reason']}), {report['device']}, {report['dtype']}, "
            f"{report['solver']} solver, batches of {report['batch_size']}"
        )
    if chosen.described is not None:
        lines.append(f"classes: {chosen.described}")
    lines.append(f"seed, options and checksums: {run.out / MANIFEST}")
    return lines


def _estimate_lines(run: Run, facts: dict[str, Any]) -> list[str]:
    """Returns the lines that tell what a run will cost. facts: what `estimate` returned."""
    duration, speed = timedelta(seconds=round(facts["seconds"])), facts["images_per_second"]
    lines = [
        f"{run.out}: {facts['images_left']} images are left to draw; nothing was written",
        f"time: {duration} with {facts['processes']} processes, {speed:.3g} images/s in all; a batch of "
        f"{facts['batch_size']} took {facts['batch_seconds']:.2f} s",
        f"memory: {_size(facts['memory'])} a process"
        + (f", {_size(facts['device_memory'])} on its GPU" if facts["device_memory"] else ""),
        f"disk: {_size(facts['disk'])}, of {_size(facts['disk_free'])} that are free",
    ]
    if facts["disk"] > facts["disk_free"]:
        lines.append("that is more than there is")
    return lines


def _size(count: int) -> str:
    """Returns a number of bytes as text."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
