"""Gates for tests of engines that hand each batch to another one: what they tell is given, and nothing is probed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tarflow_fast.backend import registry
from tarflow_fast.engine.verdict import Size, Verdict


def proven(name: str, seconds: float, default: str = "torch") -> Verdict:
    """A verdict by which this backend takes so many seconds where the default takes one."""
    return Verdict(True, "as the test has it", {default: 1.0, name: seconds})


class Told:
    """A gate that tells, for each backend, a verdict, or one that depends on the size; None is still being probed."""

    def __init__(self, **verdicts: Verdict | Callable[[Size], Verdict | None] | None):
        self.verdicts: dict[str, Any] = dict(verdicts)
        self.asked: list[Size] = []
        self.revoked: dict[str, str] = {}

    def look(self, size: Size) -> Mapping[str, Verdict | None]:
        self.asked.append(size)
        return {name: told(size) if callable(told) else told for name, told in self.verdicts.items()}

    def revoke(self, name: str, why: str) -> None:
        self.revoked[name] = why


def pretend_probed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let "auto" be PyTorch's engine, and these backends where a gate says so."""
    monkeypatch.setattr(registry, "default_backend", lambda request: ("torch", "the test's"))
    monkeypatch.setattr(registry, "candidates", lambda request: (list(names), {}))
