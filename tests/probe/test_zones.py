"""Red zones: writes and reads beyond a buffer are found, and buffers that are gone are let go."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from torch import Tensor

from tarflow_fast.probe.zones import ZONE, RedZones

MAKERS = {
    "empty": lambda: torch.empty(3, 5),
    "zeros": lambda: torch.zeros(3, 5, dtype=torch.int32),
    "full": lambda: torch.full((3, 5), 7.0, dtype=torch.bfloat16),
    "clone": lambda: PLAIN.clone(),
    "empty_like": lambda: torch.empty_like(PLAIN),
    "new_zeros": lambda: PLAIN.new_zeros(3, 5),
    "new_empty": lambda: PLAIN.new_empty((3, 5), dtype=torch.float16),
    "tensor": lambda: torch.tensor([1.0, 2.0]),
}
PLAIN = torch.randn(3, 5)


def spoil(tensor: Tensor, offset: int) -> None:
    """One byte of the memory at this offset from the tensor's."""
    ctypes.memset(tensor.data_ptr() + offset, 0x11, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_writes_beyond_are_found(name: str) -> None:
    zones = RedZones()
    for place in ("before", "after"):
        for far in (0, 100, ZONE - 1):
            with zones:
                made = MAKERS[name]()
            assert zones.broken() is None
            spoil(made, made.nbytes + far if place == "after" else -1 - far)
            assert str(zones.broken()).startswith(f"a write {place} the buffer {tuple(made.shape)} of ")
            del made
            zones.broken()
            assert zones.broken() is None


def test_tensors_are_what_they_would_be() -> None:
    with RedZones():
        made = {name: make() for name, make in MAKERS.items()}
    for name, make in MAKERS.items():
        plain = make()
        assert (made[name].shape, made[name].dtype) == (plain.shape, plain.dtype)
        assert made[name].is_contiguous()
        if not name.endswith(("empty", "empty_like")):
            assert torch.equal(made[name], plain)


def test_reads_beyond_give_nan() -> None:
    with RedZones():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            made = torch.zeros(4, dtype=dtype)
            beyond = made.as_strided((6,), (1,), made.storage_offset() - 1)
            assert beyond.isnan().tolist() == [True, False, False, False, False, True]


def test_buffers_that_are_gone_are_let_go() -> None:
    zones = RedZones()
    with zones:
        kept = torch.zeros(4)
        for _ in range(5):
            torch.zeros(4)
    gc.collect()
    zones.broken()
    assert len(zones._zoned) == 1
    spoil(kept, kept.nbytes)
    assert zones.broken() is not None
