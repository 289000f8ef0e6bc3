"""The sets of instructions that native code runs on here, as parameters of tests.

Those that it takes and the portable one are tested at once. The sets between these, of which some processors have four,
are slow cases, so that the other tests take as long on all processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.native import instruction_sets

SETS = instruction_sets() if cpu_missing() is None else []


def cases(sets: Sequence[str] = SETS, of: Callable[[str], Any] = str, name: Callable[[str], str] = str) -> list[Any]:
    """Returns parameters of sets, the best first: what `of` makes of each, under its `name`."""
    ends = (*sets[:1], *sets[-1:])
    between = [pytest.mark.slow, pytest.mark.between]
    return [pytest.param(of(s), id=name(s), marks=[] if s in ends else between) for s in sets]


every_set = pytest.mark.parametrize("isa", cases())
