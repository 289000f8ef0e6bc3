"""The tests of the probe keep verdicts in a folder of their own, and know none from before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_device
import pytest

from tarflow_fast.backend import registry
from tarflow_fast.cache import CACHE_VARIABLE
from tarflow_fast.engine.backend import Backend
from tarflow_fast.probe import prober


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(prober, "_known", {})
    monkeypatch.setattr(prober, "_queued", set())
    fake_device._leaked.clear()
    return folder


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Backend]]:
    """Backends that are put into this list are registered until the test ends; PyTorch's is the default."""
    monkeypatch.setattr(registry, "default_backend", lambda request: ("torch", "the best of the test"))
    monkeypatch.setattr(prober, "default_backend", lambda request: ("torch", "the best of the test"))

    class Registered(list[Backend]):
        def append(self, backend: Backend) -> None:
            registry.register(backend)
            super().append(backend)

    backends = Registered()
    yield backends
    for backend in backends:
        registry.unregister(backend.name)
