"""The windows that there are to choose from, and what is hoped for of a window that was never tried."""

from __future__ import annotations

LEAST_PASSES = 4
"""The passes that a token needs at least before its guess is kept.

Every pass gains one token, whatever was guessed. Of the tokens beyond it, trained models have kept none before its
fourth pass at a tolerance of 1e-3, and before its third or fourth at 1e-2.
"""


def widths(tokens: int) -> list[int]:
    """Returns the widths of windows to choose from: powers of two, and all tokens but the first, which is given."""
    most = max(tokens - 1, 1)
    return [1 << i for i in range(1, most.bit_length()) if 1 << i < most] + [most]


def hoped_advance(window: int) -> float:
    """Returns the number of tokens that a pass over this window gains at best."""
    return 1 + (window - 1) / LEAST_PASSES
