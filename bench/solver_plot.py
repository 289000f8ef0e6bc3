"""The picture of a record of `bench solver`: how many tokens of a block are final after so many passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .columns import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

SHOWN = {  # colour and width, from the hindmost on
    "all-Jacobi 0.001": ("#e07b1a", 3.2),
    "adaptive 0.0001": ("#1f4f94", 1.6),
    "adaptive 0.001": ("#63aee8", 1.6),
}
SEQUENTIAL = "#9a9a9a"
COLUMNS = 4  # of panels


def curves(record: Record, hardware: str) -> Figure:
    """A panel for each block, in the order of sampling; each as wide as its slower policy takes passes."""
    from matplotlib.figure import Figure  # an optional dependency; a Figure without pyplot draws with Agg
    from matplotlib.ticker import MaxNLocator

    cells = record["cells"]
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 3.0 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    handles: dict[str, Any] = {}
    for axes, cell in zip(panels, cells, strict=False):
        T = cell["tokens"]
        (handles["sequential"],) = axes.plot([0, T - 1], [1, T], "--", color=SEQUENTIAL, linewidth=1.2)
        widest = 1
        runs = {run["name"]: run for run in cell["runs"]}
        for name in [name for name in SHOWN if name in runs and runs[name]["final"]]:
            final = runs[name]["final"]
            widest = max(widest, len(final) - 1)
            colour, width = SHOWN[name]
            (handles[name],) = axes.plot(
                range(len(final)), final, color=colour, linewidth=width, marker="o", markersize=2 * width, clip_on=False
            )
        axes.set_title(f"block {cell['label']['block']}", fontsize=11)
        if not cell["check"]["passed"]:
            axes.annotate("check failed", (0.96, 0.06), xycoords="axes fraction", ha="right", color="#b00020")
        axes.set_xlim(0, widest)
        axes.set_ylim(0, T)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("passes")
    for axes in list(figure.axes)[len(cells) :]:
        axes.set_axis_off()
    for axes in list(figure.axes)[::columns]:
        axes.set_ylabel("tokens final, worst sample")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    settings = record["settings"]
    figure.supxlabel(
        f"{settings['model']}, batch {settings['batch']}, guidance {short(settings['guidance'])}; {hardware}\n"
        f"final: within {settings['final']:g} of the sequential result, as all tokens before it; "
        "a line that ends below the top has a larger error",
        fontsize=8,
        color="#555555",
    )
    return figure
