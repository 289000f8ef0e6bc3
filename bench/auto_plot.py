"""The picture of a record of `bench auto`: each contestant's time over that of the best fixed choice, cell by cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

STYLES = {  # colour and marker; windows are small grey points
    "sequential": ("#9a9a9a", "s"),
    "auto": ("#1f6fb4", "o"),
    "auto with plan": ("#2f9457", "^"),
}


def dots(record: Record, hardware: str) -> Figure:
    """A column of points for each cell, the time on a logarithmic scale, and a line where the rule is.

    Of auto what it is judged by, the median of the rounds' ratios, and a line from p20 to p80; of others their medians.
    """
    from matplotlib.figure import Figure  # an optional dependency; a Figure without pyplot draws with Agg

    cells = record["cells"]
    figure = Figure(figsize=(max(7.6, 1.0 * len(cells) + 1.5), 5.2), layout="constrained")
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    for position, cell in enumerate(cells):
        if cell["verdict"] is None:
            axes.annotate("check\nfailed", (position, 1), ha="center", color="#b00020")
            continue
        verdict = cell["verdict"]
        medians = {run["name"]: run["median"] for run in cell["runs"]}
        heights = {name: median / medians[verdict["best"]] for name, median in medians.items()}
        heights["auto"] = verdict["slower"]
        for name, height in heights.items():
            colour, marker = STYLES.get(name, ("#c8c8c8", "."))
            (handles[name if name in STYLES else "a fixed window"],) = axes.plot(
                position, height, marker, color=colour, zorder=3 if name in STYLES else 2
            )
        axes.vlines(position, 1 / verdict["ratio"]["p80"], 1 / verdict["ratio"]["p20"], color=STYLES["auto"][0])
    allowed = record["settings"]["allowed"]
    axes.axhline(1, color="#9a9a9a", linewidth=1, zorder=0)
    handles[f"allowed, {allowed:g}"] = axes.axhline(allowed, color="#b00020", linewidth=1, linestyle="--", zorder=1)
    axes.set_yscale("log")
    axes.set_ylabel("time over the best fixed choice's; line from p20 to p80")
    axes.set_xticks(
        range(len(cells)),
        [
            f"{label['model'].removesuffix('.safetensors')}\n{label['dtype']}\nbatch {label['batch']}"
            for label in (cell["label"] for cell in cells)
        ],
        fontsize=7,
    )
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.set_xlabel(f"{hardware}, torch {record['machine']['torch']}", fontsize=8, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    return figure
