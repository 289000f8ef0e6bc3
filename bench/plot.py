"""The picture of a record: how many times faster than the baseline, and what share of the machine's limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .auto_plot import dots
from .columns import short
from .density_plot import density_bars
from .load_plot import slowdowns
from .record import Record, hardware
from .solver_plot import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#9a9a9a", "#1f6fb4", "#e07b1a", "#2f9457", "#8a5fb0", "#b8433f")  # the baseline is grey


def _bars(axes: Axes, record: Record, colours: dict[str, str], part: str) -> None:
    """Bars of the runs that have a colour, side by side in each cell.

    part: "ratio" (with p20-p80) or "fraction_of_limit".
    """
    width = 0.8 / max(1, max(sum(run["name"] in colours for run in cell["runs"]) for cell in record["cells"]))
    for position, cell in enumerate(record["cells"]):
        runs = [run for run in cell["runs"] if run["name"] in colours]
        for index, run in enumerate(runs):
            offset = (index - (len(runs) - 1) / 2) * width
            if part == "ratio":
                ratio = run["ratio"]
                value, top, text = ratio["median"], ratio["p80"], f"{ratio['median']:.2f}×"
                axes.vlines(position + offset, ratio["p20"], ratio["p80"], color="black", linewidth=1.2, zorder=3)
            else:
                value = top = 100 * run["fraction_of_limit"]
                text = f"{value:.1f}"
            axes.bar(position + offset, value, width * 0.92, color=colours[run["name"]])
            axes.annotate(
                text, (position + offset, max(top, value)), (0, 3), textcoords="offset points", ha="center", fontsize=9
            )


def draw(record: Record, path: Path) -> None:
    """Write the picture as a PNG. Needs matplotlib."""
    own = {"solver": curves, "auto": dots, "load": slowdowns, "density": density_bars}.get(record["suite"])
    figure = picture(record) if own is None else own(record, hardware(record))
    figure.savefig(path, dpi=130)


def picture(record: Record) -> Figure:
    """Above, bars of the ratio to the baseline; below, of the share of the limit. A cell whose check failed says so."""
    from matplotlib.figure import Figure  # an optional dependency; a Figure without pyplot draws with Agg
    from matplotlib.patches import Patch

    cells = record["cells"]
    names = list(dict.fromkeys(run["name"] for cell in cells for run in cell["runs"]))
    baseline = record["settings"]["baseline"]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    ours = {name: colour for name, colour in colours.items() if name != baseline}
    figure = Figure(figsize=(max(6.4, 1.4 * len(cells) + 1.5), 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    if ours:
        _bars(above, record, ours, "ratio")
        _bars(below, record, colours, "fraction_of_limit")
    above.axhline(1, color=COLOURS[0], linewidth=1.2, zorder=0)
    for position, cell in enumerate(cells):
        if not cell["runs"]:
            above.annotate(
                "check\nfailed", (position, 0), (0, 4), textcoords="offset points", ha="center", color="#b00020"
            )
    above.set_ylabel(f"times faster than {baseline}")
    below.set_ylabel("% of the machine's limit")
    below.set_xticks(
        range(len(cells)),
        ["\n".join(f"{column} {short(value)}" for column, value in cell["label"].items()) for cell in cells],
        fontsize=9,
    )
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    below.set_xlabel(
        f"{hardware(record)}, {record['settings']['dtype']}, "
        f"torch {record['machine']['torch']}; median, line from p20 to p80",
        fontsize=8,
        color="#555555",
    )
    for axes in (above, below):
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
    return figure
