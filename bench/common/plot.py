"""Pictures: what all of them have in common, and the one that most suites draw. matplotlib is an optional dependency,
imported where it is needed; a Figure without pyplot draws with Agg."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .record import Cell, Record, hardware, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, RED = "#9a9a9a", "#b00020"
COLOURS = (GREY, "#1f6fb4", "#e07b1a", "#2f9457", "#8a5fb0", "#b8433f")  # the baseline is grey
FAILED = "check\nfailed"


def require_matplotlib() -> None:
    """Raises click.ClickException before the work is done rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("matplotlib is not installed; pip install 'tarflow_fast[bench]'")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def grid(panels: int, columns: int, each: tuple[float, float], more: tuple[float, float], **how: Any) -> Any:
    """A figure and so many axes in rows of `columns`; each: inches of a panel, more: of what is about them."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = new_figure(each[0] * columns + more[0], each[1] * rows + more[1])
    axes = list(figure.subplots(rows, columns, squeeze=False, **how).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend(figure: Figure, handles: Mapping[str, Any], columns: int | None = None) -> None:
    if handles:
        columns = columns or len(handles)
        names = list(handles)
        figure.legend(list(handles.values()), names, loc="outside upper center", ncols=columns, frameon=False)


def patches(colours: Mapping[str, str]) -> dict[str, Any]:
    from matplotlib.patches import Patch

    return {name: Patch(color=colour) for name, colour in colours.items()}


def footer(part: Any, text: str) -> None:
    """Small print below a figure, or below its lowest axes."""
    say = part.set_xlabel if hasattr(part, "set_xlabel") else part.supxlabel
    say(text, fontsize=8, color="#555555")


def bar(
    axes: Axes, place: float, value: float, text: str, of: Any = None, *, width: float, colour: str, size: int
) -> None:
    """A bar with a text above it, and if `of` is a spread a line from its p20 to its p80."""
    top = value
    if of is not None:
        axes.vlines(place, of["p20"], of["p80"], color="black", linewidth=1.2, zorder=3)
        top = max(value, of["p80"])
    axes.bar(place, value, 0.92 * width, color=colour)
    axes.annotate(text, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=size)


def _bars(axes: Axes, cells: Sequence[Cell], colours: Mapping[str, str], part: str) -> None:
    """Bars of the runs that have a colour, side by side in each cell, for a run's "ratio" or "fraction_of_limit"."""
    shown = [[run for run in cell["runs"] if run["name"] in colours] for cell in cells]
    width = 0.8 / max([1, *map(len, shown)])
    for position, runs in enumerate(shown):
        for index, run in enumerate(runs):
            place = position + (index - (len(runs) - 1) / 2) * width
            how: dict[str, Any] = {"width": width, "colour": colours[run["name"]], "size": 9}
            if part == "ratio":
                ratio = run["ratio"]
                bar(axes, place, ratio["median"], f"{ratio['median']:.2f}×", ratio, **how)
            else:
                value = 100 * run["fraction_of_limit"]
                bar(axes, place, value, f"{value:.1f}", **how)


def cells_figure(record: Record) -> Figure:
    """Above, bars of the ratio to the baseline; below, of the share of the limit. A cell whose check failed says so."""
    cells, baseline = record["cells"], record["settings"]["baseline"]
    names = list(dict.fromkeys(run["name"] for cell in cells for run in cell["runs"]))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    ours = {name: colour for name, colour in colours.items() if name != baseline}
    figure = new_figure(max(6.4, 1.4 * len(cells) + 1.5), 7.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    if ours:
        _bars(above, cells, ours, "ratio")
        _bars(below, cells, colours, "fraction_of_limit")
    above.axhline(1, color=GREY, linewidth=1.2, zorder=0)
    for position, cell in enumerate(cells):
        if not cell["runs"]:
            above.annotate(FAILED, (position, 0), (0, 4), textcoords="offset points", ha="center", color=RED)
    above.set_ylabel(f"times faster than {baseline}")
    below.set_ylabel("% of the machine's limit")
    labels = ["\n".join(f"{column} {short(value)}" for column, value in cell["label"].items()) for cell in cells]
    below.set_xticks(range(len(cells)), labels, fontsize=9)
    legend(figure, patches(colours))
    settings, torch = record["settings"], record["machine"]["torch"]
    footer(below, f"{hardware(record)}, {settings['dtype']}, torch {torch}; median, line from p20 to p80")
    for axes in (above, below):
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        plain(axes)
        axes.tick_params(axis="x", length=0)
    return figure
