"""`tarflow-fast flows` lists the families of flows, the options of one, and the demonstration data."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import click

from .options import Command, json_option, print_json
from .terminal import echo


def describe_families() -> dict[str, Any]:
    """Returns the families and the demonstration data."""
    from ..data import DEMONSTRATIONS
    from ..flows import FAMILIES

    return {
        "families": {name: {"purpose": each.purpose, "data": list(each.kinds)} for name, each in FAMILIES.items()},
        "demonstrations": {name: {"kind": each.kind, "what": each.what} for name, each in DEMONSTRATIONS.items()},
    }


def options_of(name: str) -> dict[str, Any]:
    """Returns the options of a family with their defaults and meanings."""
    from ..flows import FAMILIES
    from ..flows.options import describe_options
    from ..flows.registry import known_one

    options = describe_options(FAMILIES[known_one("name", name, FAMILIES)].load().Options)
    return {name: {"default": default, "meaning": meaning} for name, (default, meaning) in options.items()}


@click.command(
    "flows",
    cls=Command,
    aliases={"name": "NAME"},
    short_help="List families of flows, and data to try them on.",
    epilog="""\b
Examples:
  tarflow-fast flows
  tarflow-fast flows realnvp
      The options of a family, which `train --option` sets, and their defaults.
""",
)
@click.argument("name", required=False)
@json_option
def flows_command(name: str | None, as_json: bool) -> None:
    """List the families of flows beside TarFlow that `train --flow` trains, with the data that each takes, and
    the demonstration data that --data may name; or the options of one family, NAME."""
    facts: dict[str, Any] = describe_families()
    if name is not None:
        facts = {"family": name, "options": options_of(name)}
    if as_json:
        print_json(facts)
    elif name is not None:
        width = shutil.get_terminal_size((100, 24)).columns
        for key, each in facts["options"].items():
            echo(f"  {key} = {_text(each['default'])}")
            echo(*textwrap.wrap(each["meaning"], width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    else:
        lines = ["Families (train --flow NAME), and the data that each takes:"]
        for known, each in facts["families"].items():
            lines.append(f"  {known:<22} {each['purpose']} ({', '.join(each['data'])})")
        lines += ["", "Demonstrations (train --data NAME):"]
        for known, each in facts["demonstrations"].items():
            lines.append(f"  {known:<22} {each['kind']}: {each['what']}")
        echo(*lines)


def _text(value: Any) -> str:
    """Returns a default as --option takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
