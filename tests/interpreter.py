"""Triton's interpreter runs the tests' kernels where there is no GPU; this module spares it what it does over and over.

Kernels as small as those of the tests have few numbers in a tensor, so nearly all of the time goes to what surrounds an
operation. What is kept here, or left out, is what the interpreter would come to again:

- Its own functions are in `triton.language` already, where it would put them at every launch and at every call of a
  device function, and look through the whole module for that.
- A shape is made into Triton's tuples of constants once, and not for every tensor and every type that has it.
- A type's counterpart in numpy is looked up in a table that is not made anew for it.
- Integers are not added again in 64 bits for an assertion that is made in debug mode alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

try:
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
except ImportError:  # where Triton is not to be had
    interpreter = None

MOST_KEPT = 10_000  # shapes and types, of which a process of the tests has some hundred
OF_A_TENSOR = {"handle", "shape", "numel", "type", "dtype"}
OF_A_BLOCK = {"element_ty", "shape", "numel", "name"}


class _Kept:
    """This takes the place of the scope that takes the interpreter's functions out again after a launch."""

    def restore(self) -> None:
        pass


@functools.cache
def patch_once() -> None:
    """Lets the interpreter do once a process what it would do again and again, if its insides are those known here."""
    if interpreter is None:
        return
    for owner, name, kept in [
        (interpreter, "_patch_lang", _kept_functions),
        (interpreter, "_get_np_dtype", _kept_numpy_types),
        (tl.core.block_type, "__init__", _kept_shapes_of_blocks),
        (tl.core.tensor, "__init__", _kept_shapes_of_tensors),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _asserted_in_debug_mode),
    ]:
        plain = getattr(owner, name, None)
        if plain is not None:
            setattr(owner, name, kept(plain))


def _kept_functions(patch: Callable[[Any], Any]) -> Callable[[Any], _Kept]:
    """Lets what was put into `triton.language` for one function stay there for all."""
    done: set[frozenset[int]] = set()

    def once(function: Any) -> _Kept:
        seen = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen not in done:
            patch(function)
            done.add(seen)
        return _Kept()

    return once


def _kept_numpy_types(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[Any, Any] = {}

    def get(type: Any) -> Any:
        scalar = type.element_ty if isinstance(type, tl.core.block_type) else type
        if isinstance(scalar, tl.pointer_type):
            return plain(type)
        if scalar not in found:
            found[scalar] = plain(type)
        return found[scalar]

    return get


def _kept_shapes_of_blocks(plain: Callable[..., None]) -> Callable[..., None]:
    made: dict[tuple[int, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *map(_number, _number(shape)))
        kept = made.get(key)
        if kept is not None:  # with the very type in it, so that its id is no other's
            self.__dict__.update(kept)
            return
        plain(self, element_ty, shape)
        if self.__dict__.keys() == OF_A_BLOCK and len(made) < MOST_KEPT:
            made[key] = dict(self.__dict__)

    return init


def _number(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value


def _kept_shapes_of_tensors(plain: Callable[..., None]) -> Callable[..., None]:
    made: dict[int, tuple[Any, Any, Any]] = {}  # by the shape of a type of blocks, which these have in common

    def init(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        kept = made.get(id(shape))
        if kept is not None:
            _, self.shape, self.numel = kept
            self.handle, self.type, self.dtype = handle, type, type.scalar
            return
        plain(self, handle, type)
        if self.__dict__.keys() == OF_A_TENSOR and len(made) < MOST_KEPT:
            made[id(shape)] = shape, self.shape, self.numel

    return init


def _asserted_in_debug_mode(plain: Callable[..., None]) -> Callable[..., None]:
    """Leaves out what would be computed for `device_assert`, which does nothing in another mode."""

    def sanitize(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:
            plain(self, *operands)

    return sanitize
