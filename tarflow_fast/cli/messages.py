"""What the library says is put in the words of the command line: arguments become the flags that set them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import click

from ..errors import ArgumentError, TarFlowError
from .terminal import one_line

if TYPE_CHECKING:
    from .options import Command

SIZES = "size"  # the name of the type of options that take one number or two
_LITERALS = {"True": "true", "False": "none", "None": "none"}
_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_SIDES = re.compile(r"\((\d+), (\d+)\)")  # height and width
_SEQUENCE = re.compile(r"(?:^\(|\[)('[^']*'(?:, '[^']*')*),?[)\]]")  # a tuple that is all, or a list


def failure(ctx: click.Context, command: Command, error: Exception) -> click.ClickException:
    """Returns the error as one line, with its notes; a wrong value of an option is wrong usage of that option."""
    notes = getattr(error, "__notes__", ())
    if not isinstance(error, ArgumentError):
        return click.ClickException("; ".join([in_flags(command, error_text(error)), *map(one_line, notes)]))
    called = {error.argument, command.aliases.get(error.argument)}
    param = next((p for p in command.params if called & {p.name, *p.opts}), None)
    text = "; ".join(map(one_line, (_argument(command, error, param), *notes)))
    if isinstance(param, click.Option) and (error.got is None or not getattr(param, "outside", False)):
        return click.UsageError(text, ctx)
    return click.ClickException(text)


def error_text(error: Exception) -> str:
    """Returns one line that says what went wrong."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fspath(error.filename)}: "
        text = f"{where}{error.strerror}"
    elif isinstance(error, MemoryError) and not isinstance(error, TarFlowError):
        text = f"out of memory ({text})" if text else "out of memory"
    return one_line(text or type(error).__name__)


def in_flags(command: Command, text: str) -> str:
    """Returns the text with flags in the place of name='value', of names with an underscore, and of names in advice.

    Names before a colon stay, as they are what a file holds, except for the one that begins the text.
    """
    flags = _flags(command)
    names = "|".join(map(re.escape, sorted(flags, key=len, reverse=True)))
    long = "|".join(re.escape(name) for name in flags if "_" in name)
    given = re.compile(rf"(?<![^\s(])({names})=('[^']*'|True|False|{_NUMBER}|{_SIDES.pattern})(?=[,;.)]?(?:\s|$))")
    text = given.sub(lambda m: _set(command, m[1], m[2].strip("'")), text)
    if long:
        text = re.sub(rf"(?<![^\s(])({long})(?=[,;.)]?(?:\s|$))|^({long})(?=:)", lambda m: flags[m[1] or m[2]], text)
    return re.sub(rf"\b(give|by|leave|lower) ({names})\b(?![/\\])", lambda m: f"{m[1]} {flags[m[2]]}", text)


def _flags(command: Command) -> dict[str, str]:
    """Returns what the command line calls each argument."""
    return {**command.aliases, **{param.name: _flag(param) for param in command.params if param.name is not None}}


def _flag(param: click.Parameter) -> str:
    return param.human_readable_name if isinstance(param, click.Argument) else max(param.opts, key=len)


def _switch(param: click.Parameter | None, value: str) -> str | None:
    """Returns the flag that says this value of a switch, or None for what is no switch, or has no flag for it."""
    if not isinstance(param, click.Option) or not param.is_flag or value not in ("True", "False"):
        return None
    return next(iter(param.opts if value == "True" else param.secondary_opts), None)


def _set(command: Command, name: str, value: str) -> str:
    switch = _switch(next((p for p in command.params if p.name == name), None), value)
    return switch or f"{_flags(command)[name]} {_LITERALS.get(value, _sides(value))}"


def _sides(text: str) -> str:
    """Returns the text with 6x8 in the place of (6, 8)."""
    return _SIDES.sub(r"\1x\2", text)


def _argument(command: Command, error: ArgumentError, param: click.Parameter | None) -> str:
    flag = _flags(command).get(error.argument, error.argument) if param is None else _flag(param)
    expected = in_flags(command, _SEQUENCE.sub(r"\1", error.expected))
    got = _SEQUENCE.sub(r"\1", str(error.got))
    if isinstance(param, click.Option) and param.type.name == SIZES:
        expected, got = _sides(expected), _sides(got)
    word = re.match(r"(True|False|None)\b", expected)
    if word is not None:
        expected = (_switch(param, word[0]) or _LITERALS[word[0]]) + expected[word.end() :]
        if (typed := _switch(param, got)) is not None:
            return f"{typed}: expected {expected}"
    return f"{flag}: expected {expected}, got {_LITERALS.get(got, got)}"
