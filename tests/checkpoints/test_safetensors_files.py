"""Our writer of safetensors against the library's reader."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tarflow_fast as tff
from tarflow_fast.checkpoints.safetensors_files import save_safetensors

KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    import tarflow_fast as tff
    model = tff.TarFlow(3, 4, 2, 64, 1, 1)
    plain = os.replace
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    tff.save(model, Path(sys.argv[1]) / "m.safetensors")
"""


def tensors() -> dict[str, torch.Tensor]:
    """Sizes that are no multiple of eight bytes, in every dtype, in an order that the format would not take."""
    made = {
        f"{number}.{dtype}": torch.randn(3, number + 1).to(dtype)
        for number in range(4)
        for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    }
    return {**made, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 2), 'na"me é': torch.ones(1)}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    state = tensors()
    save_safetensors(state, {"format": "pt", "é": '"'}, tmp_path / "m.safetensors")
    back = load_file(tmp_path / "m.safetensors")
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "é": '"'}
    save_file(state, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "m.safetensors").stat().st_size <= (tmp_path / "theirs.safetensors").stat().st_size + 64


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    state, metadata = tensors(), {name: name for name in "zyxabc"}
    save_safetensors(state, metadata, tmp_path / "a")
    save_safetensors(dict(reversed(state.items())), dict(reversed(metadata.items())), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_a_model_is_the_same_file_in_every_process(tmp_path: Path) -> None:
    code = "import sys, tarflow_fast as tff; tff.save(tff.TarFlow(3, 4, 2, 64, 1, 1, num_classes=2), sys.argv[1])"
    made = []
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", "import torch; torch.manual_seed(0); " + code, str(path)], check=True)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]
    size = int.from_bytes(made[0][:8], "little")
    assert json.loads(made[0][8 : 8 + size])["__metadata__"]["format"] == "pt"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_a_killed_save_leaves_nothing_that_the_next_one_does_not_remove(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    tff.save(tff.TarFlow(3, 4, 2, 64, 1, 1), tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
