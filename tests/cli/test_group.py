"""The command line as a whole: its commands, help, exit codes, and the process that it is."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_lines import Run, python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tarflow_fast as tff
from tarflow_fast.cli import main
from tarflow_fast.sampling.sampler import Sampler


@pytest.fixture
def run(command_line: Run) -> Run:
    return command_line


class TestGroup:
    @pytest.mark.parametrize(
        "command", [(), ("sample",), ("train",), ("eval",), ("convert",), ("info",), ("fid",), ("prepare-stats",)]
    )
    def test_help(self, run: Run, command: tuple[str, ...]) -> None:
        for flag in ("--help", "-h"):
            text = run(*command, flag).stdout
            assert text.startswith("Usage: tarflow-fast")
        if not command:
            listed = [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.strip()]
            assert listed[:5] == ["sample", "train", "eval", "convert", "info"]

    def test_help_has_sections_and_examples(self, run: Run) -> None:
        text = run("sample", "--help").stdout
        positions = [text.index(f"\n{title}:\n") for title in ("Model", "What to draw", "Machine", "Output")]
        assert positions == sorted(positions)
        assert text.index("Examples:") > positions[-1]
        assert text.index("  --seed") > positions[1]

    def test_version(self, run: Run) -> None:
        assert run("--version").stdout == f"tarflow-fast {version('tarflow_fast')}\n"

    def test_entry_point(self) -> None:
        (script,) = entry_points(group="console_scripts", name="tarflow-fast")
        assert script.load() is main

    @pytest.mark.parametrize(
        "arguments", [("draw",), ("--nonsense",), ("sample", "--nonsense"), ("convert", "m.safetensors")]
    )
    def test_wrong_usage(self, run: Run, arguments: tuple[str, ...]) -> None:
        assert "Usage: tarflow-fast" in run(*arguments, code=2).stderr

    def test_traceback_on_request(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "no such file" in run("info", "-m", "none.pth", code=1).stderr
        result = CliRunner().invoke(main, ["--traceback", "info", "-m", "none.pth"])
        assert isinstance(result.exception, tff.CheckpointError)
        monkeypatch.setenv("TARFLOW_FAST_TRACEBACK", "1")
        assert isinstance(CliRunner().invoke(main, ["info", "-m", "none.pth"]).exception, tff.CheckpointError)

    def test_system_errors_are_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device", "samples.png")

        monkeypatch.setattr("tarflow_fast.images.save_grid", fail)
        message = run("sample", "-m", "m.safetensors", "-n", 1, code=1).stderr
        assert message == "Error: samples.png: No space left on device\n"

    def test_messages_of_many_lines_become_one(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise tff.BackendError("first\n  second")

        monkeypatch.setattr(Sampler, "stream", fail)
        assert run("sample", "-m", "m.safetensors", code=1).stderr == "Error: first second\n"

    def test_a_bug_keeps_its_traceback(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise KeyError("bug")

        monkeypatch.setattr(Sampler, "stream", fail)
        result = CliRunner().invoke(main, ["sample", "-m", "m.safetensors"])
        assert isinstance(result.exception, KeyError)

    def test_interrupted(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Sampler, "stream", interrupt)
        assert run("sample", "-m", "m.safetensors", code=130).stderr == "Interrupted\n"


COMMANDS = [
    ("sample", "-m", "m.safetensors"),
    ("train", "--data", ".", "--out", "run"),
    ("eval", "-m", "m.safetensors", "--data", "."),
    ("convert", "plain.pth", "plain.safetensors"),
    ("info",),
]
TORCH_PROBE = """
import os, sys

class Probe:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch with OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Probe)
from tarflow_fast.cli import main
main(sys.argv[1:])
"""
"""A command line that ends where it would import torch."""


class TestProcess:
    """Real processes."""

    def test_help_does_not_wait_for_torch(self) -> None:
        for command in ([], ["sample"], ["train"], ["eval"], ["convert"], ["info"]):
            done = python("-X", "importtime", "-m", "tarflow_fast", *command, "--help")
            assert done.returncode == 0
            imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
            assert "tarflow_fast.cli.sample" in imported
            assert not imported & {"torch", "numpy", "PIL", "PIL.Image"}

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda arguments: arguments[0])
    def test_openmp_waits_passively_from_before_torch_is_imported(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
    ) -> None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        done = python("-c", TORCH_PROBE, *command)
        assert done.stdout == "torch with OMP_WAIT_POLICY PASSIVE\n", done.stderr

    def test_openmp_waits_as_the_user_has_said(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
        assert python("-c", TORCH_PROBE, *COMMANDS[0]).stdout == "torch with OMP_WAIT_POLICY active\n"

    @pytest.mark.skipif(sys.platform != "linux", reason="torch comes with libgomp on Linux")
    @pytest.mark.slow
    def test_the_library_of_openmp_has_read_it(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
        done = python("-m", "tarflow_fast", "info", "-m", "m.safetensors")
        assert done.returncode == 0
        assert "GOMP_SPINCOUNT = '0'" in done.stderr  # 300000 without a policy

    def test_importing_the_library_leaves_the_environment_alone(self) -> None:
        program = "import os; before = dict(os.environ); import tarflow_fast, tarflow_fast.cli; "
        assert python("-c", program + "assert dict(os.environ) == before").returncode == 0

    def test_failure(self, run: Run) -> None:
        done = python("-m", "tarflow_fast", "sample", "-m", "none.pth")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "Error: none.pth: no such file\n"

    def test_success(self, run: Run) -> None:
        done = python("-m", "tarflow_fast", "sample", "-m", "m.safetensors", "-n", "2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("samples.png: 2 images")
        assert Path("samples.png").is_file()

    def test_control_c(self, run: Run) -> None:
        command = ["-m", "tarflow_fast", "sample", "-m", "m.safetensors", "-n", "100000", "--progress"]
        with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            shown = ""
            while shown.count("sampling") < 2:  # the first is drawn before the bar is made
                shown += process.stderr.read(1)
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.returncode == 130
        assert rest.endswith("Interrupted\n")
        assert "Traceback" not in rest
        assert not Path("samples.png").exists()


WORDS = st.sampled_from(["0", "1", "-1", "2.5", "1e9", "nan", "inf", "a", "", "cpu", "auto", "m.safetensors", "x.png"])
FLAGS = st.sampled_from(
    [p.opts[-1] for p in main.commands["sample"].params if p.opts[-1] not in ("--compile", "--singles", "--help", "-n")]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(options=st.lists(st.tuples(FLAGS, WORDS), max_size=3))
def test_any_options_end_in_an_exit_code(run: Run, options: list[tuple[str, str]]) -> None:
    arguments = ["sample", "-m", "m.safetensors", "-n", "1", *(f"{flag}={word}" for flag, word in options)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (0, 1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if result.exit_code:
        assert "Error: " in result.stderr
