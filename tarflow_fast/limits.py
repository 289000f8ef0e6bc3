"""Numbers that no machine can serve, so that asking for them is refused at once. Imports neither torch nor numpy."""

from __future__ import annotations

import os

MOST_SEED = 2**64 - 1
MOST_NUMBER = 2**63 - 1  # of an image, and of how many
MOST_BATCH = 2**20  # images in one pass
MOST_SIZE = 2**16  # pixels, channels or columns along one side
MOST_GUIDANCE = 1000.0
MOST_TOL = 2.0  # images are about -1 to 1: no token moves further
MOST_NOISE_STD = 100.0
MOST_SCALE = 100.0  # multiplier of a denoising step
MOST_ATTN_TEMP = 1e6


def most_threads() -> int:
    """Threads beyond four a logical core only take each other's time; 64 are always allowed."""
    return max(4 * (os.cpu_count() or 1), 64)
