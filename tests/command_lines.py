"""This module has what tests of the command line share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import Result
from PIL import Image

Run = Callable[..., Result]

NAMES = ["cat", "Dog", "t-shirt/top"]
NOISE = 0.1


def picture(path: str | Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
