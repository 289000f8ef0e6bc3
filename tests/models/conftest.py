"""The density pass in C++ is tested on memory full of NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tarflow_fast.models import cpu_density as module


@pytest.fixture
def poisoned_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills with NaN what the density pass in C++ is to fill."""

    def full(like: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: like(*args, **options).fill_(torch.nan)

    fake = type("torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
    fake.empty, fake.empty_like = full(torch.empty), full(torch.empty_like)
    monkeypatch.setattr(module, "torch", fake)
