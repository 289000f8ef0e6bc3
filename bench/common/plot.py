"""Pictures: a suite says what its panels show, and `draw` draws them. matplotlib is an optional dependency, imported
where it is needed; a Figure without pyplot draws with Agg."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .record import Spread, hardware, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, RED = "#9a9a9a", "#b00020"
COLOURS = (  # the baseline is grey
    *(GREY, "#1f6fb4", "#e07b1a", "#2f9457", "#8a5fb0", "#b8433f"),
    *("#17a2a8", "#d06ba5", "#a3a02a", "#8c564b"),
)


def require_matplotlib() -> None:
    """Raises click.ClickException before the work is done rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("matplotlib is not installed; pip install 'tarflow_fast[bench]'")


class Bar(NamedTuple):
    """A bar up to the median of a spread, with a line from its p20 to its p80, and a text above."""

    colour: str
    text: str
    spread: Spread


class Series(NamedTuple):
    """Points that the legend names. how: the style."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    how: dict[str, Any]


@dataclass
class Panel:
    """What one panel shows. groups: bars side by side by the name below them; there are none where a check failed.
    level: where a grey line is. image: (H, W) or (H, W, 3) of a picture. axes: what `Axes.set` takes."""

    title: str = ""
    groups: dict[str, list[Bar]] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    level: float | None = None
    image: Any = None
    axes: dict[str, Any] = field(default_factory=dict)


def _draw_bars(axes: Any, groups: Mapping[str, list[Bar]]) -> None:
    width = 0.8 / max([1, *map(len, groups.values())])
    bars: list[tuple[float, Bar]] = []
    for at, group in enumerate(groups.values()):
        bars += [(at + (i - (len(group) - 1) / 2) * width, bar) for i, bar in enumerate(group)]
        if not group:
            axes.annotate("check\nfailed", (at, 0), (0, 4), textcoords="offset points", ha="center", color=RED)
    spreads = [bar.spread for _, bar in bars]
    ends = [[each["median"] - each["p20"] for each in spreads], [each["p80"] - each["median"] for each in spreads]]
    errors = [[max(end, 0.0) for end in each] for each in ends]  # rounding may be below 0
    how = {"color": [bar.colour for _, bar in bars], "yerr": errors, "width": 0.92 * width}
    drawn = axes.bar([place for place, _ in bars], [each["median"] for each in spreads], **how)
    axes.bar_label(drawn, [bar.text for _, bar in bars], padding=3, fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)


def _draw(axes: Any, panel: Panel) -> dict[str, Any]:
    """Draws a panel, and returns what the legend names."""
    handles = {name: axes.plot(x, y, **how)[0] for name, x, y, how in panel.series if x}
    if panel.groups:
        _draw_bars(axes, panel.groups)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1.2, zorder=0)
    if panel.image is not None:
        axes.imshow(panel.image, cmap="gray")
    axes.set_title(panel.title, fontsize=11)
    axes.set(**panel.axes)
    if "xticks" in panel.axes:
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def draw(
    panels: Sequence[Panel],
    columns: int,
    inches: tuple[float, float],
    footer: str,
    *,
    names: Mapping[str, str] | None = None,
    ylabel: str = "",
    **how: Any,
) -> Figure:
    """Returns a picture of panels in rows of `columns`. inches: of a panel. footer: small print below. names: a colour
    for each name in the legend, beside those of series. how: what `Figure.subplots` takes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(inches[0] * columns + 0.7, inches[1] * rows + 1.2), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, **how).flat)
    handles: dict[str, Any] = {name: Patch(color=colour) for name, colour in (names or {}).items()}
    for axes, panel in zip(grid, panels, strict=False):
        handles |= _draw(axes, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supylabel(ylabel, fontsize=10)
    letters = int(14 * figure.get_figwidth())  # of the footer, whose size has about 14 an inch
    lines = (textwrap.fill(line, letters) for line in footer.splitlines())
    figure.supxlabel("\n".join(lines), fontsize=8, color="#555555")
    if handles:
        needed = sum(0.55 + 0.085 * len(name) for name in handles)  # inches, for all in a row
        many = max(1, int(len(handles) * min(1.0, figure.get_figwidth() / needed)))
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=many, frameon=False)
    return figure


def bars(record: Any, by_panel: Sequence[str], by_group: Sequence[str], ylabel: str, what: str = "ratio") -> Figure:
    """Draws bars of the ratio to the baseline, with the share of the limit written below it, if there is one.

    by_panel, by_group: columns of labels, whose values say which panel a cell is in, and which group of bars; the run's
    name and other columns give a bar its colour. what: the spread of a run that is shown, where it has one.
    """
    panels, colours = dict[str, Panel](), dict[str, str]()
    runs = [(cell, run) for cell in record["cells"] for run in cell["runs"] if what in run]
    several = len({run["name"] for _, run in runs}) > 1
    for cell in record["cells"]:
        rest = dict(cell["label"])
        name, group = (title({each: rest.pop(each) for each in by}) for by in (by_panel, by_group))
        bars = panels.setdefault(name, Panel(name, level=1)).groups.setdefault(group.replace(", ", "\n"), [])
        for run in (run for of, run in runs if of is cell):
            kind = ", ".join(filter(None, [run["name"] if several or not rest else "", title(rest)]))
            below = f"\n{run['fraction_of_limit']:.0%}" if "fraction_of_limit" in run else ""
            colour = colours.setdefault(kind, COLOURS[1 + len(colours) % (len(COLOURS) - 1)])
            bars.append(Bar(colour, f"{run[what]['median']:.2f}×{below}", run[what]))
    groups = [list(map(len, panel.groups.values())) for panel in panels.values()]
    widest = max((len(sizes) * max(sizes) for sizes in groups), default=1)
    said = f"torch {record['machine']['torch']}; median, line from p20 to p80; below it the share of the limit, if any"
    size, footer = (max(3.2, 0.38 * widest + 0.6), 2.9), f"{hardware(record)}, {said}"
    return draw(list(panels.values()) or [Panel()], 2, size, footer, names=colours, ylabel=ylabel)
