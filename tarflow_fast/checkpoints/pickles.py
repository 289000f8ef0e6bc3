"""Pickles are read as data here, by a machine that knows lists, dicts, text, numbers, and places where tensors lie.

Nothing that a pickle names is imported or called. What is of another class becomes a `Foreign`, which tells its name;
so files whose settings hold objects of other programs still give their weights, and a hostile one gives nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

_MARK = object()
_SCALARS = (str, int, float, bool, bytes, type(None))
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}


@dataclass
class Foreign:
    """A `Foreign` is an object of a class that is not looked up: its name, and what the pickle gave it."""

    name: str
    args: tuple[Any, ...] = ()
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


@dataclass(frozen=True)
class Global:
    """A `Global` is a name that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """A `Storage` is a run of values in a file.

    key: the name under which the file holds it. dtype: the dtype of its values. numel: how many there are, as the
    pickle claims.
    """

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class View:
    """A `View` is a tensor, as places in a storage: offset and stride count values of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load_pickle(file: IO[bytes]) -> Any:
    """Returns the next object of the file. Raises ValueError for what is no pickle.

    The time that it takes is proportional to the length of the pickle.
    """
    return _Machine().run(file)


class _Machine:
    """A `_Machine` carries out the opcodes of one pickle, with a stack and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        """Returns the object that the pickle describes. Raises ValueError for a pickle that breaks the rules."""
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except ValueError:
            raise
        except Exception as error:  # the stack machine fails on a pickle that breaks its rules
            raise ValueError("a damaged pickle") from error
        raise ValueError("a pickle without an end")

    def _step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(self._since_mark())
        elif name == "DICT":
            values = self._since_mark()
            stack.append({})
            self._set(values)
        elif name == "SETITEM":
            values = [stack.pop(-2), stack.pop()]
            self._set(values)
        elif name == "SETITEMS":
            self._set(self._since_mark())
        elif name == "APPEND":
            self._extend([stack.pop()])
        elif name in ("APPENDS", "ADDITEMS"):
            self._extend(self._since_mark())
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(_named(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(str(module), str(attribute)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_made(function, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_made(function, arguments))
        elif name == "INST":
            stack.append(_made(_named(*argument.partition(" ")[::2]), tuple(self._since_mark())))
        elif name == "OBJ":
            function, *rest = self._since_mark()
            stack.append(_made(function, tuple(rest)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Foreign):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        else:
            raise ValueError(f"a pickle with {name}")

    def _since_mark(self) -> list[Any]:
        """Takes what stands on the stack since the last mark, and returns it."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise ValueError("a damaged pickle")

    def _set(self, values: list[Any]) -> None:
        """Puts keys and values, which alternate in the list, into the dict on top of the stack."""
        target = self.stack[-1]
        items = target.items if isinstance(target, Foreign) else target
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, _SCALARS):  # others would have to be hashed, which for nested tuples takes for ever
                items[key] = value

    def _extend(self, values: list[Any]) -> None:
        """Appends values to what is on top of the stack, if that is a list."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)


def _named(module: str, name: str) -> Any:
    """Returns the dtype of torch that the name stands for, else the name as a `Global`."""
    dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
    return dtype if isinstance(dtype, torch.dtype) else Global(module, name)


def _made(function: Any, arguments: Any) -> Any:
    """Returns what a call of that name makes, if it is one that only describes tensors or dicts; else a `Foreign`."""
    if isinstance(function, Foreign) and function.name == "functools.partial" and function.args:
        function = function.args[0]
        return Foreign(str(function) if isinstance(function, Global) else "?")
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        return Foreign("?")
    name = str(function)
    if name in ("collections.OrderedDict", "collections.defaultdict"):
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else ()  # Python 2 wrote a list of pairs
        return {key: value for key, value in pairs if isinstance(key, _SCALARS)}
    if name.startswith("torch._utils._rebuild_tensor") and not isinstance(arguments[0], Storage):
        raise ValueError("a damaged description of a tensor")
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        storage, offset, shape, stride = arguments[:4]
        return _view(storage, offset, shape, stride)
    if name == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, stride, _, _, dtype, *_ = arguments
        return _view(storage, offset, shape, stride, dtype)
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":  # (function, class, its arguments, state)
        return _made(arguments[0], arguments[2])
    if name == "torch.Size":
        return arguments[0]
    return Foreign(name, arguments)


def _storage(given: Any) -> Storage:
    """Returns what torch's persistent id ("storage", class, key, device, number of values) stands for."""
    _, kind, key, _, numel, *_ = given
    name = kind.name if isinstance(kind, Global) and kind.module in ("torch", "torch.storage") else ""
    if name not in _STORAGES or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise ValueError("a damaged description of a tensor")
    return Storage(key, _STORAGES[name], numel)


def _view(storage: Storage, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> View:
    """Returns a view of a storage. Raises ValueError for numbers that no tensor has."""
    numbers = (offset, *shape, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(stride):
        raise ValueError("a damaged description of a tensor")
    dtype = dtype if isinstance(dtype, torch.dtype) else storage.dtype
    return View(storage, dtype, offset, tuple(shape), tuple(stride))
