"""What all tests of the native CPU engine have."""

from __future__ import annotations

import functools

import pytest

from tarflow_fast.native import load_native


@pytest.fixture(autouse=True)
def _threads_share_small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines believe that threads need not wait for one another, so that all threads take part in small passes
    as they do in large ones."""
    native = load_native()
    monkeypatch.setattr(native, "Engine", functools.partial(native.Engine, meeting=0.0))
