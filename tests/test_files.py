"""Files are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tarflow_fast.errors import ArgumentError
from tarflow_fast.files import check_path, remove_unfinished, replacing

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_takes_the_place_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    with replacing(path, durable=True) as partial:
        assert partial.suffix == ".png"
        assert partial.parent == tmp_path
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_failure_leaves_the_old_file_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.png"]


@POSIX
def test_mode_is_kept_or_that_of_a_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        for name, before, wanted in (("new", None, 0o640), ("old", 0o604, 0o604)):
            path = tmp_path / name
            if before is not None:
                path.touch()
                path.chmod(before)
            with replacing(path) as partial:
                partial.unlink()
                partial.touch(mode=0o600)  # as a library may
            assert stat.S_IMODE(path.stat().st_mode) == wanted
    finally:
        os.umask(umask)


@POSIX
def test_links_are_replaced_and_devices_written_to(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    link.symlink_to(victim)
    with replacing(link) as partial:
        partial.write_text("new")
    assert victim.read_text() == "mine"
    assert link.read_text() == "new"
    assert not link.is_symlink()
    with replacing("/dev/null") as direct:
        assert direct == Path("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(OSError, match="No space left") as raised, replacing(full) as direct:
            direct.write_text("x")
        assert raised.value.filename == "/dev/full"


@POSIX
def test_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    writer = """if True:
        import sys
        from tarflow_fast.files import replacing
        with replacing(sys.argv[1]) as partial:
            partial.write_text("half")
            print(flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", writer, str(tmp_path / "theirs.png")]
    foreign = [".tarflow-notes", ".tarflow-0123456789abcdef-mine", "tarflow-0123456789abcdef.png"]
    for name in foreign:
        (tmp_path / name).touch()
    (tmp_path / ".tarflow-0123456789abcdef").symlink_to(tmp_path / ".tarflow-notes")
    (tmp_path / ".tarflow-0123456789abcdee").mkdir()
    foreign += [".tarflow-0123456789abcdef", ".tarflow-0123456789abcdee"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        with replacing(tmp_path / "ours.png"):
            pass
        (half,) = set(names(tmp_path)) - {*foreign, "ours.png"}  # its writer lives
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / half).read_text() == "half"
    assert not (tmp_path / "theirs.png").exists()
    with replacing(tmp_path / "theirs.png"):
        pass
    assert names(tmp_path) == sorted([*foreign, "ours.png", "theirs.png"])


@POSIX
@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, writer: str) -> None:
    import resource

    path = tmp_path / "a.bin"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as partial:
            if writer == "python":
                partial.write_bytes(bytes(2000))
            else:
                safetensors.torch.save_file({"a": torch.zeros(1000)}, partial)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="large") as raised:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    with replacing(check_path("out", path)) as partial:
        partial.write_text("x")
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("a.gif", "ending in .png"),
        ("folder.png", "a file, got the folder"),
        ("missing/a.png", "existing folder"),
        ("a\0.png", "a file name"),
        ("a" * 300 + ".png", "a file name"),
        ("file.png/a.png", "a file name"),
        (b"a.png", "a path"),
        (3, "a path"),
    ],
)
def test_what_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: object, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    with pytest.raises(ArgumentError, match=f"^out: expected .*{what}"):
        check_path("out", path, (".png",))  # type: ignore[arg-type]


@POSIX
def test_a_file_that_is_whole_is_not_taken_for_a_dead_process_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process looks round between the last byte of a file and its name."""
    replace = os.replace

    def looked_at(source: Path, target: Path) -> None:
        remove_unfinished(tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", looked_at)
    with replacing(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert os.listdir(tmp_path) == ["a"]
