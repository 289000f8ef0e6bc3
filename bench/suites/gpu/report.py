"""What the table of a record of `bench gpu` has beside its cells: tests, launches, the inside of engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...common.harness import ratio
from ...common.record import short, title, values
from ...common.table import aligned, cells_table, micro
from .cases import CUDA


def _tests(record: Any) -> str:
    tests = record["tests"]
    if tests is None:
        return "tests:   not run"
    verdict = "" if tests["ok"] else "  FAILED"
    return f"tests:   {tests['passed']} passed, {tests['failed']} failed in {tests['seconds']:.0f} s{verdict}"


def _sanitizer(record: Any) -> list[str]:
    if "sanitizer" not in record:  # of before the CUDA engine
        return []
    sanitizer = record["sanitizer"]
    if sanitizer is None:
        return ["sanitizer: not run"]
    runs = [f"{run['name']} {run['outcome']} in {run['seconds']:.0f} s" for run in sanitizer["runs"]]
    said = ", ".join(runs + ([] if sanitizer["reason"] is None else [sanitizer["reason"]]))
    return [f"sanitizer: {said}{'' if sanitizer['ok'] else '  FAILED'}"]


def _launches(record: Any) -> list[str]:
    head = ["empty dependent launch", "µs", "p20-p80"]
    return aligned([head, *([entry["name"], *micro(entry)] for entry in record["launches"])], 1)


def _first_runs(record: Any) -> Iterator[str]:
    """How long it takes until a candidate is ready and has run once: packing, compiling and tuning."""
    yield "first run, with all that is made for it, in seconds:"
    for cell in record["cells"]:
        runs = ", ".join(f"{run['name']} {run['first_seconds']:.1f}" for run in cell["runs"])
        yield f"  {' '.join(values(cell))}: {runs or '-'}"


def _engine(cell: Any, bandwidth: float) -> list[str]:
    engine, moved = cell["engine"], cell["engine"]["bytes_per_step"]
    parts = [(part["name"], part, part["bytes"], part["bytes_per_second"]) for part in engine["operations"]]
    parts += [(f"step, {part['name']}", part, moved, moved / part["median"]) for part in engine["steps"]]
    rows = [["", "µs", "p20-p80", "MB", "GB/s", "of limit"]]
    for name, part, size, rate in parts:
        share = f"{100 * rate / bandwidth:.1f}%"
        rows.append([name, *micro(part), f"{size / 1e6:.3f}", f"{rate / 1e9:.1f}", share])
    head = f"kernels of {title(cell['label'])}; {short(engine['launches_per_token'])} launches a token"
    return [head, *aligned(rows, 1), *(f"FAILED step, {reason}" for reason in engine["failed"])]


def comparison(record: Any, bandwidth: float) -> list[str]:
    """How many times as fast as each other candidate the CUDA engine is, round by round, and its step beside the time
    that memory takes; empty if the engine has not run. bandwidth: measured, in bytes per second."""
    rows = []
    cells = [cell for cell in record["cells"] if any(run["name"] == CUDA for run in cell["runs"])]
    others = dict.fromkeys(run["name"] for cell in cells for run in cell["runs"] if run["name"] != CUDA)
    for cell in cells:
        samples = {run["name"]: run["seconds"] for run in cell["runs"]}
        medians = [ratio(samples[name], samples[CUDA])["median"] if name in samples else None for name in others]
        ratios = ["-" if median is None else f"{median:.2f}x" for median in medians]
        rows.append([" ".join(values(cell)), *ratios, *_beside_memory(cell, bandwidth)])
    if not rows:
        return []
    memory = ["step µs", "weights µs", "of that", "all bytes µs", "of that"]
    return ["the CUDA engine: times as fast as", *aligned([["", *others, *memory], *rows], 1)]


def _beside_memory(cell: Any, bandwidth: float) -> list[str]:
    """A step; what memory takes for the block's weights and for all bytes, and how many times that the step is."""
    step = ((cell.get("cuda") or {}).get("step") or {}).get("median")
    if step is None:
        return ["-"] * 5
    found = [f"{1e6 * step:.2f}"]
    for moved in (cell["work"]["weight_bytes"], cell["cuda"]["bytes_per_step"]):
        least = moved / bandwidth
        found += [f"{1e6 * least:.2f}", f"{step / least:.2f}x"]
    return found


def inside(cell: Any) -> list[str]:
    """What each phase of the CUDA engine's step takes, in a cell with "cuda"."""
    cuda = cell["cuda"]
    counts = f"{cuda['barriers_per_token']} barriers a token, {cuda['launches_per_pass']} launches a pass"
    head = f"inside the CUDA engine of {title(cell['label'])}; {counts}"
    if cuda["failed"]:
        return [head, *(f"FAILED {reason}" for reason in cuda["failed"])]
    whole, barriers = cuda["step"], cuda["barriers"]
    parts = [("step", whole), *((f"{phase['name']}, saved without it", phase) for phase in cuda["phases"])]
    rows = [["", "µs", "p20-p80", "of step"]]
    for name, part in [*parts, ("step of barriers and weights alone", barriers)]:
        rows.append([name, *micro(part), f"{100 * part['median'] / whole['median']:.1f}%"])
    each = 1e6 * barriers["median"] / cuda["barriers_per_token"]
    rows.append(["the same for each barrier", f"{each:.2f}", "", ""])
    return [head, *aligned(rows, 1)]


def lines(record: Any) -> list[str]:
    found = [*cells_table(record), "", _tests(record), *_sanitizer(record)]
    found += [f"{entry['name']}:    left out: {entry['reason']}" for entry in record.get("left_out", [])]
    found += [*(f"FAILED {failure}" for failure in record["failures"]), "", *_launches(record)]
    found += ["", *_first_runs(record)]
    bandwidth = record["limits"]["copy_bandwidth"][0]["bytes_per_second"]
    compared = comparison(record, bandwidth)
    found += ["", *compared] if compared else []
    for cell in record["cells"]:
        if cell.get("engine"):
            found += ["", *_engine(cell, bandwidth)]
        if cell.get("cuda"):
            found += ["", *inside(cell)]
    return found


def failures(record: Any) -> list[str]:
    """What of the tests, of the sanitizer and inside the engines went wrong."""
    found = []
    if any((cell.get(part) or {}).get("failed") for cell in record["cells"] for part in ("engine", "cuda")):
        found.append("an engine's step went wrong and was not timed")
    if not (record.get("tests") or {"ok": True})["ok"]:
        found.append("the tests failed:\n" + "\n".join(record["tests"]["tail"]))
    for run in (record.get("sanitizer") or {"runs": []})["runs"]:
        if run["outcome"] != "ok":
            found.append(f"the CUDA engine's small run, {run['name']}: {run['outcome']}\n" + "\n".join(run["tail"]))
    return found
