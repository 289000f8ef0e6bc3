"""Pictures: what all of them share, and the one that most suites draw. matplotlib is an optional dependency, imported
where it is needed; a Figure without pyplot draws with Agg."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .record import Record, Spread, hardware, title

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


def grid(panels: int, columns: int, each: tuple[float, float], more: tuple[float, float], **how: Any) -> Any:
    """Returns a figure and its panels in rows of `columns`. each: inches of a panel; more: inches about them all."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(each[0] * columns + more[0], each[1] * rows + more[1]), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **how).flat)
    for number, panel in enumerate(axes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.axison = number < panels
    return figure, axes[:panels]


def whole_numbers(axes: Axes) -> None:
    """Puts ticks of the x axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend(figure: Figure, handles: Mapping[str, Any], columns: int | None = None) -> None:
    """Names what is drawn, above the figure. handles: what matplotlib drew, or a colour, for each name."""
    from matplotlib.patches import Patch

    drawn = [Patch(color=each) if isinstance(each, str) else each for each in handles.values()]
    if drawn:
        figure.legend(drawn, handles, loc="outside upper center", ncols=columns or len(drawn), frameon=False)


def footer(part: Any, text: str) -> None:
    """Writes small print below a figure, or below its lowest axes."""
    say = part.set_xlabel if hasattr(part, "set_xlabel") else part.supxlabel
    say(text, fontsize=8, color="#555555")


def point(axes: Axes, place: float, spread: Spread, colour: str, marker: str) -> Any:
    """Draws a point at the median of a spread and a line from its p20 to its p80; returns the point."""
    axes.vlines(place, spread["p20"], spread["p80"], color=colour, zorder=2)
    return axes.plot(place, spread["median"], marker, color=colour, zorder=3)[0]


def say_failed(axes: Axes, place: float, height: float = 0.0) -> None:
    """Writes that the check of what belongs there failed."""
    axes.annotate(FAILED, (place, height), (0, 4), textcoords="offset points", ha="center", color=RED)


class Bar(NamedTuple):
    """A bar with a text above it, and a line from p20 to p80 if it is the median of a spread."""

    colour: str
    value: float
    text: str
    spread: Spread | None = None


def bars(axes: Axes, groups: Sequence[Sequence[Bar]], names: Sequence[str], size: int = 9) -> None:
    """Draws bars side by side in groups, with names below. A group without bars is one whose check failed."""
    width = 0.8 / max([1, *map(len, groups)])
    for position, group in enumerate(groups):
        for number, bar in enumerate(group):
            place, top = position + (number - (len(group) - 1) / 2) * width, bar.value
            if bar.spread is not None:
                axes.vlines(place, bar.spread["p20"], bar.spread["p80"], color="black", linewidth=1.2, zorder=3)
                top = max(top, bar.spread["p80"])
            axes.bar(place, bar.value, 0.92 * width, color=bar.colour)
            axes.annotate(bar.text, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=size)
        if not group:
            say_failed(axes, position)
    axes.set_xticks(range(len(groups)), names, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)


def cells_figure(record: Record) -> Figure:
    """Draws the ratio to the baseline above, and the share of the limit below. A cell whose check failed says so."""
    cells, settings = record["cells"], record["settings"]
    names = dict.fromkeys(run["name"] for cell in cells for run in cell["runs"])
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    size = (max(6.4, 1.4 * len(cells) + 1.5), 3.6)
    figure, (above, below) = grid(2, 1, size, (0, 0), sharex=True, height_ratios=[3, 2])
    ratios, shares = [], []
    for cell in cells:
        runs = [(colours[run["name"]], run, 100 * run["fraction_of_limit"]) for run in cell["runs"]]
        faster = [(colour, run["ratio"]) for colour, run, _ in runs if "ratio" in run]
        ratios.append([Bar(colour, ratio["median"], f"{ratio['median']:.2f}×", ratio) for colour, ratio in faster])
        shares.append([Bar(colour, share, f"{share:.1f}") for colour, _, share in runs])
    labels = [title(cell["label"], "\n") for cell in cells]
    bars(above, ratios, labels)
    bars(below, shares, labels)
    above.axhline(1, color=GREY, linewidth=1.2, zorder=0)
    above.set_ylabel(f"times faster than {settings['baseline']}")
    below.set_ylabel("% of the machine's limit")
    legend(figure, colours)
    versions = f"{settings['dtype']}, torch {record['machine']['torch']}"
    footer(below, f"{hardware(record)}, {versions}; median, line from p20 to p80")
    return figure
