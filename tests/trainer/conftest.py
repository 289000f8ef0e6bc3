"""The trainer's tests share these data."""

from __future__ import annotations

import pytest
from runs import write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")
