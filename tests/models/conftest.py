"""Memory full of NaN for the density pass in C++."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tarflow_fast.models import cpu_density as module


@pytest.fixture
def poisoned_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the density pass in C++ is to fill is full of NaN."""

    def full(like: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: like(*args, **options).fill_(torch.nan)

    fake = type("torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
    fake.empty, fake.empty_like = full(torch.empty), full(torch.empty_like)
    monkeypatch.setattr(module, "torch", fake)
