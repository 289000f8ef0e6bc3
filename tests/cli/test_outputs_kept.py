"""The files of `tarflow-fast sample` where it ends early: what was drawn is kept, what was there stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_runs import ALL, FILES, POSIX, Run, contents, how, numbers

from tarflow_fast.cli.terminal import Terminated
from tarflow_fast.errors import NonFiniteError
from tarflow_fast.sampling.report import Samples
from tarflow_fast.sampling.sampler import Sampler

ENDS: list[tuple[BaseException, int, str]] = [
    (NonFiniteError(0, 1, 4), 1, "Error: non-finite"),
    (OSError(5, "Input/output error", "x"), 1, "Error: x: Input/output error"),
    (KeyboardInterrupt(), 130, "Interrupted"),
    (Terminated(), 143, "Terminated"),
]


@pytest.mark.parametrize(("error", "code", "says"), ENDS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("there", [True, False])
def test_what_was_drawn_is_kept_and_what_was_there_stays(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str, there: bool
) -> None:
    run("-n", 9, "--batch-size", 2, "--npz", "whole.npz")
    if there:
        for name in FILES:
            Path(name).write_text("old")
    stream = Sampler.stream

    def ending(self: Sampler, *arguments: Any, **options: Any) -> Iterator[Samples]:
        parts = stream(self, *arguments, **options)
        with contextlib.closing(parts):
            yield next(parts)
            yield next(parts)
            raise error.with_traceback(None)

    monkeypatch.setattr(Sampler, "stream", ending)
    result = run("-n", 9, "--batch-size", 2, *ALL, code=code)
    assert says in result.stderr
    assert "s.partial.npz: the first 4 of 9 images" in result.stderr
    assert code != 1 or result.stderr.count("\n") == 1
    assert [Path(name).read_text() for name in FILES if Path(name).exists()] == (["old"] * 3 if there else [])
    assert sorted(os.listdir("d")) == [f"{i:05d}.png" for i in range(4)]
    np.testing.assert_allclose(numbers("s.partial.npz")["images"], numbers("whole.npz")["images"][:4], atol=1e-5)
    assert numbers("s.partial.npz")["labels"].tolist() == [0, 1, 2, 0]
    assert how("g.partial.png")["images"] == 4
    with Image.open("m.partial.gif") as movie:
        assert movie.n_frames == 4
    assert not [name for name in os.listdir() if name.startswith(".")]
    monkeypatch.undo()


def test_nothing_drawn_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents()

    def stream(self: Sampler, *arguments: Any, **options: Any) -> Iterator[Samples]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Sampler, "stream", stream)
    assert run("-n", 9, *ALL, code=130).stderr == "Interrupted\n"
    assert contents() == before


def test_one_file_that_fails_does_not_take_the_others_with_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "g.png")

    Path("g.png").write_text("old")
    monkeypatch.setattr("tarflow_fast.images.save_grid", fail)
    assert run("-n", 3, *ALL, code=1).stderr == "Error: g.png: No space left on device\n"
    assert Path("g.png").read_text() == "old"
    assert len(numbers()["images"]) == 3
    assert Path("m.gif").exists()
    assert len(os.listdir("d")) == 3


@POSIX
@pytest.mark.parametrize(
    "size", [0, 300, 1500, 4000, *(pytest.param(size, marks=pytest.mark.slow) for size in range(100, 3400, 200))]
)
def test_a_disk_that_is_full(run: Run, size: int) -> None:
    """Here a limit on the size of files."""
    import resource

    line = ["-n", 12, "--batch-size", 4, *ALL]
    run(*line)
    wanted = contents()
    for name in FILES:
        Path(name).write_text("old")
    shutil.rmtree("d")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        result = run(*line, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert any(name in result.stderr for name in [*FILES, "d"])
    for name, content in contents().items():
        if ".partial" not in name:
            assert content in (wanted[name], b"old"), name
    assert not [name for name in os.listdir() if name.startswith(".")]
    for name in os.listdir():
        if ".partial" in name:
            os.unlink(name)
    run(*line)
    assert contents() == wanted


KILLED = """if True:
    import os, random, signal, sys, time
    from tarflow_fast.cli import main
    import tarflow_fast.checkpoints, tarflow_fast.images, tarflow_fast.sampling.sampler

    def start(line):
        child = os.fork()
        if child == 0:
            try:
                main(line)
            except SystemExit as end:
                os._exit(end.code)
            os._exit(99)
        return child

    def contents():
        found = {}
        for folder, _, names in os.walk("."):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    found[os.path.join(folder, name)] = file.read()
        return found

    line, moments = sys.argv[2:], int(sys.argv[1])
    def whole():
        started = time.monotonic()
        assert os.waitpid(start(line), 0)[1] == 0
        return time.monotonic() - started

    seconds = min(whole(), whole())  # the first run is slower than those that follow
    wanted, killed = contents(), 0
    random.seed(0)
    for i in range(moments):
        for name in ("g.png", "s.npz", "m.gif"):
            if i % 2:
                os.unlink(name)
        child = start(line)
        time.sleep(random.uniform(0.1, 0.9) * seconds)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        for name, content in contents().items():
            assert "/.tarflow-" in name or content == wanted[name], name
        seconds = min(seconds, whole())  # a kill must come before the end, however quick the machine is now
        assert contents() == wanted, sorted(contents())
    print(killed, seconds)
"""


def kill_at(moments: int) -> int:
    line = ["sample", "-m", "m.safetensors", "-n", "120", "--batch-size", "20", "--solver", "sequential", "-q", *ALL]
    command = [sys.executable, "-c", KILLED, str(moments), *line]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[0])


@POSIX
@pytest.mark.slow
def test_killed_and_begun_again(run: Run) -> None:
    assert kill_at(2) >= 1


@POSIX
@pytest.mark.slow
def test_killed_at_a_hundred_moments_and_begun_again(run: Run) -> None:
    assert kill_at(100) >= 50
