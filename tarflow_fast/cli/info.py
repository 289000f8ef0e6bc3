"""`tarflow-fast info` shows what this installation can do, and what a checkpoint holds."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..sizes import by
from .families import describe_family, family_lines, holds_family, load_family
from .messages import in_flags
from .options import Command, json_option, load_model, model_options, print_json
from .terminal import echo

if TYPE_CHECKING:
    from ..models.tarflow import TarFlow


def describe_installation() -> dict[str, Any]:
    import torch

    from .. import __version__
    from ..backend import backends
    from ..data.png import NATIVE
    from ..probe.store import kept

    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": [status.to_dict() for status in backends()],
        "plain_pngs": "Pillow" if NATIVE is None else "native",
        "probes": [
            {"backend": key["backend"], "device": key["device"]["name"], **verdict.to_dict()} for key, verdict in kept()
        ],
    }


def installation_lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"tarflow_fast {facts['version']}, Python {facts['python']}, torch {facts['torch']}",
        f"CPU threads: {facts['cpu_threads']}; GPUs: {', '.join(facts['gpus']) or 'none'}",
        "",
        "Backends, best first:",
    ]
    for status in facts["backends"]:
        reason = in_flags(info_command, status["reason"])
        state = "available" if status["available"] else "not available"
        lines.append(f"  {status['name']:<7} on {status['device']:<5} {state:<14} {reason}")
    without = "Pillow: the native reader was not built; install zlib's headers and install tarflow_fast again"
    lines += ["", f"Plain PNGs are read by {'native code' if facts['plain_pngs'] == 'native' else without}"]
    counts = Counter((each["backend"], each["device"], each["proven"]) for each in facts["probes"])
    if counts:
        lines += ["", "Probes that are kept (`tarflow-fast check` shows what was tried):"]
    for (backend, device, proven), count in sorted(counts.items()):
        lines.append(f"  {printable(backend)} on {printable(device)}: {count} {'proven' if proven else 'failed'}")
    return lines


def describe_model(model: TarFlow) -> dict[str, Any]:
    """Returns the sizes of a model, its number of parameters, its metadata, and where it was loaded from."""
    return {
        **model.config.to_dict(),
        "tokens": model.config.num_patches,
        "token_dim": model.config.token_dim,
        "parameters": sum(p.numel() for p in model.parameters()),
        "metadata": model.metadata,
        "origin": None if model.origin is None else asdict(model.origin),
    }


def model_lines(facts: dict[str, Any]) -> list[str]:
    kind, classes = "affine" if facts["nvp"] else "volume-preserving", facts["num_classes"]
    tokens = f"{facts['tokens']} tokens of {facts['token_dim']} values"
    images = f"images: {facts['in_channels']}×{by(facts['img_size'])} in patches of {by(facts['patch_size'])}, {tokens}"
    lines = [
        f"sequences: {tokens}" if facts.get("layout") == "tokens" else images,
        f"network: {facts['num_blocks']} {kind} blocks of {facts['layers_per_block']} layers, "
        f"width {facts['channels']}, heads of {facts['head_dim']}, {facts['parameters']:,} parameters",
        f"classes: {classes or 'none (unconditional)'}",
    ]
    for key, value in facts["metadata"].items():
        parts = [f"{name} = {item}" for name, item in value.items()] if isinstance(value, dict) else value
        text = ", ".join(map(printable, parts)) if isinstance(parts, list) else printable(parts)
        lines.append(f"{printable(key)}: {text}")
    if facts["origin"] is not None:
        lines.append(f"weights: {printable(facts['origin']['weights'])} of {printable(facts['origin']['path'])}")
    return lines


def printable(value: object) -> str:
    """Returns text of a file for a terminal: what would move its cursor or change its colours is escaped."""
    text = str(value)
    return text if text.isprintable() else repr(text)


@click.command(
    "info",
    cls=Command,
    aliases={"path": "--model", "backend": "--backend", "device": "--device"},
    short_help="Show backends, devices and versions, or a checkpoint.",
    epilog="""\b
Examples:
  tarflow-fast info
  tarflow-fast info afhq_model_8_768_8_8_0.07.pth
  tarflow-fast info --json | jq .backends
""",
)
@click.argument("file", required=False)
@model_options
@json_option
def info_command(file: str | None, model_path: str | None, as_json: bool, **which: Any) -> None:
    """Show versions, devices, and each backend with the reason why it can or cannot run here; and the sizes
    and metadata of a checkpoint, FILE, and which of its weights are taken."""
    if file is not None and model_path is not None:
        raise click.UsageError("FILE and --model are two names for one thing; give one")
    model_path = model_path if file is None else file
    installation = describe_installation()
    family = load_family(model_path) if holds_family(model_path) else None
    model = describe_model(load_model(model_path, **which)) if family is None else describe_family(family)
    if as_json:
        print_json({**installation, "model": model})
        return
    lines = installation_lines(installation)
    lines += ["", f"Model {model_path or 'shipped with the package'}:"]
    lines += ["  " + line for line in (model_lines(model) if family is None else family_lines(model))]
    echo(*lines)
