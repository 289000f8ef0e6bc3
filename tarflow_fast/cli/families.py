"""What the commands do with models of other families than TarFlow."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..files import replacing
from .labels import choose_of

if TYPE_CHECKING:
    from ..evaluation import FlowScore
    from ..flows import FamilyFlow
    from ..trainer.flow_config import FlowConfig

ONLY_FLOWS = ("family_options", "dequantization", "logit", "alpha", "manifold")
"""The parameters of `train` that go with --flow."""

SAMPLED, PICTURED, MOST_WRITTEN = 64, 20_000, 16  # samples of a model, of a picture of a density, and lines of text
TAKEN = ("seed", "device", "threads", "out", "npz", "labels", "progress", "first", "dtype", "backend")
DEFAULTS: dict[str, Any] = {"on_nonfinite": "raise", "probe": "background", "solver": "auto", "backend": "auto"}


class PathOrDemonstration(click.Path):
    """A path, or the name of a demonstration where nothing is there under that name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not os.path.exists(value):
            from ..data import DEMONSTRATIONS

            if value in DEMONSTRATIONS:
                return value
        return super().convert(value, param, ctx)


def flow_config(name: str | None, options: dict[str, Any], given: dict[str, Any]) -> FlowConfig | None:
    """Returns what --flow and the options that go with it say, which are taken out of both dictionaries, or None.

    Raises click.UsageError for such options without --flow.
    """
    values = {key: options.pop(key) for key in ONLY_FLOWS}
    flags = [key for key in ONLY_FLOWS if given.pop(key, None) is not None]
    if name is None:
        if flags:
            flag = "--option" if flags[0] == "family_options" else f"--{flags[0]}"
            raise click.UsageError(f"{flag} goes with --flow")
        return None
    pairs = []
    for text in values.pop("family_options"):
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise click.UsageError(f"--option: expected NAME=VALUE, got {text!r}")
        pairs.append((key.strip().replace("-", "_"), value.strip()))
    from ..trainer.flow_config import FlowConfig

    return FlowConfig(name, tuple(pairs), **values)


def with_family_defaults(flow: str, options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of `train` with the defaults of families where none were given."""
    from ..trainer.flow_config import defaults_for

    return options | {key: value for key, value in defaults_for(flow, options["data"]).items() if key not in given}


def holds_family(path: str | None) -> bool:
    """Returns whether the file of --model is one of a family."""
    if path is None or not os.path.isfile(path) or not path.lower().endswith(".safetensors"):
        return False
    from ..flows import is_family

    return is_family(path)


def load_family(path: str | None, device: str | None = None) -> FamilyFlow:
    """Returns the model in the file of --model, on the device of --device."""
    from ..devices import pick_device
    from ..flows import load

    assert path is not None
    return load(path, device=pick_device(device))


def describe_family(model: FamilyFlow) -> dict[str, Any]:
    """Returns what `info --json` prints of a model."""
    from ..flows import describe

    return {**describe(model), "parameters": sum(p.numel() for p in model.parameters())}


def family_lines(facts: dict[str, Any]) -> list[str]:
    """Returns what `info` prints of a model. facts: as `describe_family` gives them."""

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(f"{key} = {printable(value)}" for key, value in values.items())

    shape = "×".join(map(str, facts["data_shape"]))
    lines = [
        f"family: {facts['family']}, of samples of shape {shape}, {facts['parameters']:,} parameters",
        f"options: {listed(facts['options']) or 'none'}",
        f"classes: {facts['num_classes'] or 'none (unconditional)'}",
    ]
    if facts["preprocessing"] is not None:
        lines.append(f"preprocessing: {listed(facts['preprocessing'])}")
    for key, value in facts["metadata"].items():
        lines.append(f"{printable(key)}: {printable(value)}")
    return lines


def score_family(
    path: str,
    data_path: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    device: str | None,
    threads: int | None,
    **how: Any,
) -> FlowScore:
    """Returns what `eval` measures of a model on data. how: the arguments of `load_flow_data`."""
    from ..data import load_flow_data
    from ..devices import torch_threads
    from ..evaluation import flow_score

    model = load_family(path, device)
    kind = model.metadata.get("kind")
    if kind == "images":
        channels, height, width = model.data_shape
        how |= {"size": (height, width), "channels": channels}
    data = load_flow_data(data_path, manifold=kind if kind in ("sphere", "torus") else None, **how)
    with torch_threads(threads):
        return flow_score(model, data if limit is None else data.spread(limit), batch_size=batch_size, seed=seed)


def score_lines(found: FlowScore, path: str, data_path: str) -> list[str]:
    """Returns what `eval` prints."""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.4f}"
    lines = [
        f"{path} on {data_path}, {found.samples} samples ({found.seconds:.1f} s)",
        f"log p           {found.log_prob:.4f}{error} nats",
    ]
    if found.bits_per_dim is not None:
        lines.append(f"bits/dim        {found.bits_per_dim:.4f}")
    if found.reconstruction is not None:
        lines.append(f"reconstruction  {found.reconstruction:.2e}, max |inverse(forward(x)) − x|")
    if found.evaluations is not None:
        lines.append(f"evaluations     {found.evaluations} of the network in a density pass")
    return lines


def sample_family(
    path: str, count: int | None, labels: str | None, no_grid: bool, given: dict[str, Any]
) -> dict[str, Any]:
    """Draws samples and writes them. Returns what was done.

    Raises click.UsageError for options that mean nothing for families, and where nothing is left to write.
    """
    for name, value in given.items():
        if name not in TAKEN and value not in (None, False, DEFAULTS.get(name)):
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for TarFlow, and {path} holds a model of another family"
            )
    if given.get("first"):
        raise click.UsageError("--first is for TarFlow: samples of other families are not numbered")
    import numpy as np
    import torch

    from ..errors import ArgumentError
    from ..files import check_path
    from ..flows import draw_picture
    from ..flows.pictures import COLUMNS, drawn, kind_of_data

    model = load_family(path, given["device"])
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    try:
        kind = kind_of_data(model)
    except ArgumentError:
        kind = "numbers"
    tokens = "symbols" in model.metadata or model.metadata.get("kind") == "tokens"
    picture = None if no_grid or kind == "numbers" else given["out"] or "samples.png"
    if kind == "numbers" and given["out"] is not None:
        raise click.UsageError("--out: these samples make no picture; --npz writes them as numbers")
    if picture is None and given["npz"] is None and not tokens:
        raise click.UsageError("nothing is left to write: give --npz")
    for flag, file, suffixes in (("out", picture, (".png", ".jpg", ".jpeg")), ("npz", given["npz"], (".npz",))):
        if file is not None:
            check_path(flag, file, suffixes)
    names = model.metadata.get("class_names") or ()
    chosen = choose_of(labels, names, model.num_classes, given["seed"])
    columns = len(chosen.entries or ()) or COLUMNS  # a class a column
    n = count or {"images": COLUMNS * columns, "numbers": SAMPLED}.get(kind, PICTURED)
    y = None if not chosen.entries else torch.tensor([chosen.entries[i % len(chosen.entries)] for i in range(n)])
    start = time.perf_counter()
    random = torch.Generator(model.place.device).manual_seed(given["seed"])
    x = drawn(model, n, random, y).cpu()
    facts: dict[str, Any] = {"family": model.name, "samples": n}
    facts |= {"seconds": time.perf_counter() - start, "evaluations": model.evaluations(), "files": {}}
    facts["classes"] = chosen.described
    if picture is not None:
        draw_picture(model, picture, seed=given["seed"], columns=columns, samples=x)
        facts["files"]["picture"] = picture
    if given["npz"] is not None:
        arrays: dict[str, Any] = {"samples": x.numpy(), **({} if y is None else {"labels": y.numpy()})}
        with replacing(given["npz"]) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        facts["files"]["npz"] = given["npz"]
    if tokens:
        symbols = model.metadata.get("symbols")
        rows = x[:MOST_WRITTEN].tolist()
        facts["text"] = ["".join(symbols[i] for i in row) if symbols else " ".join(map(str, row)) for row in rows]
    return facts


def sample_lines(facts: dict[str, Any]) -> list[str]:
    """Returns what `sample` prints."""
    where = ", ".join(facts["files"].values())
    each = "" if facts["evaluations"] is None else f", {facts['evaluations']} evaluations of the network"
    what = f"{facts['samples']} samples of {facts['family']}, {facts['seconds']:.2f} s{each}"
    lines = [f"{where}: {what}" if where else what]
    if facts["classes"] is not None:
        lines.append(f"classes: {facts['classes']}")
    return [*lines, *map(printable, facts.get("text", ()))]
