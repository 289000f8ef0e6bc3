"""The processes of a run end together, and a folder has one trainer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

if sys.platform == "win32":
    pytest.skip("POSIX", allow_module_level=True)

from runs import (
    Child,
    checkpoint,
    flags,
    fork,
    free_port,
    one_thread,
    tiny,
    train_command,
    write_pictures,
)

from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.trainer import folder, lifeline, train
from tarflow_fast.trainer.folder import LOCK, locked
from tarflow_fast.trainer.lifeline import Lifeline
from tarflow_fast.trainer.processes import processes

SOON = 30.0  # seconds; the promise is a minute
LONG = 100_000  # epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def step(out: Path) -> int:
    return int(checkpoint(out)["step"]) if (out / "checkpoint.pt").exists() else -1


def ranks(action: Callable[[], object], world: int = 2) -> list[Child]:
    """Plain processes that find each other by environment variables."""
    port = free_port()
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    return [fork(action, {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]


def assert_one_line(child: Child, *words: str) -> None:
    """It failed, and its only line of an error has these words."""
    assert child.code == 1, child.text
    assert child.text.count("Error:") == 1, child.text
    assert "Traceback" not in child.text
    last = child.text.strip().splitlines()[-1]
    assert all(word in last for word in ("Error: ", *words)), child.text


# --- the lock --------------------------------------------------------------------------------------------------------


def test_second_trainer_is_refused(data: str, tmp_path: Path) -> None:
    """Resuming or not, while the first goes on; when that is killed, the lock is no more."""
    config = tiny(data, tmp_path / "run", epochs=LONG, checkpoint_every=1)
    first = fork(train_command(*flags(config), "--quiet"))
    try:
        wait_for(lambda: step(tmp_path / "run") > 0)
        for more in ([], ["--resume"]):
            second = fork(train_command(*flags(config), *more))
            second.wait(SOON)
            assert_one_line(second, "--out: ", "no other trainer", f"process {first.pid} on {socket.gethostname()}")
        before = step(tmp_path / "run")
        wait_for(lambda: step(tmp_path / "run") > before)
    finally:
        first.kill()
    assert (tmp_path / "run" / LOCK).exists()
    epochs = step(tmp_path / "run") // 4 + 1
    train(tiny(data, tmp_path / "run", epochs=epochs), resume=True, progress=False)
    assert not (tmp_path / "run" / LOCK).exists()
    assert step(tmp_path / "run") == 4 * epochs


def test_lock_is_of_the_process_that_took_it(tmp_path: Path) -> None:
    """A child that outlives its parent does not keep it."""
    read, write = os.pipe()

    def take() -> None:
        with locked(str(tmp_path / "run")):
            if os.fork() == 0:
                os.close(1), os.close(2), os.close(write)
                os.read(read, 1)  # until the test is over
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(take).wait() == -signal.SIGKILL
    with locked(str(tmp_path / "run")) as killed:
        assert killed
    os.close(read)
    os.close(write)


def test_lock_leaves_nothing(tmp_path: Path) -> None:
    with locked(str(tmp_path / "a" / "b")) as killed:
        assert not killed
        with pytest.raises(ArgumentError, match=f"where process {os.getpid()} on"), locked(str(tmp_path / "a" / "b")):
            pass
    assert os.listdir(tmp_path / "a" / "b") == []
    with pytest.raises(KeyError), locked(str(tmp_path / "c" / "d")):
        raise KeyError
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "a" / "b" / "mine").touch()
    with pytest.raises(KeyError), locked(str(tmp_path / "a" / "b")):
        raise KeyError
    assert os.listdir(tmp_path / "a" / "b") == ["mine"]


def test_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), locked(str(tmp_path / "run")):
        pass
    assert victim.read_text() == "mine"


def test_lock_file_of_a_stranger_is_not_repeated(tmp_path: Path) -> None:
    with locked(str(tmp_path)):
        (tmp_path / LOCK).write_bytes(b"\x1b]0;process 1 on \x07")
        with pytest.raises(ArgumentError, match="where another process trains"), locked(str(tmp_path)):
            pass


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with locked(str(tmp_path / "run")):
        pass
    assert "run: No locks available for a lock: see to it that no other trainer" in capsys.readouterr().err


def test_many_take_a_lock_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            try:
                with locked(str(tmp_path / "run")):
                    with counting:
                        inside += 1
                        most = max(most, inside)
                    with counting:
                        inside -= 1
            except ArgumentError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_leave_no_threads(data: str, tmp_path: Path) -> None:
    """gloo's, in the midst of which the interpreter's end could abort the process; and the run is that of one."""
    config = tiny(data, tmp_path / "two", nvp=False)

    def act() -> None:
        train(config, progress=False)
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        print(" ".join(name for name in names if "gloo" in name or "store" in name or "lifeline" in name))

    children = ranks(act)
    assert [child.wait() for child in children] == [0, 0], [child.text for child in children]
    assert [child.text.strip() for child in children] == ["", ""]
    assert step(tmp_path / "two") == 12


def test_run_that_was_killed_before_its_first_checkpoint(data: str, tmp_path: Path) -> None:
    """All processes start again, of which one alone has seen the lock file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    children = ranks(train_command(*flags(tiny(data, tmp_path / "run", epochs=1)), "--resume", "--quiet"))
    assert [child.wait() for child in children] == [0, 0], [child.text for child in children]
    assert step(tmp_path / "run") == 4


@pytest.mark.parametrize("dead", [0, 1])
def test_dead_process_ends_the_others(data: str, tmp_path: Path, dead: int) -> None:
    config = tiny(data, tmp_path / "run", epochs=LONG, checkpoint_every=1)
    children = ranks(train_command(*flags(config), "--quiet"))
    try:
        wait_for(lambda: step(tmp_path / "run") > 1)
        children[dead].kill()
        children[1 - dead].wait(SOON)
    finally:
        for child in children:
            child.kill()
    assert_one_line(children[1 - dead], f"rank {dead} of this run is gone")


def test_dead_process_among_three(data: str, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "run", epochs=LONG, checkpoint_every=1, batch_size=15)
    children = ranks(train_command(*flags(config), "--quiet"), world=3)
    try:
        wait_for(lambda: step(tmp_path / "run") > 1)
        children[1].kill()
        for child in (children[0], children[2]):
            child.wait(SOON)
    finally:
        for child in children:
            child.kill()
    assert_one_line(children[0], "rank 1 of this run is gone")
    assert_one_line(children[2], "rank 1 of this run is gone")


def test_others_learn_why_a_process_ended(data: str, tmp_path: Path) -> None:
    """Rank 0 cannot have the folder; rank 1 says so too, rather than that a connection was closed."""
    config = tiny(data, tmp_path / "run")
    with locked(config.out):
        children = ranks(train_command(*flags(config), "--quiet"))
        for child in children:
            child.wait(SOON)
    assert_one_line(children[0], "--out: ", "no other trainer")
    assert_one_line(children[1], "rank 0 ended: ", "no other trainer")


def test_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 waits for ever, and not in a collective that would tell it of the death."""
    monkeypatch.setattr(lifeline, "GRACE_SECONDS", 0.2)
    started = tmp_path / "started"

    def act() -> None:
        with processes("cpu") as group:
            if group.first:
                wait_for(started.exists)
                os.kill(os.getpid(), signal.SIGKILL)
            started.touch()
            time.sleep(1000)

    children = ranks(act)
    assert [child.wait(SOON) for child in children] == [-signal.SIGKILL, 1]
    assert children[1].text == "Error: rank 0 of this run is gone\n"


@contextlib.contextmanager
def lifelines(world: int) -> Iterator[list[Lifeline]]:
    """Yields lifelines that are closed whatever happens: one left open would end this process after its grace."""
    store = dist.HashStore()
    with contextlib.ExitStack() as stack:
        lines = []
        for rank in range(world):
            lines.append(Lifeline(store, rank, world, "127.0.0.1"))
            stack.callback(lambda line=lines[-1]: None if line._closed.is_set() else line.close())
        yield lines


def test_lifelines_close_in_any_order() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        with lifelines(3) as lines:
            for rank in order:
                assert lines[rank].reason == ""
                lines[rank].close()


def test_failure_reaches_everybody() -> None:
    for failing in range(3):
        with lifelines(3) as lines:
            lines[failing].fail("a reason\nof two lines")
            for line in lines:
                assert line.wait(SOON) == f"rank {failing} ended: a reason of two lines"


@pytest.mark.parametrize("closes", [False, True])
def test_failure_reaches_those_that_were_not_accepted_yet(monkeypatch: pytest.MonkeyPatch, closes: bool) -> None:
    """Rank 0 fails while the connections of the others wait; it may even close before its thread has seen them."""
    accept, watch = threading.Event(), Lifeline._watch

    def watch_later(line: Lifeline) -> None:
        if line.rank == 0:
            accept.wait()
        watch(line)

    monkeypatch.setattr(Lifeline, "_watch", watch_later)
    with lifelines(3) as lines:
        lines[0].fail("a reason")
        if closes:
            lines[0]._closed.set()
        accept.set()
        if closes:
            lines[0].close()
        for line in lines:
            assert line.wait(SOON) == "rank 0 ended: a reason"


def test_strangers_on_the_line_change_nothing() -> None:
    with lifelines(2) as lines:
        assert lines[0]._server is not None
        for words in (b"lost all\n", b"hello 0 1\nlost all\nbye\nbye\n", b"x" * 10_000, b""):
            with socket.create_connection(("127.0.0.1", lines[0]._server.getsockname()[1])) as stranger:
                stranger.sendall(words)
        assert lines[0].wait(0.1) == lines[1].wait(0.1) == ""


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1")])
def test_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"{name}: expected an integer"), processes("cpu"):
        pass


def test_environment_that_lacks_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendError, match=r"2 processes did not come together: .*RANK"), processes("cpu"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_dead_process_under_torchrun(data: str, tmp_path: Path, dead: int) -> None:
    """torchrun itself reports which, and may end the others before they do; no process stays."""
    config = tiny(data, tmp_path / "run", epochs=LONG, checkpoint_every=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    with subprocess.Popen(
        [*torchrun, "-m", "tarflow_fast", "train", *flags(config), "--quiet", "--threads", "1"],
        env=one_thread(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: step(tmp_path / "run") > 1, 120)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        workers = [int(pid) for pid in listed.stdout.split()]
        os.kill(workers[dead], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Signal 9 (SIGKILL) received by PID {workers[dead]}" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
