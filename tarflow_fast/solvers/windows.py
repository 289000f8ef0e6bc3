"""Which windows there are to choose from, and what is hoped for of one that was never tried."""

from __future__ import annotations

LEAST_PASSES = 4
"""Every pass gains a token, whatever was guessed; of those beyond it, trained models have kept none before its fourth
pass (at a tolerance of 1e-3; at 1e-2, its third or fourth)."""


def widths(tokens: int) -> list[int]:
    """Powers of two, and all tokens but the first, which is given."""
    most = max(tokens - 1, 1)
    return [1 << i for i in range(1, most.bit_length()) if 1 << i < most] + [most]


def hoped_advance(window: int) -> float:
    """Tokens that a pass gains at best."""
    return 1 + (window - 1) / LEAST_PASSES
