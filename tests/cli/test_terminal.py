"""What reaches the terminal, and how commands end, in real processes where that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from cases import random_model
from click.testing import CliRunner

import tarflow_fast as tff
from tarflow_fast.cli import main
from tarflow_fast.cli.terminal import Interrupted, Terminated, echo, one_line, stoppable
from tarflow_fast.sampling.sampler import Sampler

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
EVIL = "\x1b]0;title\x07\x1b[2J\x9b1mverified\nlicense: MIT\r\u202e\u2028"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint whose every text is hostile."""
    monkeypatch.chdir(tmp_path)
    model = random_model(img_size=4, num_classes=2)
    model.metadata = {"card": EVIL, EVIL: EVIL, "class_names": [EVIL, "b"], "list": [EVIL]}
    tff.save(model, "evil.safetensors")
    torch.save({**model.state_dict(), EVIL: torch.zeros(1)}, "evil.pth")
    Path("names.txt").write_text("\x1b[31m\n")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        ["info", "-m", "evil.safetensors"],
        ["info", "-m", "evil.safetensors", "--json"],
        ["info", "-m", "evil.pth"],
        ["convert", "evil.safetensors", "x.pth"],
        ["convert", "evil.safetensors", "x.safetensors", "--class-names", "\x1b[31m"],
        ["sample", "-m", "evil.safetensors", "-n", "4"],
        ["sample", "-m", "evil.safetensors", "-n", "1", "--json"],
        ["sample", "-m", "evil.safetensors", "--labels", "\x1b[31m"],
        ["sample", "-m", "evil.safetensors", "--labels", "@names.txt"],
        ["sample", "-m", "\x1b[31m\udcff.pth"],
        ["eval", "-m", "evil.safetensors", "--data", "\x1b[31m"],
        ["\x1b[31m"],
    ],
    ids=str,
)
def test_no_text_of_a_file_steers_the_terminal(evil: Path, line: list[str]) -> None:
    result = CliRunner().invoke(main, line)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert all(c.isprintable() or c == "\n" for c in result.output), repr(result.output)
    assert not any(text.startswith("license") for text in result.output.splitlines())
    if "--json" in line:
        facts = json.loads(result.stdout)
        if line[0] == "info":
            assert facts["model"]["metadata"]["card"] == EVIL


def test_names_of_other_scripts_are_shown() -> None:
    assert one_line(" Käfer  甲虫\n— é ") == "Käfer 甲虫 — é"
    assert one_line("\x1b \udcff \u202e \x9b") == r"\x1b \udcff \u202e \x9b"


def test_an_encoding_that_lacks_a_character(evil: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tarflow_fast.cli.terminal import echo; echo('8×8 甲')"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == r"8\xd78 \u7532"


@pytest.mark.slow
def test_a_text_that_cannot_be_printed_is_one_line(evil: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for line, message in ((["info", "-m", "evil.pth"], None), (["--help"], "space"), (["info"], "standard output")):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "tarflow_fast", *line]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert message is None or message in done.stderr


@POSIX
@pytest.mark.slow
def test_a_reader_that_went_away_is_nothing_to_speak_of(evil: Path) -> None:
    for line in (["info", "--json"], ["--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "tarflow_fast", *line]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")


def test_out_of_memory_is_one_line(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(Sampler, "stream", fail)
    result = CliRunner().invoke(main, ["sample", "-m", "evil.safetensors"])
    assert (result.exit_code, result.stderr) == (1, "Error: out of memory (Unable to allocate 1 TiB)\n")


def test_terminated(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Sampler, "stream", end)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(main, ["sample", "-m", "evil.safetensors"])
    assert (result.exit_code, result.stderr) == (143, "Terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_that_others_handle_stay_theirs() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with stoppable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def test_a_second_sigterm_does_not_cut_the_first_one_short() -> None:
    def terminate() -> None:
        with stoppable():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        terminate()


def test_an_interrupt_within_exec_ends_with_its_exit_code(evil: Path) -> None:
    """Python would kill itself by SIGINT, if KeyboardInterrupt itself passed through."""
    program = """if True:
        import signal, sys
        from tarflow_fast.cli import main
        from tarflow_fast import devices
        devices.pick_device = lambda name: exec("signal.raise_signal(signal.SIGINT)", {"signal": signal})
        main(["sample"])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted\n")


@pytest.mark.parametrize(
    ("swallowed", "code", "told"),
    [
        ("pass", 130, "Interrupted\n"),
        ("raise OSError(28, 'No space left', 'a.png')", 1, "Error: a.png: No space left\n"),
    ],
    ids=["lost", "told of"],
)
def test_a_stop_that_somebody_took_for_a_failure_of_their_own(swallowed: str, code: int, told: str) -> None:
    """torch does so where it looks whether an object is a sequence, and says then that a file's tensors have no shape.
    What fails while a stop is on its way is another matter."""
    program = f"""if True:
        import signal
        from tarflow_fast.cli import main
        from tarflow_fast import devices
        def pick_device(name):
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                {swallowed}
            raise ValueError("could not determine the shape")
        devices.pick_device = pick_device
        main(["sample"])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told)


def test_a_bar_that_was_never_whole_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    from tarflow_fast.progress import Bar

    bar = Bar.__new__(Bar)
    bar.disable = False  # what tqdm sets first
    del bar
    assert capfd.readouterr().err == ""


def test_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    echo("a\nb", "c")
    assert capsys.readouterr().out == "a\\nb\nc\n"


@pytest.mark.parametrize("stop", [Interrupted, Terminated])
def test_a_signal_before_the_command_begins(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """click would call it "Aborted!", with exit code 1."""

    def arrive(*given: object, **more: object) -> None:
        raise stop

    monkeypatch.setattr(click.Group, "make_context", arrive)
    with pytest.raises(SystemExit) as ended:
        main(["info"])
    assert ended.value.code == (130 if stop is Interrupted else 143)
    assert capsys.readouterr().err == f"{stop.__name__}\n"
