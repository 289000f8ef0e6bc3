"""The table of a record of `bench load`: a line for each task at each number of threads."""

from __future__ import annotations

from typing import Any

from .columns import aligned, counted

Record = dict[str, Any]
Cell = dict[str, Any]

HEAD = ["task", "threads", "quiet", "busy", "n", "slowdown", "p20-p80", "fair", "spin", "/ fair", "/ spin", "max error"]
LEGEND = """\
quiet, busy: seconds of one call, medians. slowdown: busy / quiet, round by round. fair: max(1, (t + n)/c) of t threads
beside n busy processes on c cores. spin: slowdown of as many threads that never wait for each other, measured in the
same rounds. / fair, / spin: slowdown over these two. max error: between quiet and busy results."""


def _row(cell: Cell) -> list[str]:
    label, error = cell["label"], cell["check"]["max_error"]
    start = [label["task"], str(label["threads"])]
    if not cell["runs"]:
        return [*start, "FAILED", *["-"] * 8, "-" if error is None else f"{error:.1e}"]
    runs = {run["name"]: run for run in cell["runs"]}
    slowdown = runs["busy"]["slowdown"]
    return [
        *start,
        f"{runs['quiet']['median']:.4g}",
        f"{runs['busy']['median']:.4g}",
        str(len(runs["busy"]["seconds"])),
        f"{slowdown['median']:.2f}",
        f"{slowdown['p20']:.2f}-{slowdown['p80']:.2f}",
        f"{cell['fair']:.2f}",
        f"{runs['spin busy']['slowdown']['median']:.2f}",
        f"{cell['over_fair']:.2f}",
        f"{cell['over_spin']['median']:.2f}",
        f"{error:.1e}",
    ]


def _named(cell: Cell) -> str:
    return f"{cell['label']['task']} on {counted(cell['label']['threads'], 'thread')}"


def load_lines(record: Record) -> list[str]:
    settings, cells = record["settings"], record["cells"]
    timed = [cell for cell in cells if cell["runs"]]
    missed = [f"{_named(cell)} ({cell['over_fair']:.2f})" for cell in timed if cell["over_fair"] > settings["target"]]
    verdict = f"target: at most {settings['target']:g} times the fair share, "
    verdict += f"missed by {', '.join(missed)}" if missed else "met by all that was timed"
    return [
        f"model:   {settings['model']}, batch {settings['batch']}, {settings['dtype']}, density {settings['density']}; "
        f"OMP_WAIT_POLICY {settings['omp_wait_policy'] or 'not set'}",
        f"load:    {counted(settings['busy'], 'busy process', 'es')} on {counted(settings['cores'], 'core')}; "
        f"load average before that {record['machine']['load_average']}",
        "",
        *aligned([HEAD, *map(_row, cells)], 1),
        "",
        *LEGEND.splitlines(),
        verdict,
        *(f"FAILED {_named(cell)}: {cell['check']['reason']}" for cell in cells if not cell["check"]["passed"]),
    ]
