"""Triton's interpreter runs the tests' kernels where there is no GPU; this module prepares it once a process.

It puts its own functions into `triton.language` at every launch and at every call of a device function, and looks
through the whole module for that: a fifth of the time of kernels as small as those of the tests.
"""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # where Triton is not to be had
    interpreter = None


class _Kept:
    """This takes the place of the scope that takes the interpreter's functions out again after a launch."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """Lets what was put into `triton.language` for one function stay there for all."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    done: set[frozenset[int]] = set()

    def once(function: Any) -> _Kept:
        seen = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen not in done:
            patch(function)
            done.add(seen)
        return _Kept()

    interpreter._patch_lang = once
