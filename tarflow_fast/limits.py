"""The limits of arguments: numbers that no machine can serve, so that asking for more is refused at once.

This module imports neither torch nor numpy.
"""

from __future__ import annotations

import os

MOST_SEED = 2**64 - 1
MOST_NUMBER = 2**63 - 1  # number of an image, and number of images
MOST_BATCH = 2**20  # images in one pass
MOST_SIZE = 2**16  # pixels, channels or columns along one side
MOST_GUIDANCE = 1000.0
MOST_TOL = 2.0  # images are about -1 to 1, so no token moves further
MOST_NOISE_STD = 100.0
MOST_SCALE = 100.0  # multiplier of a denoising step
MOST_ATTN_TEMP = 1e6


def most_threads() -> int:
    """Returns the most threads that may be asked for: four for each logical core, but at least 64.

    More threads than that would only take each other's time.
    """
    return max(4 * (os.cpu_count() or 1), 64)
