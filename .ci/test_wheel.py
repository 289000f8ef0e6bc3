"""Tests the installed package by a quick part of the tests, in a folder where its sources are not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = (
    "test_package.py",
    "test_reference.py",
    "backend/cpu",
    "test_images.py",
    "data/test_png.py",
    "checkpoints/test_checkpoint.py",
)
# The native modules have to be in a wheel: where they are missing, their tests are skipped. On Windows there is no
# zlib, and so no reader of PNGs.
CHECK = """
import pathlib, sys
import tarflow_fast, tarflow_fast._cpu, tarflow_fast.kernels
if sys.platform != "win32":
    import tarflow_fast._png
sys.exit(pathlib.Path(sys.argv[1]) in pathlib.Path(tarflow_fast.__file__).resolve().parents)
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bench", "csrc", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy(ROOT / "pyproject.toml", folder)
        subprocess.run([sys.executable, "-c", CHECK, str(ROOT)], cwd=folder, check=True)
        command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in QUICK)]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
