"""What the table of a record of `bench gpu` has beside its cells: tests, launches, the inside of engines."""

from __future__ import annotations

from typing import Any

from ...common.harness import ratio
from ...common.record import short, title, values
from ...common.table import MICRO, cells_table, table
from .cases import CUDA

OPERATIONS = f"{MICRO} | MB: {{megabytes:.3f}} | GB/s: {{gigabytes:.1f}} | of limit: {{of_limit:.1%}}"
PHASES = f"{MICRO} | of step: {{of_step:.1%}}"
MEMORY = (
    "step µs: {us[median]:.2f} | weights µs: {weights[0]:.2f} | of that: {weights[1]:.2f}x | "
    "all bytes µs: {bytes[0]:.2f} | of that: {bytes[1]:.2f}x"
)


def _checks(record: Any) -> list[str]:
    """What the tests and the sanitizer said; records of before the CUDA engine have no sanitizer."""
    tests, sanitizer = record["tests"], record.get("sanitizer")
    lines = ["tests:   not run"]
    if tests is not None:
        said = f"{tests['passed']} passed, {tests['failed']} failed in {tests['seconds']:.0f} s"
        lines = [f"tests:   {said}{'' if tests['ok'] else '  FAILED'}"]
    if sanitizer is not None:
        runs = [f"{run['name']} {run['outcome']} in {run['seconds']:.0f} s" for run in sanitizer["runs"]]
        said = ", ".join(runs + ([] if sanitizer["reason"] is None else [sanitizer["reason"]]))
        lines.append(f"sanitizer: {said}{'' if sanitizer['ok'] else '  FAILED'}")
    elif "sanitizer" in record:
        lines.append("sanitizer: not run")
    return lines


def _first_runs(cells: list[Any]) -> list[str]:
    """How long it takes until a candidate is ready and has run once: packing, compiling and tuning."""
    runs = [", ".join(f"{run['name']} {run['first_seconds']:.1f}" for run in cell["runs"]) for cell in cells]
    lines = [f"  {values(cell, ' ')}: {said or '-'}" for cell, said in zip(cells, runs, strict=True)]
    return ["first run, with all that is made for it, in seconds:", *lines]


def comparison(record: Any, bandwidth: float) -> list[str]:
    """Returns how many times as fast as each other candidate the CUDA engine is, round by round, and its step beside
    what memory takes for the block's weights and for all bytes, and how many times that the step is; nothing if the
    engine has not run. bandwidth: measured, in bytes per second."""
    cells = [cell for cell in record["cells"] if any(run["name"] == CUDA for run in cell["runs"])]
    others = dict.fromkeys(run["name"] for cell in cells for run in cell["runs"] if run["name"] != CUDA)
    rows = []
    for cell in cells:
        samples, cuda = {run["name"]: run["seconds"] for run in cell["runs"]}, cell.get("cuda") or {}
        times = {name: f"{ratio(samples[name], samples[CUDA])['median']:.2f}x" for name in others if name in samples}
        row: dict[str, Any] = {**times, "cell": values(cell, " "), **cuda.get("step", {})}
        if "step" in cuda:
            for name, moved in (("weights", cell["work"]["weight_bytes"]), ("bytes", cuda["bytes_per_step"])):
                row[name] = (1e6 * moved / bandwidth, row["median"] * bandwidth / moved)
        rows.append(row)
    columns = " | ".join([": {cell}", *(f"{name}: {{{name}}}" for name in others), MEMORY])
    return ["the CUDA engine: times as fast as", *table(columns, rows)] if rows else []


def _engine(cell: Any, bandwidth: float) -> list[str]:
    """What each kernel of the Triton engine takes, and its step with and without PDL."""
    engine, moved = cell["engine"], cell["engine"]["bytes_per_step"]
    steps = [{**step, "name": f"step, {step['name']}", "bytes": moved} for step in engine["steps"]]
    parts = [{**part, "bytes_per_second": part["bytes"] / part["median"]} for part in [*engine["operations"], *steps]]
    figures = [{"megabytes": part["bytes"] / 1e6, "of_limit": part["bytes_per_second"] / bandwidth} for part in parts]
    rows = [{**part, **more} for part, more in zip(parts, figures, strict=True)]
    head = f"kernels of {title(cell['label'])}; {short(engine['launches_per_token'])} launches a token"
    return [head, *table(OPERATIONS, rows), *(f"FAILED step, {reason}" for reason in engine["failed"])]


def inside(cell: Any) -> list[str]:
    """Returns what each phase of the CUDA engine's step takes, in a cell with "cuda"."""
    cuda = cell["cuda"]
    counts = f"{cuda['barriers_per_token']} barriers a token, {cuda['launches_per_pass']} launches a pass"
    head = f"inside the CUDA engine of {title(cell['label'])}; {counts}"
    if cuda["failed"]:
        return [head, *(f"FAILED {reason}" for reason in cuda["failed"])]
    parts = [{**cuda["step"], "name": "step"}]
    parts += [{**phase, "name": f"{phase['name']}, saved without it"} for phase in cuda["phases"]]
    parts += [{**cuda["barriers"], "name": "step of barriers and weights alone"}]
    rows = [{**part, "of_step": part["median"] / cuda["step"]["median"]} for part in parts]
    each = {"name": "the same for each barrier", "median": cuda["barriers"]["median"] / cuda["barriers_per_token"]}
    return [head, *table(PHASES, [*rows, each], missing="")]


def lines(record: Any) -> list[str]:
    """Returns the whole table."""
    cells, bandwidth = record["cells"], record["limits"]["copy_bandwidth"][0]["bytes_per_second"]
    found = [*cells_table(record), "", *_checks(record)]
    found += [f"{entry['name']}:    left out: {entry['reason']}" for entry in record.get("left_out", [])]
    found += [f"FAILED {failure}" for failure in record["failures"]]
    launches = table(f"empty dependent launch{MICRO}", record["launches"])
    parts = [launches, _first_runs(cells), comparison(record, bandwidth)]
    for cell in cells:
        parts += [_engine(cell, bandwidth)] if cell.get("engine") else []
        parts += [inside(cell)] if cell.get("cuda") else []
    return [*found, *(line for part in parts if part for line in ("", *part))]


def failures(record: Any) -> list[str]:
    """Returns what of the tests, of the sanitizer and inside the engines went wrong."""
    found = []
    if any((cell.get(part) or {}).get("failed") for cell in record["cells"] for part in ("engine", "cuda")):
        found.append("an engine's step went wrong and was not timed")
    if not (record.get("tests") or {"ok": True})["ok"]:
        found.append("the tests failed:\n" + "\n".join(record["tests"]["tail"]))
    for run in (record.get("sanitizer") or {"runs": []})["runs"]:
        if run["outcome"] != "ok":
            found.append(f"the CUDA engine's small run, {run['name']}: {run['outcome']}\n" + "\n".join(run["tail"]))
    return found
