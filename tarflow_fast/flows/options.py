"""A family's options are a frozen dataclass; values come from Python, a file or the command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..checks import check_choice, check_count, check_number
from ..errors import ArgumentError
from ..scalars import check_flag


def read_options(family: str, kind: type, given: Mapping[str, Any]) -> Any:
    """Returns kind(**given) after a check of names and types.

    family: the name that messages give. kind: the dataclass. given: values by name, or their text as the command line
    has it. A field is an int, float, bool, str, tuple of ints, or a Literal of strings, or one of these or None. Raises
    ArgumentError.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            known = "one of " + ", ".join(names) if names else "no options"
            raise ArgumentError("options", f"{known} for {family!r}{hint}", repr(name))
    return kind(**{name: _read(name, hints[name], value) for name, value in given.items()})


def describe_options(kind: type) -> dict[str, tuple[Any, str]]:
    """Returns the default and the meaning of each option; the meaning stands in the docstrings under "Attributes".

    kind: the dataclass.
    """
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, flags=re.MULTILINE):
            meanings[name] = " ".join(text.split())
    return {field.name: (field.default, meanings[field.name]) for field in dataclasses.fields(kind)}


def _read(name: str, hint: Any, value: Any) -> Any:
    """Returns a value as the type of its field. Raises ArgumentError."""
    if type(None) in get_args(hint):
        none = value is None or (isinstance(value, str) and value.lower() == "none")
        return None if none else _read(name, get_args(hint)[0], value)
    if get_origin(hint) is Literal:
        return check_choice(name, value, get_args(hint))
    if hint is str:
        return check_choice(name, value, [value]) if isinstance(value, str) else check_choice(name, value, ["a string"])
    if get_origin(hint) is tuple:
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ArgumentError(name, "integers, such as 64,64", repr(value))
        return tuple(check_count(name, _number(part), low=0) for part in parts)
    if hint is bool:
        return check_flag(
            name, {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
        )
    if hint is int:
        return check_count(name, _number(value), low=-(2**63))
    assert hint is float, f"options have no type {hint}"
    return check_number(name, _number(value))


def _number(value: Any) -> Any:
    """Returns the number that a text spells, or the value itself."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
