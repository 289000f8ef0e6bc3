"""When a probe is made, what is kept of it, and what is told; two that probe at once; disks that are full."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import CPU
from fake_device import NARROW, fake
from gates import proven
from probe_jobs import LONG, SHAPE
from remarks import Remarks

from tarflow_fast.engine.backend import Request
from tarflow_fast.engine.shape import BlockShape
from tarflow_fast.engine.verdict import Row, Size, Verdict
from tarflow_fast.errors import ArgumentError
from tarflow_fast.probe import Prober, prober, store

NAME = "fake, none"
GOOD = proven(NAME, 0.25)
BAD = Verdict(False, "accuracy, batch 3: 0.1 off", rows=(Row("accuracy, batch 3", 0.1, 0.01, 0.5, "0.1 off"),))
SIZE = Size(3, False)


class Probes:
    """In the place of probes: verdicts that are given, after a wait for `go`. Notes the jobs."""

    def __init__(self) -> None:
        self.verdict, self.jobs, self.go = GOOD, [], threading.Event()  # type: ignore[var-annotated]
        self.at_once = self.most_at_once = 0
        self.go.set()

    def __call__(self, job: Any, limits: object = None, on_row: object = None) -> Verdict:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.jobs.append(job)
        assert self.go.wait(60)
        self.at_once -= 1
        return self.verdict


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, registered: list[Any]) -> Probes:
    registered.append(fake())
    made = Probes()
    monkeypatch.setattr(prober, "probe", made)
    return made


def asking(mode: str = "now", dtype: torch.dtype = torch.float32, shapes: tuple[BlockShape, ...] = (SHAPE,)) -> Prober:
    return Prober(shapes, Request(CPU, dtype), mode)


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process knows is forgotten: only what is kept is left."""
    prober._known.clear()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# When


def test_now_waits_and_later_processes_know(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asking().look(SIZE) == {NAME: GOOD}
    assert asking().look(SIZE) == {NAME: GOOD}
    another_process(monkeypatch)
    for mode in prober.MODES:
        assert asking(mode).look(SIZE) == {NAME: GOOD}
    assert len(probes.jobs) == 1
    assert probes.jobs[0].size == SIZE
    assert probes.jobs[0].shapes == (SHAPE,)


def test_never_probes_nothing(probes: Probes) -> None:
    verdict = asking("never").look(SIZE)[NAME]
    assert verdict is not None
    assert verdict.reason == "not probed on this device; `tarflow-fast check` probes it"
    assert probes.jobs == []


def test_the_background_does_not_wait(probes: Probes, remarks: Remarks) -> None:
    probes.go.clear()
    gate, other = asking("background"), asking("background")
    for _ in range(3):
        assert gate.look(SIZE) == {NAME: None}
        assert other.look(SIZE) == {NAME: None}
    probes.go.set()
    until(lambda: gate.look(SIZE) == {NAME: GOOD})
    assert other.look(SIZE) == {NAME: GOOD}
    assert len(probes.jobs) == 1
    assert remarks.messages[0] == (
        f"backend 'torch' serves while '{NAME}' is probed on cpu; `tarflow-fast check` probes it once for all, and "
        "probe='now' waits"
    )
    proof = "is proven on cpu: 4 times as fast as 'torch' at batch 3, as the test has it"
    assert remarks.messages[2] == f"backend '{NAME}' {proof}"
    assert len(remarks.messages) == 4  # two of each prober


def test_a_failure_is_told_once(probes: Probes, remarks: Remarks) -> None:
    probes.verdict = BAD
    gate = asking()
    for _ in range(2):
        assert gate.look(SIZE) == {NAME: BAD}
    assert remarks.messages == [f"backend '{NAME}' will not be used on cpu: {BAD.reason}"]


def test_kept_verdicts_are_not_told(probes: Probes, remarks: Remarks, monkeypatch: pytest.MonkeyPatch) -> None:
    probes.verdict = BAD
    asking().look(SIZE)
    another_process(monkeypatch)
    told = len(remarks.messages)
    assert asking().look(SIZE) == {NAME: BAD}
    assert len(remarks.messages) == told


def test_a_probe_that_fails_itself_leaves_torch_serving(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*job: object) -> Verdict:
        raise RuntimeError("no threads")

    monkeypatch.setattr(prober, "probe", broken)
    gate = asking("background")
    gate.look(SIZE)
    until(lambda: gate.look(SIZE)[NAME] is not None)
    verdict = gate.look(SIZE)[NAME]
    assert verdict is not None
    assert (verdict.proven, verdict.reason) == (False, "the probe itself failed: no threads")


def test_what_does_not_take_the_model_is_not_probed(probes: Probes, registered: list[Any]) -> None:
    registered.append(NARROW)
    wide = BlockShape(4, 2, 64, 1, 1, 64, 16)
    verdict = asking(shapes=(SHAPE, wide)).look(SIZE)["narrow"]
    assert verdict is not None
    assert (verdict.proven, verdict.reason) == (False, "no heads of 64")
    assert {job.name for job in probes.jobs} == {NAME}


def test_modes() -> None:
    with pytest.raises(ArgumentError, match=r"^probe: expected"):
        asking("later")


# What it depends on


def test_batches_between_two_powers_of_two_share_a_verdict(probes: Probes) -> None:
    gate = asking()
    for batch, count in ((3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (1, 4), (2, 5)):
        gate.look(Size(batch, False))
        assert len(probes.jobs) == count, batch
    gate.look(Size(3, True))
    assert len(probes.jobs) == 6


@pytest.mark.parametrize("changed", ["driver", "sources", "dtype", "shapes", "precision", "format"])
def test_all_that_a_verdict_depends_on(probes: Probes, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    asking().look(SIZE)
    another_process(monkeypatch)
    if changed == "driver":
        monkeypatch.setattr(store, "device_facts", lambda device: {"kind": "cpu", "driver": "another"})
    elif changed == "sources":
        monkeypatch.setattr(store, "sources", lambda module: "another")
    elif changed == "format":
        monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    elif changed == "precision":
        monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high")
    dtype = torch.bfloat16 if changed == "dtype" else torch.float32
    asking(dtype=dtype, shapes=(SHAPE, LONG) if changed == "shapes" else (SHAPE,)).look(SIZE)
    assert len(probes.jobs) == 2


def test_sources_are_those_of_the_package_and_of_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("made_elsewhere")
    made.__file__ = str(tmp_path / "made_elsewhere.py")
    monkeypatch.setitem(sys.modules, "made_elsewhere", made)
    found = []
    for text in ("1", "2"):
        Path(made.__file__).write_text(f"x = {text}")
        store.sources.cache_clear()
        found.append(store.sources("made_elsewhere"))
    assert len({*found, store.sources()}) == 3


def test_kernels_are_among_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or plain(path))  # type: ignore[func-returns-value]
    store.sources.cache_clear()
    store.sources()
    assert {"cached_attention.py", "affine_density.py", "laws.py", "chain.py", "autotune.py"} <= set(read)


# What is kept


def test_a_file_that_is_cut_off_counts_as_none(probes: Probes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking().look(SIZE)
    (path,) = (cache / "verdicts").glob("*.json")
    whole = path.read_text()
    assert json.loads(whole)["key"]["backend"] == NAME
    wrong = json.dumps({**json.loads(whole), "verdict": {"proven": "yes"}})
    for count, text in enumerate((whole[: len(whole) // 2], "", "[]", "null", wrong), 2):
        path.write_text(text)
        another_process(monkeypatch)
        assert asking().look(SIZE) == {NAME: GOOD}
        assert len(probes.jobs) == count
        assert path.read_text() != text


def test_a_full_disk(probes: Probes, monkeypatch: pytest.MonkeyPatch, remarks: Remarks) -> None:
    """The verdict serves this process, and the next one has to find it again."""

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store, "write_json", full)
    for _ in range(2):
        assert asking().look(SIZE) == {NAME: GOOD}
    assert len(probes.jobs) == 1
    assert "a verdict could not be kept and will be found again: [Errno 28]" in remarks.messages[0]
    another_process(monkeypatch)
    asking().look(SIZE)
    assert len(probes.jobs) == 2


def test_no_folder_can_be_made(probes: Probes, cache: Path, remarks: Remarks) -> None:
    cache.write_text("a file where the folder would be")
    assert asking().look(SIZE) == {NAME: GOOD}
    assert len(probes.jobs) == 1


def test_what_says_nothing_of_the_backend_is_not_kept(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    probes.verdict = Verdict(False, "out of memory", lasting=False)
    gate = asking()
    for _ in range(2):
        assert gate.look(SIZE)[NAME] == probes.verdict
    assert len(probes.jobs) == 1
    another_process(monkeypatch)
    probes.verdict = GOOD
    assert asking().look(SIZE) == {NAME: GOOD}


def test_verdicts_are_listed(probes: Probes) -> None:
    asking().look(SIZE)
    probes.verdict = BAD
    asking().look(Size(9, True))
    listed = {tuple(key["bucket"]): verdict for key, verdict in store.kept()}
    assert listed == {(4, False): GOOD, (16, True): BAD}


def test_a_revoked_backend_serves_no_size_of_batch_any_more(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asking()
    gate.look(SIZE)
    gate.revoke(NAME, "it broke the device")
    another_process(monkeypatch)
    for batch in (3, 20):
        verdict = asking().look(Size(batch, False))[NAME]
        assert verdict is not None
        assert (verdict.proven, verdict.reason) == (False, "it broke the device")
    assert len(probes.jobs) == 1
    gate.forget(SIZE)
    assert asking().look(SIZE) == {NAME: GOOD}
    assert len(probes.jobs) == 2


# Two at once


def settling(count: int) -> list[Verdict]:
    """What so many that ask at once find."""
    entry, found = asking().entry(NAME, SIZE), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = asking().job(NAME, SIZE)
        threads = [threading.Thread(target=lambda: found.append(prober.settle(job, entry))) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return found


def test_one_of_two_probes_and_both_know(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of a file is one of each that opens it: threads stand for processes."""
    monkeypatch.setattr(store, "WAIT", 0.01)
    assert settling(3) == [GOOD] * 3
    assert len(probes.jobs) == probes.most_at_once == 1


def test_two_of_which_none_can_keep_anything(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take turns and both end well."""
    monkeypatch.setattr(store, "WAIT", 0.01)

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store, "write_json", full)
    assert settling(2) == [GOOD] * 2
    assert (len(probes.jobs), probes.most_at_once) == (2, 1)
