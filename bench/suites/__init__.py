"""The suites: what a file NAME.py, or NAME/suite.py, has as its `SUITE`, or as its `SUITES`, is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..common.suite import Suite


def find_suites() -> list[Suite]:
    """Returns the suites of every module NAME.py here, and of NAME/suite.py in every folder."""
    names = [f"{each.name}.suite" if each.ispkg else each.name for each in pkgutil.iter_modules(__path__)]
    modules: list[Any] = [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
    return [suite for each in modules for suite in getattr(each, "SUITES", None) or (each.SUITE,)]


def suite_of(record: Any) -> Suite:
    """Returns the suite that left this record. Raises LookupError."""
    return {suite.name: suite for suite in find_suites()}[record["suite"]]
