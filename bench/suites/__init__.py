"""The suites: a file NAME.py, or NAME/suite.py, whose `SUITE` is a `bench.common.suite.Suite`, is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..common.record import Record
from ..common.suite import Suite


def find_suites() -> list[Suite[Any]]:
    """Returns the SUITE of every module NAME.py here, and of NAME/suite.py in every folder."""
    found = [f"{each.name}.suite" if each.ispkg else each.name for each in pkgutil.iter_modules(__path__)]
    return [importlib.import_module(f"{__name__}.{name}").SUITE for name in sorted(found)]


def suite_of(record: Record) -> Suite[Any]:
    """Returns the suite that left this record. Raises LookupError."""
    name = record["suite"]
    return {each: suite for suite in find_suites() for each in suite.names or (suite.name,)}[name]
