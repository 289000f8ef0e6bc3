"""The tables of a record of `bench auto`: a line for each contestant, and for each cell what auto chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .columns import aligned, short

Record = dict[str, Any]
Cell = dict[str, Any]

RUNS = ["passes", "evaluations", "seconds", "p20-p80", "n", "faster", "max error"]
VERDICTS = ["best fixed", "auto / best", "p20-p80", "first", "runs", "windows", "rule"]
LEGEND = """\
passes: dependent steps of all blocks. evaluations: tokens evaluated for each image. faster: than sequential, side by
side; - where a window was too slow to be timed again (n: of its first runs). max error: from the sequential result.
auto / best: time of auto, settled, over that of the best fixed choice, median over the rounds; the rule is at most
{allowed:g}. The best is the fixed choice of the least median, which with few rounds is luck in part, to auto's
disadvantage. first: auto's very first run, set-up included, over sequential's median. runs: until auto settled; + if it
did not. windows: of auto by block, in the order of sampling; 1 is the sequential pass."""


def _label(cell: Cell) -> list[str]:
    return [short(value) for value in cell["label"].values()]


def _row(run: dict[str, Any]) -> list[str]:
    return [
        run["name"],
        str(run["passes"]),
        f"{run['evaluations']:.0f}",
        f"{run['median']:.4g}",
        f"{run['p20']:.3g}-{run['p80']:.3g}",
        str(len(run["seconds"])),
        "1" if run["name"] == "sequential" else f"{run['ratio']['median']:.2f}x" if "ratio" in run else "-",
        f"{run['max_error']:.1e}",
    ]


def _runs(cell: Cell) -> Iterator[list[str]]:
    for run in cell["runs"]:
        yield [*_label(cell), *_row(run)]
    for what, outs in (("not run", cell["not_run"]), ("FAILED", cell["left_out"])):
        for out in outs:
            yield [*_label(cell), out["name"], *["-"] * 6, what]


def _verdict(cell: Cell) -> list[str]:
    verdict = cell["verdict"]
    if verdict is None:
        return [*_label(cell), *["-"] * 6, "FAILED"]
    settling, ratio = cell["settling"], verdict["ratio"]
    return [
        *_label(cell),
        verdict["best"],
        f"{verdict['slower']:.3f}",
        f"{1 / ratio['p80']:.3g}-{1 / ratio['p20']:.3g}",
        f"{cell['first']:.2f}",
        f"{len(settling['runs'])}{'' if settling['settled'] else '+'}",
        " ".join(map(str, reversed(settling["runs"][-1]["windows"]))),
        "met" if verdict["met"] else "FAILED",
    ]


def _costs(cell: Cell) -> Iterator[str]:
    for what, costs in zip(("auto", "again"), cell["costs"], strict=False):
        token = costs["token"]
        passes = ", ".join(f"of {width} {seconds / token:.3g}" for width, seconds in costs["passes"])
        yield f"{', '.join(_label(cell))}, {what}: token {1e3 * token:.3g} ms; passes, in tokens: {passes}"


def auto_lines(record: Record) -> list[str]:
    cells = record["cells"]
    labels = list(cells[0]["label"])
    runs = [[*labels, "run", *RUNS], *(row for cell in cells for row in _runs(cell))]
    verdicts = [[*labels, *VERDICTS], *(_verdict(cell) for cell in cells)]
    backends = ", ".join(dict.fromkeys(cell["backend"] for cell in cells))
    reasons = [
        f"{', '.join([*_label(cell), out['name']])}: {out['reason']}" for cell in cells for out in cell["not_run"]
    ]
    failed = [
        f"FAILED {', '.join(_label(cell))}: {cell['check']['reason']}" for cell in cells if not cell["check"]["passed"]
    ]
    return [
        f"backend: {backends}",
        "",
        *aligned(runs, len(labels) + 1),
        "",
        *aligned(verdicts, len(labels) + 1),
        "",
        *LEGEND.format(allowed=record["settings"]["allowed"]).splitlines(),
        "",
        "costs, as auto measured them and measured again:",
        *(line for cell in cells for line in _costs(cell)),
        *(["", "not run:", *reasons] if reasons else []),
        *failed,
        *(f"FAILED {failure}" for failure in record["failures"]),
    ]
