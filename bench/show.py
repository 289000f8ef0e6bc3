"""`python -m bench show`: a finished run's table and picture, from its JSON; and how every suite ends."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click

from .plot import draw
from .record import Record, read, table, write


def require_matplotlib() -> None:
    """Raises click.ClickException before the work is done rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("matplotlib is not installed; pip install 'tarflow_fast[bench]'")


def finish(record: Record, path: Path) -> None:
    """Write the JSON and the PNG, print the table; raise click.ClickException (exit code 1) if something failed."""
    write(record, path)
    picture = path.with_suffix(".png")
    draw(record, picture)
    click.echo(table(record))
    click.echo(f"\n{path}\n{picture}")
    problems = []
    failed = sum(not cell["check"]["passed"] for cell in record["cells"])
    if failed:
        problems.append(f"{failed} of {len(record['cells'])} checks failed; what failed was not timed")
    if any((cell.get(part) or {}).get("failed") for cell in record["cells"] for part in ("engine", "cuda")):
        problems.append("an engine's step went wrong and was not timed")
    problems += record.get("failures", [])
    if not (record.get("tests") or {"ok": True})["ok"]:
        problems.append("the tests failed:\n" + "\n".join(record["tests"]["tail"]))
    for run in (record.get("sanitizer") or {"runs": []})["runs"]:
        if run["outcome"] != "ok":
            problems.append(f"the CUDA engine's small run, {run['name']}: {run['outcome']}\n" + "\n".join(run["tail"]))
    if problems:
        raise click.ClickException("\n".join(problems))


@click.command("show")
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def show_command(path: Path) -> None:
    """Print the table of a run, and draw its PNG beside FILE, the JSON that the run left."""
    require_matplotlib()
    picture = path.with_suffix(".png")
    try:
        record = read(path)
        text = table(record)
        draw(record, picture)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, LookupError, TypeError) as error:
        raise click.BadParameter(f"not a record of this bench: {error!r}", param_hint="FILE") from error
    click.echo(f"{text}\n\n{picture}")
