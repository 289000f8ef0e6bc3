"""What a pass of the native CPU engine is made to suit: the caches of a machine, and the division among threads and
groups that is chosen for them, which changes no bit."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from cpu_engines import engine_of, inverse
from instruction_sets import every_set

from tarflow_fast.engine import Condition
from tarflow_fast.native import load_native

KB, MB = 2**10, 2**20
TINY = {"L1": (8 * KB, 1), "L2": (32 * KB, 1), "L3": (128 * KB, 64)}
HUGE = {"L1": (256 * KB, 1), "L2": (64 * MB, 1), "L3": (1024 * MB, 1)}


def caches_from(folder: Path, *entries: tuple[str, ...]) -> Any:
    for index, entry in enumerate(entries):
        (folder / f"index{index}").mkdir()
        for name, text in zip(("level", "type", "size", "shared_cpu_list"), entry, strict=True):
            (folder / f"index{index}" / name).write_text(text + "\n")
    return load_native().read_sysfs(str(folder))


def test_caches_are_read_off_the_system(tmp_path: Path) -> None:
    found = caches_from(
        tmp_path,
        ("1", "Data", "32K", "0,8"),
        ("1", "Instruction", "64K", "0,8"),
        ("2", "Unified", "512K", "0,8"),
        ("3", "Unified", "32M", "0-3,8-11"),
    )
    assert found == {"L1": (32 * KB, 2), "L2": (512 * KB, 2), "L3": (32 * MB, 8)}


def test_what_the_system_does_not_say_is_zero_and_nonsense_is_not_believed(tmp_path: Path) -> None:
    found = caches_from(tmp_path, ("1", "Data", "-5K", "0"), ("x", "Data", "1K", "0"), ("2", "Unified", "1024K", "4-2"))
    assert found == {"L1": (0, 0), "L2": (MB, 1), "L3": (0, 0)}


def test_this_machine_has_caches_of_growing_size() -> None:
    caches, source = load_native().caches()
    sizes = [caches[level][0] for level in ("L1", "L2", "L3")]
    assert 0 < sizes[0] < sizes[1] <= sizes[2]
    assert all(cores >= 1 for _, cores in caches.values())
    assert source


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_cache_changes_a_bit(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one tile and of all rows, pieces of a few k and whole panels: the same results."""
    model = random_model(4, img_size=6, layers_per_block=2, channels=128)
    z = random_latents(model, 41)
    native, made = load_native(), []

    def run(caches: dict[str, tuple[int, int]], threads: int) -> tuple[Any, dict[str, Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(native, "Engine", lambda **how: made.append(make(**how, caches=caches)) or made[-1])
            engine = engine_of(model, 0, dtype, instruction_set=isa, threads=threads)
        how = {"samples": 41, "tokens": model.config.num_patches, "guided": False, "threads": threads}
        return inverse(engine, z, Condition()), made[-1].schedule(**how)

    make = native.Engine
    wanted, large = run(HUGE, 1)
    got, small = run(TINY, 1)
    assert small["near_bytes"] < large["near_bytes"]
    assert all(map(torch.equal, got, wanted))
    assert all(map(torch.equal, run(TINY, 3)[0], wanted))


@every_set
def test_groups_are_whole_tiles_and_threads_that_would_only_wait_are_left_out(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = load_native()
    monkeypatch.setattr(native, "Engine", functools.partial(native.Engine, meeting=1e-5))
    engine = engine_of(random_model(4, img_size=6, channels=128), 0, instruction_set=isa)._native
    for samples in (1, 7, 64, 301):
        for threads in (1, 2, 4):
            found = engine.schedule(samples=samples, tokens=9, guided=False, threads=threads)
            most = -(-samples // found["teams"])
            assert found["group_rows"] == most or found["group_rows"] % found["tile_rows"] == 0
            assert 1 <= found["teams"] * found["team_size"] <= threads
    alone = engine.schedule(samples=1, tokens=9, guided=False, threads=4)
    assert alone["teams"] == alone["team_size"] == 1
    assert engine.schedule(samples=301, tokens=9, guided=False, threads=2)["teams"] == 2


@every_set
def test_a_little_more_cache_is_a_little_less_time(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that hardly exceed the L2 cache are not expected to come as slowly as if it held none of them."""
    native, make = load_native(), load_native().Engine
    model = random_model(4, img_size=6, channels=128, layers_per_block=2)

    def expected(size: int) -> float:
        monkeypatch.setattr(native, "Engine", functools.partial(make, caches={**HUGE, "L2": (size, 1)}))
        engine = engine_of(model, 0, instruction_set=isa)._native
        return float(engine.schedule(samples=1, tokens=9, guided=False, threads=1)["products"])

    times = [expected(int(2**18 * 1.02**i)) for i in range(200)]
    assert times[0] > 1.5 * times[-1]
    assert all(0.95 * before <= after <= before for before, after in itertools.pairwise(times))
