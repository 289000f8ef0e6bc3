"""The progress bar of commands and sampling."""

from __future__ import annotations

import contextlib

from tqdm.auto import tqdm


class Bar(tqdm):
    """A bar of tqdm's that says nothing more if it was interrupted before it was whole."""

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
