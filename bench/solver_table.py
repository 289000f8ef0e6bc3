"""The table of a record of `bench solver`: a line for each policy in each block, and over all blocks."""

from __future__ import annotations

from typing import Any

from .columns import aligned, short

Record = dict[str, Any]

HEAD = ["block", "policy", "passes", "evaluations", "gained", "max error", "residual", "same error", "seconds"]
HEAD += ["p20-p80", "n", "faster"]
LEGEND = """\
passes: dependent steps. evaluations: tokens evaluated for each image. gained: tokens by a pass. max error: from the
sequential result of the same input. residual: as the solver states it, max |forward(x) - z|. same error: tokens that
all-Jacobi evaluates for each image until its error is no larger."""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _times(run: dict[str, Any]) -> list[str]:
    if not run["seconds"]:
        return ["-"] * 4
    faster = f"{run['ratio']['median']:.2f}x" if "ratio" in run else "1"
    return [f"{run['median']:.4g}", f"{run['p20']:.3g}-{run['p80']:.3g}", str(len(run["seconds"])), faster]


def _row(block: str, run: dict[str, Any]) -> list[str]:
    error = run["max_error"]
    return [
        block,
        run["name"],
        str(run["passes"]),
        f"{run['evaluations']:.0f}",
        f"{run['advance']:.1f}",
        "not finite" if error is None else f"{error:.1e}",
        _number(run["residual"], ".1e"),
        _number(run.get("jacobi_evaluations"), "d"),
        *_times(run),
    ]


def _total(runs: list[dict[str, Any]], tokens: int) -> list[str]:
    """One policy's runs over all blocks, of so many tokens each."""
    passes = sum(run["passes"] for run in runs)
    jacobi = [run["jacobi_evaluations"] for run in runs if "jacobi_evaluations" in run]
    timed = all(run["seconds"] for run in runs)
    return [
        "all",
        runs[0]["name"],
        str(passes),
        f"{sum(run['evaluations'] for run in runs):.0f}",
        f"{len(runs) * (tokens - 1) / passes:.1f}" if passes else "-",
        *["-"] * 2,
        str(sum(jacobi)) if len(jacobi) == len(runs) else "-",
        f"{sum(run['median'] for run in runs):.4g}" if timed else "-",
        *["-"] * 3,
    ]


def solver_lines(record: Record) -> list[str]:
    rows = [HEAD]
    solved = [cell for cell in record["cells"] if cell["runs"]]
    for cell in record["cells"]:
        block = short(cell["label"]["block"])
        rows += [_row(block, run) for run in cell["runs"]]
        if not cell["check"]["passed"]:
            rows.append([block, "FAILED", *["-"] * 10])
    if solved:
        rows += [
            _total(list(runs), solved[0]["tokens"]) for runs in zip(*(cell["runs"] for cell in solved), strict=True)
        ]
    failed = [
        f"FAILED block {cell['label']['block']}: {cell['check']['reason']}"
        for cell in record["cells"]
        if not cell["check"]["passed"]
    ]
    failed += [f"FAILED {failure}" for failure in record["failures"]]
    settings = record["settings"]
    what = f"model:   {settings['model']}, batch {settings['batch']}, guidance {short(settings['guidance'])}, "
    what += f"{settings['backend']} backend, {settings['dtype']}"
    sizes = ", ".join(f"block {cell['label']['block']} {cell['largest']:.1f}" for cell in solved)
    return [
        what,
        "",
        *aligned(rows, 2),
        "",
        *LEGEND.splitlines(),
        f"largest |x| of the sequential results: {sizes}",
        *failed,
    ]
