"""The emulated device of the CUDA engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tarflow_fast.backend.cuda import engine as cuda_engine


@pytest.fixture
def device() -> Iterator[Any]:
    """Sets the emulated device: its multiprocessors, a block's shared memory, the order in which threads run."""
    native = cuda_engine.load_native()

    def choose(multiprocessors: int = 3, shared_bytes: int = 227 * 1024, seed: int = 0) -> None:
        native.set_device(multiprocessors, shared_bytes)
        native.set_seed(seed)

    yield choose
    choose()
