"""This module runs `tarflow-fast sample` for tests: it has what is asked for, and what is in the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
NAMES = ["tench, Tinca tinca", "7", "shark"]
ALL = ["-o", "g.png", "--npz", "s.npz", "--singles", "d", "--gif", "m.gif"]
FILES = ["g.png", "s.npz", "m.gif"]
Run = Callable[..., Result]


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def numbers(path: str = "s.npz") -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def how(path: str) -> dict[str, Any]:
    with Image.open(path) as picture:
        found: dict[str, Any] = json.loads(picture.info["tarflow_fast"])
    return found
