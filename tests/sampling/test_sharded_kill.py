"""However processes end, the same command goes on, and what it leaves is what an undisturbed run leaves."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import random_model

if sys.platform == "win32":
    pytest.skip("POSIX", allow_module_level=True)

from runs import Child, fork, limit_files

import tarflow_fast as tff
from tarflow_fast.sampling.sharded import FORMATS, draw_shards
from tarflow_fast.sampling.sharded.job import MANIFEST, RECORDS

N, SIZE = 14, 4
POINTS = ("replace", "unlink", "open", "write")  # where a process may be killed, of the module os


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def draw(out: Path, format: str, side: int = 4) -> Callable[[], object]:
    def act() -> None:
        model = random_model(img_size=side, num_classes=3)
        sampler = tff.Sampler(model, solver="sequential", threads=1)
        draw_shards(sampler, out, N, [0, 1, 2], format=format, shard_size=SIZE, batch_size=2)

    return act


def killed_at(point: int, action: Callable[[], object]) -> Callable[[], object]:
    """Returns the action that ends by SIGKILL just before the call of that number of one of POINTS."""

    def act() -> None:
        left = point

        def wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **how: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **how)

            return call

        for name in POINTS:
            setattr(os, name, wrapped(getattr(os, name)))
        action()

    return act


@pytest.mark.parametrize(
    "format", ["npz", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS if name != "npz")]
)
def test_killed_at_any_point(tmp_path: Path, format: str) -> None:
    assert fork(draw(tmp_path / "one", format)).wait() == 0
    expected = contents(tmp_path / "one")
    rng = random.Random(format)
    for trial in range(3):
        out = tmp_path / str(trial)
        codes = [fork(killed_at(rng.randrange(25), draw(out, format))).wait() for _ in range(4)]
        assert codes[0] == -signal.SIGKILL
        assert set(codes) <= {0, -signal.SIGKILL}
        assert fork(draw(out, format)).wait() == 0
        assert contents(out) == expected


def test_a_full_disk_is_told_and_leaves_what_is_there(tmp_path: Path) -> None:
    assert fork(draw(tmp_path / "one", "npz", 16)).wait() == 0
    child = fork(limit_files(1500, draw(tmp_path / "two", "npz", 16)))  # job.json fits, a shard does not
    assert child.wait() == 70
    assert "File too large" in child.text
    assert "two/0000" in child.text
    assert not list((tmp_path / "two").glob("*.npz"))
    assert not list((tmp_path / "two").glob(".*"))
    assert fork(draw(tmp_path / "two", "npz", 16)).wait() == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def command(out: Path) -> Callable[[], object]:
    """Returns the command that draws 2,000 images of the shipped model."""
    from tarflow_fast.cli import main  # here, so that not each child has to import it

    def act() -> None:
        how = (
            "--solver",
            "sequential",
            "--threads",
            "1",
            "--batch-size",
            "20",
            "--labels",
            "random",
            "--guidance",
            "0",
        )
        main(["sample", "-n", "2000", "--out", str(out), "--shard-size", "20", "--no-denoise", *how])

    return act


def start(out: Path, world: int, wrap: Callable[[Callable[[], object]], Callable[[], object]]) -> list[Child]:
    return [fork(wrap(command(out)), {"RANK": str(rank), "WORLD_SIZE": str(world)}) for rank in range(world)]


def records(out: Path) -> int:
    return len(list((out / RECORDS).glob("[0-9]*.json")))


def await_records(out: Path, count: int, children: list[Child]) -> None:
    end = time.monotonic() + 120
    while records(out) < count and not all(child.ended() for child in children):
        assert time.monotonic() < end
        time.sleep(0.005)


def end_by(end: str, out: Path, world: int, rng: random.Random) -> set[int]:
    """Starts the command, ends it that way after a few more shards, and returns how its processes exited."""
    before = records(out)
    wrap = (lambda action: limit_files(9000, action)) if end == "full" else (lambda action: action)
    children = start(out, world, wrap)
    if end != "full":
        await_records(out, before + rng.randint(0, 4), children)
        time.sleep(rng.uniform(0, 0.1))
    if end == "one":
        children[rng.randrange(world)].kill()
        await_records(out, before + rng.randint(4, 6), children)
    if end in ("one", "all"):
        for child in children:
            child.kill()
    elif end == "interrupt":
        for child in children:
            if not child.ended():
                os.kill(child.pid, signal.SIGINT)
    return {child.wait(120) for child in children}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the command leaves that one process runs to its end."""
    out = tmp_path_factory.mktemp("undisturbed") / "one"
    assert fork(command(out)).wait(300) == 0
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_two_thousand_images_through_ten_ends(tmp_path: Path, undisturbed: dict[str, bytes], world: int) -> None:
    out, rng = tmp_path / "two", random.Random(world)
    ends = [*("one", "all", "interrupt", "full") * 2, "one", "all"]
    rng.shuffle(ends)
    while ends:
        codes = end_by(ends[0], out, world, rng)
        if (out / MANIFEST).exists():  # it was over before it could be ended: the others are for another folder
            assert contents(out) == undisturbed
            out = Path(f"{out}-more")
            continue
        wanted = {"one": {-signal.SIGKILL}, "all": {-signal.SIGKILL}, "interrupt": {130, 70}, "full": {1}}[ends.pop(0)]
        assert codes <= wanted
    assert records(out) < 100
    children = start(out, world, lambda action: action)
    assert [child.wait(300) for child in children] == [0] * world
    assert contents(out) == undisturbed
