"""torch.save where it cannot be finished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarflow_fast.checkpoints.torch_files import save_torch

FILL = """if True:
    import resource, signal, sys
    from pathlib import Path
    import tarflow_fast as tff
    model = tff.TarFlow(3, 4, 2, 64, 1, 1)
    path = Path(sys.argv[1])
    for name in ("m.pth", "m.safetensors"):
        (path / name).write_text("old")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size in (0, 1, 100, 1000, 5000, 65536, 100000, 150000, 200000, 204800):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        for name in ("m.pth", "m.safetensors"):
            try:
                tff.save(model, path / name)
            except OSError as error:
                print(error.filename == str(path / name), error.strerror)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_old_file_stays(tmp_path: Path) -> None:
    """In a process of its own: torch's writer in C++ may end the one that it is in."""
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True File too large"] * 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth", "m.safetensors"]
    assert (tmp_path / "m.pth").read_text() == "old"


def test_what_is_written_is_what_torch_writes(tmp_path: Path) -> None:
    state = {"a": torch.randn(100, 100), "b": [torch.arange(3)], "c": "text"}
    save_torch(state, tmp_path / "ours.pth")
    back = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert torch.equal(back["a"], state["a"])  # type: ignore[arg-type]
    assert torch.equal(back["b"][0], torch.arange(3))
    assert back["c"] == "text"
