"""This module writes safetensors to a file that may not be finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # the first tensor begins at a multiple of so many bytes


def save_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a file that safetensors.torch.load_file reads, into `path` itself; equal contents give equal bytes.

    The library's own writer makes a file of its own name beside `path`, which a killed process leaves behind, and puts
    the metadata in an order that changes from run to run. The format is the header's length as eight bytes, little
    endian; then the header, JSON padded with spaces; then the tensors.

    tensors: by name, contiguous, on the CPU. metadata: text by name. path: the file. Raises OSError where the
    system refuses.
    """
    # The reader wants no gaps, and every tensor at a multiple of its dtype's size: the widest dtypes come first.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
