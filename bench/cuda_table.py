"""What the table of a record of `bench gpu` says of the CUDA engine."""

from __future__ import annotations

from typing import Any

from .columns import aligned, short
from .timing import pairwise_ratios, spread

CUDA = "cuda"
"""The contestant's name."""
Record = dict[str, Any]


def sanitizer_lines(record: Record) -> list[str]:
    if "sanitizer" not in record:
        return []
    sanitizer = record["sanitizer"]
    if sanitizer is None:
        return ["sanitizer: not run"]
    runs = [f"{run['name']} {run['outcome']} in {run['seconds']:.0f} s" for run in sanitizer["runs"]]
    said = ", ".join(runs + ([] if sanitizer["reason"] is None else [sanitizer["reason"]]))
    return [f"sanitizer: {said}{'' if sanitizer['ok'] else '  FAILED'}"]


def comparison(record: Record, bandwidth: float) -> list[str]:
    """How many times as fast as each other contestant, round by round, and the step beside the time that memory takes;
    empty if the engine has not run. bandwidth: measured, in bytes per second."""
    rows = []
    cells = [cell for cell in record["cells"] if any(run["name"] == CUDA for run in cell["runs"])]
    others = dict.fromkeys(run["name"] for cell in cells for run in cell["runs"] if run["name"] != CUDA)
    for cell in cells:
        samples = {run["name"]: run["seconds"] for run in cell["runs"]}
        ratios = [_ratio(samples[name], samples[CUDA]) if name in samples else "-" for name in others]
        rows.append([" ".join(map(short, cell["label"].values())), *ratios, *_beside_memory(cell, bandwidth)])
    if not rows:
        return []
    memory = ["step µs", "weights µs", "of that", "all bytes µs", "of that"]
    return ["the CUDA engine: times as fast as", *aligned([["", *others, *memory], *rows], 1)]


def _ratio(theirs: list[float], ours: list[float]) -> str:
    return f"{spread(pairwise_ratios(theirs, ours))['median']:.2f}x"


def _beside_memory(cell: dict[str, Any], bandwidth: float) -> list[str]:
    """A step; what memory takes for the block's weights and for all bytes, and how many times that the step is."""
    step = ((cell.get("cuda") or {}).get("step") or {}).get("median")
    if step is None:
        return ["-"] * 5
    found = [f"{1e6 * step:.2f}"]
    for moved in (cell["work"]["weight_bytes"], cell["cuda"]["bytes_per_step"]):
        least = moved / bandwidth
        found += [f"{1e6 * least:.2f}", f"{step / least:.2f}x"]
    return found


def inside(cell: dict[str, Any]) -> list[str]:
    """cell: one with "cuda"."""
    cuda = cell["cuda"]
    label = ", ".join(f"{column} {short(value)}" for column, value in cell["label"].items())
    counts = f"{cuda['barriers_per_token']} barriers a token, {cuda['launches_per_pass']} launches a pass"
    head = f"inside the CUDA engine of {label}; {counts}"
    if cuda["failed"]:
        return [head, *(f"FAILED {reason}" for reason in cuda["failed"])]
    whole, barriers = cuda["step"], cuda["barriers"]
    parts = [("step", whole), *((f"{phase['name']}, saved without it", phase) for phase in cuda["phases"])]
    rows = [["", "µs", "p20-p80", "of step"]]
    for name, entry in [*parts, ("step of barriers and weights alone", barriers)]:
        low, middle, high = (1e6 * entry[key] for key in ("p20", "median", "p80"))
        share = 100 * entry["median"] / whole["median"]
        rows.append([name, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{share:.1f}%"])
    each = 1e6 * barriers["median"] / cuda["barriers_per_token"]
    rows.append(["the same for each barrier", f"{each:.2f}", "", ""])
    return [head, *aligned(rows, 1)]
