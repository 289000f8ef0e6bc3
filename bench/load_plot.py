"""The picture of a record of `bench load`: slowdown by number of threads, beside the fair share and the yardstick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .columns import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

COLUMNS = 3  # of panels
FAIR, TARGET, SPIN, TASK = "#9a9a9a", "#b00020", "#2f9457", "#1f6fb4"


def slowdowns(record: Record, hardware: str) -> Figure:
    """A panel for each task, with points at the medians and lines from p20 to p80."""
    from matplotlib.figure import Figure  # an optional dependency; a Figure without pyplot draws with Agg
    from matplotlib.ticker import MaxNLocator

    settings = record["settings"]
    tasks = list(dict.fromkeys(cell["label"]["task"] for cell in record["cells"]))
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.8, 3.0 * rows + 1.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        cells = [cell for cell in record["cells"] if cell["label"]["task"] == task]
        counts = [cell["label"]["threads"] for cell in cells]
        fair = [cell["fair"] for cell in cells]
        target = settings["target"]
        (handles["fair share"],) = axes.plot(counts, fair, "-_", color=FAIR, zorder=1)
        (handles[f"target, {target:g} times that"],) = axes.plot(
            counts, [target * each for each in fair], "--_", color=TARGET, linewidth=1, zorder=1
        )
        for name, offset, colour, marker, label in (
            ("spin busy", 0.06, SPIN, "^", "threads that never wait"),
            ("busy", -0.06, TASK, "o", "the task"),
        ):
            for cell in cells:
                for run in cell["runs"]:
                    if run["name"] == name:
                        place, slowdown = cell["label"]["threads"] + offset, run["slowdown"]
                        axes.vlines(place, slowdown["p20"], slowdown["p80"], color=colour, zorder=2)
                        (handles[label],) = axes.plot(place, slowdown["median"], marker, color=colour, zorder=3)
        for cell in cells:
            if not cell["runs"]:
                axes.annotate("check\nfailed", (cell["label"]["threads"], 0), ha="center", color="#b00020")
        axes.set_title(task, fontsize=11)
        axes.set_xlim(min(counts) - 0.5, max(counts) + 0.5)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    figure.supylabel("times as long as on the quiet machine", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(
        f"threads\n{hardware}; {counted(settings['busy'], 'busy process', 'es')} on "
        f"{counted(settings['cores'], 'core')}; batch {settings['batch']}; torch {record['machine']['torch']}; "
        "median, line from p20 to p80",
        fontsize=8,
        color="#555555",
    )
    return figure
