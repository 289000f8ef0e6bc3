"""Items are read in order, by several threads, and few of them ahead of whoever takes them."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from tarflow_fast import read_ahead as module
from tarflow_fast.read_ahead import own_cores, read_ahead

CORES = 3


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: CORES)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 47, 48, 49, 200])
def test_all_items_come_in_order(n: int) -> None:
    for size in (1, module.IN_A_TASK, 7):
        assert list(read_ahead(lambda part: (i**2 for i in part), range(3, n + 3), size)) == [
            i**2 for i in range(3, n + 3)
        ]


def test_no_more_than_a_few_are_held() -> None:
    lock, read, taken, most = threading.Lock(), itertools.count(1), 0, 0

    def one(i: int) -> int:
        nonlocal most
        with lock:
            most = max(most, next(read) - taken)
        return i

    for _ in read_ahead(lambda part: map(one, part), range(1000)):
        taken += 1
        if taken % 50 == 0:
            time.sleep(0.01)  # the readers could run far ahead
    assert taken == 1000
    assert most <= 16 * CORES + 4


def test_as_many_threads_read_at_once_as_there_are_cores() -> None:
    barrier = threading.Barrier(CORES)  # which opens for so many, or else breaks

    def one(i: int) -> int:
        if i % module.IN_A_TASK == 0:
            barrier.wait(timeout=20)
        return threading.get_ident()

    assert len(set(read_ahead(lambda part: map(one, part), range(CORES * module.IN_A_TASK)))) == CORES


def test_an_error_comes_in_its_turn_and_ends_the_reading() -> None:
    started: list[int] = []

    def one(i: int) -> int:
        started.append(i)
        if i in (9, 30):
            raise ValueError(i)
        return i

    found: list[int] = []
    with pytest.raises(ValueError, match=r"^9$"):
        found.extend(read_ahead(lambda part: map(one, part), range(10**5)))
    assert found == list(range(8))  # those of the task of number 9 go with it
    assert len(started) < 200


def test_whoever_leaves_does_not_wait_for_whole_tasks() -> None:
    read = itertools.count()

    def one(i: int) -> int:
        next(read)
        time.sleep(0.0 if i < 1000 else 0.02)
        return i

    items = read_ahead(lambda part: map(one, part), range(10**5), 1000)
    assert next(items) == 0
    items.close()
    assert next(read) < 2000  # and not all 4000 of the tasks that had begun


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_cores() == CORES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own_cores() == 1
