"""Images that processes draw into a shared folder are those of one, and a run goes on where it was stopped."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import random_model
from remarks import Remarks

from tarflow_fast import locks
from tarflow_fast.errors import ArgumentError, NonFiniteError
from tarflow_fast.locks import Lock
from tarflow_fast.sampling.sampler import Sampler
from tarflow_fast.sampling.sharded import draw_shards, estimate, run
from tarflow_fast.sampling.sharded.job import JOB, MANIFEST, RECORDS, model_hash
from tarflow_fast.solvers import Costs, auto

N = 23


def sampler(seed: int = 0, **how: Any) -> Sampler:
    return Sampler(random_model(seed, num_classes=3), **{"solver": "sequential", **how})


def draw(out: Path, n: int = N, labels: Any = (0, 1, 2), who: Sampler | None = None, **how: Any) -> dict[str, Any]:
    return draw_shards(who or sampler(), out, n, labels, **{"shard_size": 5, **how})


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    return found


def test_manifest_tells_what_is_there(tmp_path: Path) -> None:
    facts = draw(tmp_path, seed=4, first=2)
    assert (facts["images"], facts["shards"], facts["drawn"]) == (N, 5, N)
    found = manifest(tmp_path)
    assert (found["asked"]["seed"], found["asked"]["first"], found["images"]) == (4, 2, N)
    assert found["asked"]["model"] == model_hash(sampler().flow)
    assert [(shard["first"], shard["images"]) for shard in found["shards"]] == [
        (2, 5),
        (7, 5),
        (12, 5),
        (17, 5),
        (22, 3),
    ]
    for shard in found["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert (len(content), run.hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    names = {JOB, MANIFEST, RECORDS, *(shard["file"] for shard in found["shards"])}
    assert set(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("solver", ["sequential", "adaptive", "auto"])
def test_processes_draw_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, solver: str) -> None:
    draw(tmp_path / "one", who=sampler(solver=solver))
    drawn = []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(run, "LOOK_SECONDS", 0.01)
    samplers = [sampler(solver=solver) for _ in range(world)]
    monkeypatch.setattr(run, "processes_of_environment", lambda: (int(threading.current_thread().name), world))

    def act(who: Sampler) -> None:
        drawn.append(draw(tmp_path / "all", who=who)["drawn"])

    threads = [threading.Thread(target=act, args=(who,), name=str(rank)) for rank, who in enumerate(samplers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == world
    assert sum(drawn) == N
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


def test_a_run_that_is_done_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path)
    before = contents(tmp_path)
    who = sampler()
    monkeypatch.setattr(who, "stream", None)
    assert draw(tmp_path, who=who)["drawn"] == 0
    assert contents(tmp_path) == before


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "one")
    stream, started = Sampler.stream, list[int]()

    def stopping(self: Sampler, *args: Any, **how: Any) -> Any:
        started.append(how["first"])
        if len(started) == 3:
            raise KeyboardInterrupt
        return stream(self, *args, **how)

    monkeypatch.setattr(Sampler, "stream", stopping)
    with pytest.raises(KeyboardInterrupt) as caught:
        draw(tmp_path / "two")
    assert f"two: 10 of {N} images are there; the same run goes on" in caught.value.__notes__[0]
    assert not (tmp_path / "two" / MANIFEST).exists()
    assert draw(tmp_path / "two")["drawn"] == 13
    assert started == [0, 5, 10, 10, 15, 20]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    "other",
    [
        {"n": 24},
        {"first": 1},
        {"seed": 1},
        {"labels": (0, 1)},
        {"labels": None},
        {"shard_size": 6},
        {"format": "tar"},
        {"guidance": 1.0},
        {"denoise": True, "noise_std": 0.1},
        {"who": 1},
        {"batch_size": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_run_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    draw(tmp_path)
    before = contents(tmp_path)
    changed = {**other, "who": sampler(1)} if "who" in other else other
    with pytest.raises(ArgumentError, match=r"with which .* was begun"):
        draw(tmp_path, **changed)
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ArgumentError, match="out: expected a new or empty folder, or that of the same run"):
        draw(tmp_path)
    with pytest.raises(ArgumentError, match="out: expected a folder, got the file"):
        draw(tmp_path / "mine")
    assert os.listdir(tmp_path) == ["mine"]
    for text in ("", "[]", '{"asked": {}}'):
        (tmp_path / "job").mkdir(exist_ok=True)
        (tmp_path / "job" / JOB).write_text(text)
        with pytest.raises(ArgumentError, match="out: expected the folder of a run, or a new one"):
            draw(tmp_path / "job")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"n": 0}, "n: expected an integer >= 1"),
        ({"shard_size": 0}, "shard_size: expected an integer >= 1"),
        ({"n": 2**62}, "shard_size: expected at least 4611686018428, as there are at most 1000000 shards, got 5"),
        ({"format": "zip"}, "format: expected one of 'npz', 'png', 'tar'"),
        ({"trajectory": True}, "rule: expected arguments of Sampler.sample: guidance"),
        ({"guidance": -1}, "guidance: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"labels": [3]}, "labels: expected labels below"),
    ],
)
def test_wrong_arguments_make_no_folder(tmp_path: Path, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        draw(tmp_path / "out", **wrong)
    assert not (tmp_path / "out" / JOB).exists()


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("2", "2"), ("x", "2"), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ArgumentError, match="in the environment"):
            draw(tmp_path / "out")


def test_windows_are_those_that_the_first_process_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quickest elsewhere is another window, with other rounding: a run has one for all."""

    def quick(engine: Any, state: Any, widths: list[int]) -> Costs:
        return Costs(1.0, dict.fromkeys(widths, 1e-3))

    monkeypatch.setattr(auto, "measure", quick)
    draw(tmp_path / "one", who=sampler(solver="auto"))
    settled = json.loads((tmp_path / "one" / JOB).read_text())["settled"]
    assert all(window > 1 for window in settled["windows"])
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / JOB).write_bytes((tmp_path / "one" / JOB).read_bytes())
    (tmp_path / "two" / RECORDS).mkdir()
    monkeypatch.setattr(auto, "measure", None)
    draw(tmp_path / "two", who=sampler(solver="auto"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_shard_of_a_dead_process_is_taken_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "one")
    monkeypatch.setattr(run, "LOOK_SECONDS", 0.01)
    out = tmp_path / "two"
    out.mkdir()
    (out / ".00001.claim").write_text("3")  # of a process that was killed
    living = Lock.take(out / ".00003.claim")
    assert living is not None
    done = threading.Event()

    def act() -> None:
        draw(out)
        done.set()

    thread = threading.Thread(target=act)
    thread.start()
    records = out / RECORDS
    end = time.monotonic() + 60
    while not records.is_dir() or len(os.listdir(records)) < 4:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not done.wait(0.2)
    assert not (out / "00003.npz").exists()
    living.release()
    thread.join()
    assert done.is_set()
    assert contents(out) == contents(tmp_path / "one")


def test_a_shard_that_is_done_just_before_it_is_claimed_is_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path)
    record = (tmp_path / RECORDS / "00002.json").read_bytes()
    (tmp_path / RECORDS / "00002.json").unlink()
    take = Lock.take

    def late(path: Path) -> Lock | None:
        lock = take(path)
        if path.name == ".00002.claim":
            (tmp_path / RECORDS / "00002.json").write_bytes(record)
        return lock

    monkeypatch.setattr(Lock, "take", late)
    assert draw(tmp_path)["drawn"] == 0
    assert not list(tmp_path.glob(".*"))


def test_without_locks_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remarks: Remarks) -> None:
    if os.name == "nt":
        pytest.skip("POSIX")
    flock = locks.fcntl.flock

    def none(descriptor: int, how: int) -> None:
        if how & locks.fcntl.LOCK_NB:
            raise OSError(37, "No locks available")
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", none)
    draw(tmp_path)
    assert remarks.messages == [
        f"{tmp_path}: No locks available for a lock: processes that share it may draw a shard twice"
    ]


def test_a_label_for_each_number(tmp_path: Path) -> None:
    draw(tmp_path / "a", labels=lambda i: i % 3)
    with np.load(tmp_path / "a" / "00001.npz") as file:
        assert file["arr_1"].tolist() == [2, 0, 1, 2, 0]


def test_images_that_are_not_finite_stop_the_run_and_are_drawn_again_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Sampler.stream

    def failing(self: Sampler, *args: Any, **how: Any) -> Any:
        if how["on_nonfinite"] == "raise":
            raise NonFiniteError(0, 1, 2)
        return stream(self, *args, **how)

    monkeypatch.setattr(Sampler, "stream", failing)
    with pytest.raises(NonFiniteError):
        draw(tmp_path)
    assert draw(tmp_path, on_nonfinite="redraw")["drawn"] == N


def test_estimate_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")

    def of(out: Path) -> dict[str, Any]:
        how: dict[str, Any] = {"seed": 0, "first": 0, "format": "npz", "shard_size": 5, "rule": {}}
        return estimate(run.Run(sampler(), out, N, [0, 1, 2], **how))

    facts = of(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (facts["images_left"], facts["processes"], facts["batch_size"]) == (N, 3, 5)
    assert facts["seconds"] == pytest.approx(N / facts["images_per_second"])
    assert facts["images_per_second"] == pytest.approx(15 / facts["batch_seconds"])
    draw(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.npz"))
    assert facts["disk"] == pytest.approx(size, rel=0.2)
    assert of(tmp_path / "out")["images_left"] == 0
