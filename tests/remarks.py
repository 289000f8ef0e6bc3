"""The fixture `remarks` records what the package has said for the user to know."""

from __future__ import annotations

import warnings

from tarflow_fast.errors import TarFlowWarning


class Remarks:
    """Remarks are what the package has said for the user to know, see `TarFlowWarning`."""

    def __init__(self, caught: list[warnings.WarningMessage]):
        self._caught = caught

    @property
    def messages(self) -> list[str]:
        return [str(each.message) for each in self._caught if issubclass(each.category, TarFlowWarning)]

    def clear(self) -> None:
        self._caught.clear()
