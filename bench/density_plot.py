"""The picture of a record of `bench density`: how many times faster than torch, by model and operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .columns import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Cell = dict[str, Any]

COLOURS = ("#63aee8", "#1f4f94", "#f2b46b", "#c2590a", "#2f9457", "#8a5fb0", "#b8433f", "#9a9a9a")


def _kind(cell: Cell) -> str:
    return f"{cell['label']['dtype']}, {counted(cell['label']['threads'], 'thread')}"


def _panel(axes: Axes, cells: list[Cell], colours: dict[str, str]) -> None:
    """Groups of bars by batch. Above a bar the ratio, and below it the share of the machine's limit."""
    batches = list(dict.fromkeys(cell["label"]["batch"] for cell in cells))
    width = 0.84 / len(colours)
    for cell in cells:
        kind = _kind(cell)
        offset = (list(colours).index(kind) - (len(colours) - 1) / 2) * width
        place = batches.index(cell["label"]["batch"]) + offset
        if not cell["runs"]:
            axes.annotate("failed", (place, 0.05), ha="center", fontsize=7, rotation=90, color="#b00020")
            continue
        run = cell["runs"][-1]
        ratio = run["ratio"]
        axes.bar(place, ratio["median"], 0.92 * width, color=colours[kind])
        axes.vlines(place, ratio["p20"], ratio["p80"], color="black", linewidth=1.2, zorder=3)
        text = f"{ratio['median']:.2f}×\n{100 * run['fraction_of_limit']:.0f}%"
        top = max(ratio["median"], ratio["p80"])
        axes.annotate(text, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.axhline(1, color="#9a9a9a", linewidth=1.2, zorder=0)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches], fontsize=9)
    axes.margins(y=0.2)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)


def density_bars(record: Record, hardware: str) -> Figure:
    """A panel for each model and operation."""
    from matplotlib.figure import Figure  # an optional dependency; a Figure without pyplot draws with Agg
    from matplotlib.patches import Patch

    cells = record["cells"]
    models, operations, kinds = (
        list(dict.fromkeys(values))
        for values in (
            (cell["label"]["model"] for cell in cells),
            (cell["label"]["operation"] for cell in cells),
            map(_kind, cells),
        )
    )
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    batches = len({cell["label"]["batch"] for cell in cells})
    wide = max(3.2, 0.45 * batches * len(kinds) + 0.6)
    figure = Figure(figsize=(wide * len(operations) + 0.8, 2.9 * len(models) + 1.2), layout="constrained")
    panels = figure.subplots(len(models), len(operations), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, operation in zip(row, operations, strict=True):
            here = [
                cell for cell in cells if (cell["label"]["model"], cell["label"]["operation"]) == (model, operation)
            ]
            _panel(axes, here, colours)
            axes.set_title(f"{operation}, {model} model", fontsize=11)
    figure.supylabel(f"times faster than {record['settings']['baseline']}", fontsize=10)
    handles = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    figure.supxlabel(
        f"{hardware}, torch {record['machine']['torch']}\nmedian, line from p20 to p80; "
        "below the ratio the share of the machine's limit",
        fontsize=8,
        color="#555555",
    )
    return figure
