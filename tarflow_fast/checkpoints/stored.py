"""Files of tensors, opened without reading them: torch's `.pth` in both of its formats, `.safetensors`, sharded or not.

What a file claims is held against what it has before anything of the claimed size is made.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError
from .pickles import Foreign, Storage, View, load_pickle

INDEX = ".index.json"  # how the name of a sharded checkpoint's table ends
LARGEST_TABLE = 64 * 2**20  # bytes of such a table, or of another JSON file
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_TENSORS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file that it stands for; run `git lfs pull`",
    b"<": "a web page or XML, not a checkpoint; download the file itself",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x93NUMPY": "a numpy array, not a checkpoint",
    b"\x89HDF": "an HDF5 file; save the weights by torch.save(model.state_dict(), …)",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. dtype: torch's, or the file's own name of another. storage, nbytes: what it is part of. span:
    bytes from its first value to its last, which is what `read` reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    storage: tuple[str, str]
    nbytes: int
    span: int
    read: Callable[[], Tensor]
    broken: str | None = None  # why it cannot be read

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Content:
    """What a file holds: dicts and lists as saved, tensors as `StoredTensor`, and safetensors' own metadata."""

    tree: Any
    header: dict[str, str] = field(default_factory=dict)


def open_content(path: Path, stack: ExitStack) -> Content:
    """The content of a file, which `stack` closes. Raises CheckpointError, with the reason alone."""
    try:
        size = path.stat().st_size
        file = stack.enter_context(path.open("rb"))
        start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({_reason(error)})") from error
    if path.name.endswith(INDEX):
        return _open_shards(path, stack)
    if not start:
        raise CheckpointError("empty")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _open("a readable safetensors file", lambda: _open_safetensors(path, stack))
    for magic, what in _NOT_TENSORS.items():
        if start.startswith(magic):
            raise CheckpointError(what)
    if start.startswith(b"PK"):
        return _open("a readable weights-only .pth file", lambda: Content(_read_zip(file, size)))
    if start.startswith(b"\x80"):
        return _open("a readable weights-only .pth file", lambda: Content(_read_legacy(file, size)))
    kind = "safetensors" if path.suffix == ".safetensors" else "weights-only .pth"
    raise CheckpointError(f"not a readable {kind} file (it does not begin as one)")


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _open(kind: str, read: Callable[[], Content]) -> Content:
    try:
        return read()
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError("too large for this machine's memory") from error
    except Exception as error:  # whatever a foreign or damaged file makes a parser raise
        said = str(error) if type(error) is ValueError else "damaged or cut off"
        raise CheckpointError(f"not {kind} ({said})") from error


def read_json(path: Path) -> Any:
    """Raises CheckpointError, with the reason alone."""
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise CheckpointError(f"{path.name!r} is too large to be a table")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.name!r} cannot be read ({_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name!r} is not JSON") from error


def shard_names(path: Path) -> dict[str, str]:
    """Names of tensors to names of files in the folder of this table. Raises CheckpointError, with the reason alone."""
    table = read_json(path)
    shards = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError("not a table of shards (no 'weight_map')")
    for name in shards.values():
        if not isinstance(name, str) or not name or name != os.path.basename(name) or "\\" in name or "\0" in name:
            raise CheckpointError(f"a shard must be a file beside its table, got {str(name)[:80]!r}")
    return shards


def _open_shards(path: Path, stack: ExitStack) -> Content:
    tree: dict[str, Any] = {}
    header: dict[str, str] = {}
    shards: dict[str, Content] = {}
    for key, name in shard_names(path).items():
        if name not in shards:
            if name.endswith(INDEX) or not path.with_name(name).is_file():
                raise CheckpointError(f"its shard {name[:80]!r} is missing")
            try:
                shards[name] = open_content(path.with_name(name), stack)
            except CheckpointError as error:
                raise CheckpointError(f"its shard {name[:80]!r}: {error}") from error
            header = {**shards[name].header, **header}
        content = shards[name].tree
        if not isinstance(content, Mapping) or key not in content:
            raise CheckpointError(f"its shard {name[:80]!r} has no {key[:80]!r}")
        tree[key] = content[key]
    return Content(tree, header)


def _open_safetensors(path: Path, stack: ExitStack) -> Content:
    file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
    tree = {}
    for key in file.keys():  # noqa: SIM118 (not a dict)
        part = file.get_slice(key)
        shape, name = tuple(part.get_shape()), part.get_dtype()
        dtype = _SAFETENSORS_DTYPES.get(name, name)
        nbytes = math.prod(shape) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1)
        tree[key] = StoredTensor(shape, dtype, (path.name, key), nbytes, nbytes, partial(_tensor_of, path, key, shape))
    return Content(tree, dict(file.metadata() or {}))


# torch.save's formats


@dataclass(frozen=True)
class _Place:
    """Bytes of a file. crc: their checksum, where the file has one."""

    start: int
    nbytes: int
    crc: int = 0


def _tensor_of(path: Path, key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor, mapped from the file by a mapping of its own: what has been read of one file goes with its tensors,
    and not when all of the file has been read."""
    # torch.device: older versions put it on torch's default device.
    with torch.device("cpu"), safetensors.safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    if tuple(tensor.shape) != shape:
        raise ValueError("the file was changed while it was read")
    return tensor


def _read_zip(file: IO[bytes], size: int) -> Any:
    """What torch.save writes since 1.6: a zip of data.pkl and, for each storage, data/KEY."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in entries if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(roots) != 1:
        raise ValueError("a zip archive that torch.save did not write")
    root = roots[0]
    if root + "constants.pkl" in entries:
        raise ValueError("a TorchScript archive; save the state dict of its module instead")
    if sum(info.file_size for info in entries.values()) > size or any(
        info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1
        for info in entries.values()
    ):
        raise ValueError("a zip archive that claims more than it holds")

    def place(name: str) -> _Place:
        info = entries[root + name]
        file.seek(info.header_offset)
        head = file.read(30)
        start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if head[:4] != b"PK\x03\x04" or start + info.file_size > size:
            raise ValueError("a damaged zip archive")
        return _Place(start, info.file_size, info.CRC)

    if root + "byteorder" in entries and _read(file, place("byteorder")) != sys.byteorder.encode():
        raise ValueError("written on a machine of another byte order")
    tree = load_pickle(io.BytesIO(_read(file, place("data.pkl"))))
    return _with_tensors(tree, file, lambda storage: place(f"data/{storage.key}"))


class _Clipped:
    """A file for `load_pickle` that never asks for more than is there: what is asked for would be allocated."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, n: int) -> bytes:
        return self.file.read(min(n, self.size - self.file.tell()))


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """What torch.save wrote before 1.6: pickles, then each storage's number of values and the values."""
    file.seek(0)
    clipped: Any = _Clipped(file, size)
    head = load_pickle(clipped)
    if head != _LEGACY_MAGIC:
        return head  # another pickle, for what it says of itself
    protocol, system = load_pickle(clipped), load_pickle(clipped)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise ValueError("an unknown version of torch.save's format")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError("written on a machine of another byte order")
    tree, keys = load_pickle(clipped), load_pickle(clipped)
    used = (node.storage if isinstance(node, View) else node for node in _nodes(tree))
    storages = {node.key: node for node in used if isinstance(node, Storage)}
    places: dict[str, _Place] = {}
    at = file.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in storages:
            raise ValueError("a storage without a tensor")
        file.seek(at)
        numel = int.from_bytes(file.read(8), "little")
        places[key] = _Place(at + 8, numel * storages[key].dtype.itemsize)
        at += 8 + places[key].nbytes
        if at > size:
            raise ValueError("cut off")
    return _with_tensors(tree, file, lambda storage: places[storage.key])


def _read(file: IO[bytes], place: _Place) -> bytearray:
    file.seek(place.start)
    data = bytearray(place.nbytes)
    if file.readinto(data) != place.nbytes:  # type: ignore[attr-defined]
        raise ValueError("cut off")
    if place.crc and zlib.crc32(data) != place.crc:
        raise ValueError("damaged: a checksum differs")
    return data


def _children(node: Any) -> list[Any]:
    if isinstance(node, Foreign):
        return [*node.args, node.items, node.state]
    return list(node.values()) if isinstance(node, dict) else list(node) if isinstance(node, (list, tuple)) else []


def _nodes(tree: Any) -> Iterator[Any]:
    """Every part of a tree once, whatever the number of ways to it."""
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += _children(node)


def _with_tensors(tree: Any, file: IO[bytes], place: Callable[[Storage], _Place]) -> Any:
    """Puts a `StoredTensor` into the dicts of a tree where a view stood."""
    for node in _nodes(tree):
        if isinstance(node, dict):
            for key, value in node.items():
                if isinstance(value, View):
                    node[key] = _stored(value, file, place)
    return tree


def _stored(view: View, file: IO[bytes], place: Callable[[Storage], _Place]) -> StoredTensor:
    """A view that lies within its storage, and that within the file; else one that tells what is wrong."""
    numel, claimed = math.prod(view.shape), view.storage.numel * view.storage.dtype.itemsize
    last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
    first, span = view.offset * view.dtype.itemsize, (last + 1 - view.offset) * view.dtype.itemsize
    broken = None
    try:
        found = place(view.storage)
    except KeyError:
        found, broken = _Place(0, 0), "its values are missing"
    if broken is None and numel:
        if (last + 1) * view.dtype.itemsize > found.nbytes or claimed > found.nbytes:
            broken = f"a tensor of shape {view.shape} claims more values than the file holds"
        elif any(n > 1 and step == 0 for n, step in zip(view.shape, view.stride, strict=True)):
            broken = f"a tensor of shape {view.shape} repeats fewer values, got a stride of 0; save a contiguous one"

    def read() -> Tensor:
        if not numel:
            return torch.empty(view.shape, dtype=view.dtype, device="cpu")
        crc = found.crc if span == found.nbytes else 0  # a part of a storage has none of its own
        data = _read(file, _Place(found.start + first, span, crc))
        return torch.frombuffer(data, dtype=view.dtype).as_strided(view.shape, view.stride)

    key = ("", view.storage.key)
    return StoredTensor(view.shape, view.dtype, key, found.nbytes, span, read, broken)
