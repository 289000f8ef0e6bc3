"""The command line: every option, what is written, how it fails."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tarflow_fast as tff
from tarflow_fast.cli import main
from tarflow_fast.cli.layout import MOST_ROWS, PER_CLASS, default_count, layout
from tarflow_fast.evaluation import Noise, bayes_accuracy, bits_per_dim
from tarflow_fast.images import grid, to_uint8
from tarflow_fast.limits import MOST_NUMBER
from tarflow_fast.sampling.sampler import Sampler

Run = Callable[..., Result]

NAMES = ["cat", "Dog", "t-shirt/top"]
NOISE = 0.1


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in an empty folder that has a model of three classes and one of none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TARFLOW_FAST_TRACEBACK", raising=False)
    model = random_model(num_classes=3)
    model.metadata = {"noise_type": "gaussian", "noise_std": NOISE, "class_names": NAMES}
    tff.save(model, "m.safetensors")
    tff.save(random_model(in_channels=3), "plain.pth")

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="tarflow-fast")
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if code == 1:
            assert result.stdout == ""
            assert result.stderr.startswith("Error: ")
            assert result.stderr.count("\n") == 1
        return result

    return run


def picture(path: str | Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


class TestGroup:
    @pytest.mark.parametrize("command", [(), ("sample",), ("train",), ("eval",), ("convert",), ("info",)])
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


class TestSample:
    def test_grid_of_all_classes(self, run: Run) -> None:
        result = run("sample", "-m", "m.safetensors")
        side = PER_CLASS * (8 * 12 + 2) + 2
        assert picture("samples.png").shape == (3 * (8 * 12 + 2) + 2, side)
        assert "samples.png: 24 images of 8×8, unguided, denoised" in result.stdout
        assert "rows: cat, Dog, t-shirt/top" in result.stdout
        assert "images/s" in result.stdout
        assert f"backend {tff.Sampler(tff.load_pretrained()).backend} (" in result.stdout
        assert "log p before denoising: mean" in result.stdout
        assert result.stderr == ""

    def test_it_is_what_the_library_draws(self, run: Run) -> None:
        run(
            "sample",
            "-m",
            "m.safetensors",
            "-n",
            6,
            "--seed",
            5,
            "--no-denoise",
            "--npz",
            "s.npz",
            "--scale",
            2,
        )
        out = Sampler(tff.load("m.safetensors")).sample(6, [0, 1, 2], seed=5)
        with np.load("s.npz") as file:
            assert sorted(file.files) == ["class_names", "first", "images", "labels", "log_prob", "options", "seed"]
            np.testing.assert_allclose(file["images"], out.images, atol=1e-5)
            np.testing.assert_allclose(file["log_prob"], out.log_prob, atol=1e-3)
            assert file["images"].dtype == np.float32
            assert file["labels"].tolist() == [0, 1, 2, 0, 1, 2]
            assert file["class_names"].tolist() == NAMES
            assert json.loads(str(file["options"]))["model"] == "m.safetensors"
            assert (file["seed"], file["first"]) == (5, 0)
            drawn = torch.from_numpy(file["images"])
        by_class = drawn[[0, 3, 1, 4, 2, 5]]
        np.testing.assert_array_equal(picture("samples.png"), grid(by_class, 2, scale=2)[..., 0])

    @pytest.mark.parametrize(
        ("options", "arguments"),
        [
            (("--guidance", 1.5, "--guide-what", "b"), {"guidance": 1.5, "guide_what": "b"}),
            (
                ("--guidance", 2, "--attn-temp", 0.5, "--annealed-guidance"),
                {"guidance": 2.0, "attn_temp": 0.5, "annealed_guidance": True},
            ),
            (("--guidance", 2, "--constant-guidance"), {"guidance": 2.0, "annealed_guidance": False}),
            (
                ("--noise-std", 0.3, "--denoise-scale", 0.5),
                {"noise_std": 0.3, "denoise_scale": 0.5, "denoise": True},
            ),
            (("--denoise",), {"denoise": True}),
            (("--no-denoise",), {"denoise": False}),
            (("--first", 4, "--on-nonfinite", "redraw"), {"first": 4, "on_nonfinite": "redraw"}),
            (("--batch-size", 1), {"batch_size": 1}),
        ],
    )
    def test_options_reach_the_sampler(self, run: Run, options: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        run("sample", "-m", "m.safetensors", "-n", 3, "--npz", "s.npz", *options)
        arguments = {"denoise": True, **arguments}
        out = Sampler(tff.load("m.safetensors")).sample(3, [0, 1, 2], **arguments)
        with np.load("s.npz") as file:
            np.testing.assert_allclose(file["images"], out.images, atol=1e-5)
            assert ("log_prob" in file.files) == (arguments.get("guidance", 0) == 0)

    @pytest.mark.parametrize(
        ("options", "made"),
        [
            (("--dtype", "bfloat16"), {"dtype": torch.bfloat16}),
            (
                ("--device", "cpu", "--backend", "torch", "--solver", "sequential"),
                {"backend": "torch", "solver": "sequential"},
            ),
            (("--compile",), {"compile": True}),
            (("--backend", "cpu", "--threads", 2), {"backend": "cpu", "threads": 2}),
        ],
    )
    def test_options_that_make_the_sampler(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], made: dict[str, Any]
    ) -> None:
        seen: dict[str, Any] = {}

        class Spy(Sampler):
            def __init__(self, model: tff.TarFlow, **given: Any):
                seen.update(given)
                super().__init__(model, **{**given, "compile": False})

        monkeypatch.setattr("tarflow_fast.sampling.sampler.Sampler", Spy)
        run("sample", "-m", "m.safetensors", "-n", 1, *options)
        default = {"backend": "auto", "solver": "auto", "dtype": None, "compile": False, "threads": None}
        assert {name: seen[name] for name in default} == {**default, **made}
        assert seen["device"] == torch.device("cpu")

    def test_unconditional_ml_tarflow_checkpoint(self, run: Run) -> None:
        result = run("sample", "-m", "plain.pth", "-n", 5, "--npz", "s.npz", "--scale", 1)
        assert picture("samples.png").shape == (2 * 10 + 2, 3 * 10 + 2, 3)
        assert "5 images of 8×8, unguided\n" in result.stdout
        assert "rows" not in result.stdout
        with np.load("s.npz") as file:
            assert "labels" not in file.files
            assert file["images"].shape == (5, 3, 8, 8)

    def test_sizes_that_weights_leave_open(self, run: Run) -> None:
        with pytest.warns(tff.TarFlowWarning, match="load it with patch_size=1"):
            tff.save(random_model(in_channels=4, patch_size=1), "open.pth")  # 4 values a token: 1 channel of 2×2?
        assert "4×8×8" in run("info", "-m", "open.pth", "--patch-size", 1).stdout
        assert "4×8×8" in run("info", "-m", "open.pth", "--in-channels", 4).stdout
        with pytest.warns(tff.TarFlowWarning, match="load it with head_dim=32"):
            tff.save(random_model(head_dim=32), "heads.pth")
        assert "heads of 32" in run("info", "-m", "heads.pth", "--head-dim", 32).stdout
        assert "--patch-size: " in run("sample", "-m", "open.pth", "--patch-size", 3, code=2).stderr

    def test_singles(self, run: Run) -> None:
        run("sample", "-m", "m.safetensors", "-n", 3, "--first", 7, "--singles", "a/b", "--npz", "s.npz")
        assert sorted(p.name for p in Path("a/b").iterdir()) == ["00007.png", "00008.png", "00009.png"]
        with np.load("s.npz") as file:
            wanted = to_uint8(torch.from_numpy(file["images"]))
            assert file["first"] == 7
        for i in range(3):
            np.testing.assert_array_equal(picture(f"a/b/{7 + i:05d}.png"), wanted[i, 0])

    @pytest.mark.parametrize("denoise", [True, False])
    def test_gif(self, run: Run, denoise: bool) -> None:
        flag = "--denoise" if denoise else "--no-denoise"
        run("sample", "-m", "m.safetensors", "-n", 3, "--gif", "s.gif", "--scale", 2, "--columns", 3, flag)
        with Image.open("s.gif") as movie:
            assert movie.n_frames == 2 + 1 + denoise
            assert movie.size == (3 * 18 + 2, 18 + 2)
            movie.seek(movie.n_frames - 1)
            last = np.asarray(movie.convert("L")).astype(int)
        assert np.abs(last - picture("samples.png")).max() <= 2

    def test_out_and_columns(self, run: Run) -> None:
        Path("there.jpg").write_text("something else")
        run("sample", "-m", "m.safetensors", "-n", 4, "-o", "there.jpg", "--columns", 1, "--scale", 1)
        assert picture("there.jpg").shape == (4 * 10 + 2, 12)
        assert not Path("samples.png").exists()

    def test_labels_by_name_and_number(self, run: Run) -> None:
        result = run("sample", "-m", "m.safetensors", "--labels", "DOG, 0,-1", "-n", 6, "--npz", "s.npz")
        assert "rows: Dog, cat, no class" in result.stdout
        with np.load("s.npz") as file:
            assert file["labels"].tolist() == [1, 0, -1, 1, 0, -1]

    def test_quiet(self, run: Run) -> None:
        assert run("sample", "-m", "m.safetensors", "-n", 1, "--quiet").output == ""
        assert Path("samples.png").exists()

    def test_progress(self, run: Run) -> None:
        result = run("sample", "-m", "m.safetensors", "-n", 1, "--progress")
        assert "sampling" in result.stderr
        assert run("sample", "-m", "m.safetensors", "-n", 1, "--no-progress").stderr == ""
        run("sample", "-m", "m.safetensors", "-n", 1, "--progress", "--quiet", code=2)

    def test_json(self, run: Run) -> None:
        facts = json.loads(run("sample", "-m", "m.safetensors", "-n", 2, "--json", "--seed", 4).stdout)
        assert facts["files"] == {"grid": "samples.png"}
        assert (facts["images"], facts["labels"], facts["seed"], facts["first"]) == (2, [0, 1], 4, 0)
        assert (facts["guidance"], facts["denoise"]) == (0.0, True)
        assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
        assert facts["backend"] in {status.name for status in tff.backends() if status.available}
        assert facts["images_per_second"] == 2 / (facts["seconds"] + facts["denoise_seconds"])
        assert len(facts["log_prob"]) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--out", "a.tiff"), "--out"),
            (("--out", "none/a.png"), "existing folder"),
            (("--out", "."), "--out"),
            (("--npz", "a.npy"), "--npz"),
            (("--gif", "a.png"), "--gif"),
            (("--singles", "m.safetensors"), "--singles"),
            (("-n", 0), "-n"),
            (("--seed", -1), "--seed"),
            (("--first", -1), "--first"),
            (("--guidance", -1), "--guidance"),
            (("--guidance", "x"), "--guidance"),
            (("--guide-what", "c", "--guidance", 1), "--guide-what"),
            (("--attn-temp", 0, "--guidance", 1), "--attn-temp"),
            (("--noise-std", 0), "--noise-std"),
            (("--denoise-scale", -1), "--denoise-scale"),
            (("--on-nonfinite", "ignore"), "--on-nonfinite"),
            (("--dtype", "int8"), "--dtype"),
            (("--batch-size", 0), "--batch-size"),
            (("--columns", 0), "--columns"),
            (("--scale", 0), "--scale"),
            (("--patch-size", 0), "--patch-size"),
            (("--labels", "cow"), "no class 'cow'"),
            (("--labels", ""), "--labels"),
            (("--labels", "0,,1"), "--labels"),
            (("--labels", "0,3"), "--labels: expected classes below 3"),
            (("-m", "plain.pth", "--labels", "0"), "--labels"),
            (("--first", MOST_NUMBER - 1, "-n", 2), "--first: expected an integer >= 0"),
            (("-m", "plain.pth", "--denoise"), "--noise-std: expected the σ"),
            (("--guidance", "nan"), "--guidance"),
            (("--backend", "abacus"), "--backend"),
            (("--solver", "guess"), "--solver"),
            (("--tol", 0.1, "--solver", "sequential"), "--tol: expected none with --solver sequential"),
            (("--device", "abacus"), "--device"),
            (("--guide-what", "a"), "no effect"),
            (("--attn-temp", 2), "no effect"),
            (("--annealed-guidance",), "no effect"),
            (("--noise-std", 0.1, "--no-denoise"), "no effect"),
            (("--denoise-scale", 2, "--no-denoise"), "no effect"),
        ],
    )
    def test_wrong_usage(self, run: Run, options: tuple[Any, ...], message: str) -> None:
        result = run("sample", "-m", "m.safetensors", *options, code=2)
        assert message in result.stderr
        assert sorted(os.listdir()) == ["m.safetensors", "plain.pth"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-m", "none.pth"), "no such file"),
            (("-m", "m.safetensors", "--device", "cuda:99"), "device"),
        ],
    )
    def test_failures(self, run: Run, options: tuple[Any, ...], message: str) -> None:
        assert message in run("sample", *options, code=1).stderr

    def test_a_batch_that_does_not_fit(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tarflow_fast.sampling.sampler.free_memory", lambda device: 2**16)
        assert "--batch-size: " in run("sample", "-m", "m.safetensors", "--batch-size", 20, code=1).stderr

    def test_outputs_are_checked_before_anything_else(self, run: Run) -> None:
        assert "--gif" in run("sample", "-m", "none.pth", "--gif", "none/a.gif", code=2).stderr

    def test_options_of_a_file_need_a_file(self, run: Run) -> None:
        assert "--patch-size goes with --model" in run("sample", "--patch-size", 2, code=2).stderr

    def test_without_a_model_the_shipped_one_is_drawn_from(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tarflow_fast.checkpoints.checkpoint.load_pretrained", lambda: tff.load("m.safetensors"))
        monkeypatch.setattr("tarflow_fast.cli.sample.SHIPPED", {"guidance": 1.5, "attn_temp": 2.0})
        facts = json.loads(run("sample", "-n", 1, "--json").stdout)
        assert (facts["guidance"], facts["attn_temp"], facts["denoise"]) == (1.5, 2.0, True)
        facts = json.loads(run("sample", "-n", 1, "--json", "--guidance", 0.5, "--attn-temp", 3).stdout)
        assert (facts["guidance"], facts["attn_temp"]) == (0.5, 3.0)
        facts = json.loads(run("sample", "-n", 1, "--json", "--guidance", 0).stdout)
        assert facts["guidance"] == 0
        assert "attn_temp" not in facts

    def test_the_shipped_model(self, run: Run) -> None:
        result = run("sample", "-n", 2, "--scale", 1)
        assert picture("samples.png").shape == (32, 62)
        assert "2 images of 28×28" in result.stdout


class TestLayout:
    @given(
        n=st.integers(1, 40),
        classes=st.none() | st.integers(0, 25),
        columns=st.none() | st.integers(1, 9),
        first=st.integers(0, 30) | st.integers(2**62, 2**62 + 30),
    )
    def test_laws(self, n: int, classes: int | None, columns: int | None, first: int) -> None:
        """Every image has a cell of its own: in the row of its class where these have rows, else in order."""
        plan = layout(n, None if classes is None else range(classes), columns)
        cells, width = plan.size(first, n)
        places = list(plan.places(first, n))
        assert len(set(places)) == n <= cells
        assert max(places) < cells
        assert columns in (None, width)
        if plan.classes is None:
            assert places == list(range(n))
            assert columns is not None or (width - 1) ** 2 < n <= width**2
        else:
            assert classes is not None
            assert 1 < classes <= MOST_ROWS
            assert cells == width * classes <= n + 2 * (classes - 1)
            for i, place in zip(range(first, first + n), places, strict=True):
                assert place // width == i % classes

    def test_as_many_images_as_a_picture_shows(self) -> None:
        assert default_count(range(3), asked=False) == 3 * PER_CLASS
        assert default_count([], asked=False) == default_count(range(1000), asked=False) == PER_CLASS**2
        assert default_count(range(1000), asked=True) == 1000

    def test_no_list_of_many_images_is_made(self) -> None:
        for plan in (layout(10**15, range(5), None), layout(10**15, None, None)):
            assert plan.size(7, 10**15)[0] >= 10**15
        assert len(layout(10**15, None, None).places(7, 10**15)) == 10**15


class TestEval:
    @pytest.fixture
    def data(self, run: Run) -> tuple[torch.Tensor, list[int]]:
        """d.npz and unlabelled.npz, sorted by class."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (10, 1, 8, 8), generator=generator, dtype=torch.uint8)
        labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
        np.savez("d.npz", images=images[:, 0].numpy(), labels=labels)
        np.savez("unlabelled.npz", images=images[:, 0].numpy())
        return images, labels

    def test_both_figures(self, run: Run, data: tuple[torch.Tensor, list[int]]) -> None:
        model = tff.load("m.safetensors")
        bits = bits_per_dim(model, *data, noise=Noise("gaussian", NOISE))
        accuracy = bayes_accuracy(model, *data)
        lines = run("eval", "-m", "m.safetensors", "--data", "d.npz").stdout.splitlines()
        assert lines[0] == "m.safetensors on d.npz, 10 images"
        assert lines[1].startswith(f"bits/dim        {bits.mean:.4f} ± {bits.standard_error:.4f}  (Gaussian noise")
        assert "compares between models of this noise level only" in lines[2]
        assert lines[3].startswith(f"Bayes accuracy  {100 * accuracy.accuracy:.2f} % ± ")
        assert f"({accuracy.correct} of 10; no noise;" in lines[3]

    @pytest.mark.parametrize(
        ("options", "for_bits", "for_accuracy", "how"),
        [
            ((), Noise("gaussian", NOISE), Noise("none"), {}),
            (("--noise", "uniform", "--seed", 2), Noise("uniform", seed=2), Noise("none", seed=2), {}),
            (("--noise-std", 0.4), Noise("gaussian", 0.4), Noise("none"), {}),
            (
                ("--accuracy-noise", "auto", "--draws", 2, "--batch-size", 3),
                Noise("gaussian", NOISE),
                Noise("gaussian", NOISE),
                {"draws": 2},
            ),
            (("--accuracy-noise", "uniform"), Noise("gaussian", NOISE), Noise("uniform"), {}),
            (("--dtype", "bfloat16"), Noise("gaussian", NOISE), Noise("none"), {"autocast": torch.bfloat16}),
        ],
    )
    def test_options(
        self,
        run: Run,
        data: tuple[torch.Tensor, list[int]],
        options: tuple[Any, ...],
        for_bits: Noise,
        for_accuracy: Noise,
        how: dict[str, Any],
    ) -> None:
        facts = json.loads(run("eval", "-m", "m.safetensors", "--data", "d.npz", "--json", *options).stdout)
        model = tff.load("m.safetensors")
        bits = bits_per_dim(model, *data, noise=for_bits, **how)
        accuracy = bayes_accuracy(model, *data, noise=for_accuracy, **how)
        assert abs(facts["bits_per_dim"]["mean"] - bits.mean) < 1e-4
        assert facts["bits_per_dim"]["noise"] == asdict(for_bits)
        assert facts["bits_per_dim"]["draws"] == how.get("draws", 1)
        assert facts["bayes_accuracy"]["correct"] == accuracy.correct
        assert facts["bayes_accuracy"]["noise"] == asdict(for_accuracy)

    def test_limit_spreads_over_the_data(self, run: Run, data: tuple[torch.Tensor, list[int]]) -> None:
        facts = json.loads(run("eval", "-m", "m.safetensors", "--data", "d.npz", "--json", "--limit", 5).stdout)
        images, labels = data
        wanted = bayes_accuracy(tff.load("m.safetensors"), images[::2], labels[::2])
        assert facts["images"] == 5
        assert facts["bayes_accuracy"]["correct"] == wanted.correct
        bits = bits_per_dim(tff.load("m.safetensors"), images[::2], labels[::2])
        assert abs(facts["bits_per_dim"]["mean"] - bits.mean) < 1e-5
        facts = json.loads(run("eval", "-m", "m.safetensors", "--data", "d.npz", "--json", "--limit", 99).stdout)
        assert facts["images"] == 10

    def test_folders_of_pictures(self, run: Run) -> None:
        for half, level in (("train", 0), ("test", 255)):
            for name in ("a", "b"):
                Path(half, name).mkdir(parents=True)
                Image.new("RGB", (12, 10), (level, level, level)).save(Path(half, name, "1.png"))
        command = ("eval", "-m", "plain.pth", "--data", ".", "--json")
        # The folder has other files, so its halves are named.
        facts = {
            half: json.loads(run(*command[:3], "--data", half, "--json").stdout)["bits_per_dim"]
            for half in ("train", "test")
        }
        assert facts["train"]["mean"] != facts["test"]["mean"]
        for split, half in (("train", "train"), ("test", "test")):
            found = json.loads(run(*command, "--split", split).stdout)
            assert found["bits_per_dim"]["mean"] == facts[half]["mean"]
            assert found["images"] == 2
        assert json.loads(run(*command).stdout)["split"] == "test"

    def test_classes_meet_by_name(self, run: Run) -> None:
        """Folders of two of the model's three classes, in another order than its own."""
        tff.save(named := random_model(in_channels=3, num_classes=3), "n.safetensors")
        named.metadata = {"class_names": ["owl", "cat", "Dog"]}
        tff.save(named, "n.safetensors")
        generator = np.random.default_rng(0)
        for name in ("cat", "owl"):
            Path("d", name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(Path("d", name, f"{i}.png"))
        command = ("eval", "-m", "n.safetensors", "--data", "d", "--json")
        facts = json.loads(run(*command).stdout)
        data = tff.load_images("d", size=8)
        wanted = bayes_accuracy(named, data.images, [1, 1, 1, 1, 0, 0, 0, 0])
        assert facts["bayes_accuracy"]["correct"] == wanted.correct
        limited = json.loads(run(*command, "--limit", 1).stdout)
        assert limited["bits_per_dim"]["mean"] == pytest.approx(bits_per_dim(named, data.images[:1], 1).mean, abs=1e-4)
        assert "--class-names: " in run(*command, "--class-names", "owl,cat", code=2).stderr
        message = run(*command, "--class-names", "cat,fig", code=2).stderr
        assert "--class-names: expected classes that the model knows" in message
        Path("d", "owl").rename(Path("d", "uhu"))
        assert "'uhu'" in run(*command, code=1).stderr
        renamed = json.loads(run(*command, "--class-names", "cat,owl").stdout)
        assert renamed["bayes_accuracy"]["correct"] == wanted.correct
        assert (
            "class-conditional" in run("eval", "-m", "plain.pth", "--data", "d", "--class-names", "a,b", code=2).stderr
        )

    def test_remarks_go_to_standard_error(self, run: Run) -> None:
        images = np.random.default_rng(0).random((4, 8, 8))
        np.savez("f.npz", images=images, labels=[0, 1, 2, 0])
        result = run("eval", "-m", "m.safetensors", "--data", "f.npz", "--json")
        assert "are taken as 0..1" in result.stderr
        assert json.loads(result.stdout)["images"] == 4
        assert run("eval", "-m", "m.safetensors", "--data", "f.npz", "-q").output == ""
        log = logging.getLogger("tarflow_fast")
        assert (log.level, log.handlers) == (logging.NOTSET, [])  # as it was for the process that goes on

    def test_noise_that_is_not_recorded_is_said_once(self, run: Run, data: tuple[torch.Tensor, list[int]]) -> None:
        tff.save(random_model(), "one.safetensors")
        command = ("eval", "-m", "one.safetensors", "--data", "d.npz")
        assert run(*command).stderr.count("does not record the noise") == 1
        assert run(*command, "--noise", "uniform").stderr == ""

    def test_what_sample_writes_can_be_evaluated(self, run: Run) -> None:
        run("sample", "-m", "m.safetensors", "-n", 6, "--npz", "s.npz", "-q")
        facts = json.loads(run("eval", "-m", "m.safetensors", "--data", "s.npz", "--json").stdout)
        assert facts["bayes_accuracy"]["images"] == 6

    def test_latents(self, run: Run) -> None:
        tff.save(random_model(in_channels=4), "l.safetensors")
        np.save("l.npy", np.random.default_rng(0).standard_normal((6, 4, 8, 8)).astype(np.float32))
        command = ("eval", "-m", "l.safetensors", "--data", "l.npy", "--json")
        assert json.loads(run(*command, "--noise-std", 0.1).stdout)["images"] == 6
        message = run(*command, "-q", code=2).stderr
        assert "--noise: expected 'gaussian', as only 8-bit values can be dequantised" in message

    def test_accuracy_is_left_out_where_it_cannot_be(self, run: Run, data: tuple[torch.Tensor, list[int]]) -> None:
        for options in (("unlabelled.npz",), ("d.npz", "--no-accuracy")):
            result = run("eval", "-m", "m.safetensors", "--data", *options)
            assert "accuracy" not in result.stdout
        assert (
            "needs labels"
            in run("eval", "-m", "m.safetensors", "--data", "unlabelled.npz", "--accuracy", code=2).stderr
        )
        tff.save(random_model(), "one.pth")
        grey = ("--in-channels", 1)
        result = run("eval", "-m", "one.pth", "--data", "d.npz")
        assert "accuracy" not in result.stdout
        assert "uniform dequantisation" in result.stdout
        assert "a bound on the bits" in result.stdout
        assert (
            "class-conditional" in run("eval", "-m", "one.pth", *grey, "--data", "d.npz", "--accuracy", code=1).stderr
        )

    def test_quiet_and_progress(self, run: Run, data: tuple[torch.Tensor, list[int]]) -> None:
        assert run("eval", "-m", "m.safetensors", "--data", "d.npz", "-q").output == ""
        result = run("eval", "-m", "m.safetensors", "--data", "d.npz", "--progress")
        assert "bits/dim:" in result.stderr
        assert "accuracy:" in result.stderr

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("--data", "none.npz"), 2, "--data"),
            ((), 2, "--data"),
            (("--data", "m.safetensors"), 1, "m.safetensors"),
            (("--data", "d.npz", "--noise", "gaussian", "--noise-std", 0), 2, "--noise-std"),
            (("--data", "d.npz", "--noise", "uniform", "--noise-std", 0.1), 2, "--noise-std: "),
            (("--data", "d.npz", "--limit", 0), 2, "--limit"),
            (("--data", "d.npz", "--draws", 0), 2, "--draws"),
            (("--data", "d.npz", "--dtype", "float64"), 2, "--dtype"),
            (("--data", "d.npz", "--split", "half"), 2, "--split"),
            (("--data", "d.npz", "--device", "abacus"), 2, "--device: "),
            (("--data", "d.npz", "-m", "plain.pth"), 1, "images"),
        ],
    )
    def test_failures(
        self,
        run: Run,
        data: tuple[torch.Tensor, list[int]],
        options: tuple[Any, ...],
        code: int,
        message: str,
    ) -> None:
        assert message in run("eval", "-m", "m.safetensors", *options, code=code).stderr


class TestConvert:
    def test_to_pth_and_back(self, run: Run) -> None:
        text = run("convert", "m.safetensors", "m.pth").stdout
        assert "m.pth: " in text
        assert "float32" in text
        assert "left out, as .pth holds weights alone: noise_type, noise_std, class_names" in text
        options = ("--noise-std", 0.2, "--class-names", "x, y,z")
        text = run("convert", "m.pth", "back.safetensors", *options).stdout
        assert "16 tokens of 4 values" in text
        assert "class_names: x, y, z" in text
        back, model = tff.load("back.safetensors"), tff.load("m.safetensors")
        assert back.config == model.config
        assert back.metadata == {"noise_type": "gaussian", "noise_std": 0.2, "class_names": ["x", "y", "z"]}
        for key, value in model.state_dict().items():
            assert torch.equal(value, back.state_dict()[key])

    def test_sizes(self, run: Run) -> None:
        with pytest.warns(tff.TarFlowWarning):
            tff.save(random_model(in_channels=4, patch_size=1), "open.pth")
        run("convert", "open.pth", "open.safetensors", "--patch-size", 1, "--in-channels", 4, "--head-dim", 32)
        config = tff.load("open.safetensors").config
        assert (config.patch_size, config.in_channels, config.head_dim) == (1, 4, 32)

    def test_half_precision(self, run: Run) -> None:
        run("convert", "m.safetensors", "half.safetensors", "--dtype", "float16", "--quiet")
        assert Path("half.safetensors").stat().st_size < 0.6 * Path("m.safetensors").stat().st_size
        half, model = tff.load("half.safetensors").state_dict(), tff.load("m.safetensors").state_dict()
        for key, value in model.items():
            assert torch.equal(half[key], value.half().float())

    def test_in_place_and_names_from_a_file(self, run: Run) -> None:
        Path("names.txt").write_text("Käfer\nb, the second\n\nc\n", encoding="utf-8")
        run("convert", "m.safetensors", "m.safetensors", "--class-names", "@names.txt")
        metadata = tff.load("m.safetensors").metadata
        assert metadata["class_names"] == ["Käfer", "b, the second", "c"]
        assert metadata["noise_std"] == NOISE

    def test_json_and_quiet(self, run: Run) -> None:
        facts = json.loads(run("convert", "m.safetensors", "n.safetensors", "--json").stdout)
        assert facts["bytes"] == Path("n.safetensors").stat().st_size
        assert facts["model"]["num_classes"] == 3
        assert run("convert", "m.safetensors", "n.safetensors", "-q").output == ""

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("none.pth", "a.safetensors"), 2, "none.pth"),
            (("m.safetensors", "a.bin"), 2, "TARGET"),
            (("m.safetensors", "none/a.pth"), 2, "TARGET"),
            (("m.safetensors", "a.pth", "--noise-std", 1), 2, "weights alone"),
            (("m.safetensors", "a.pth", "--class-names", "a,b,c"), 2, "weights alone"),
            (("m.safetensors", "a.safetensors", "--class-names", "a,b"), 2, "expected 3 names, got 2"),
            (("m.safetensors", "a.safetensors", "--class-names", "@none.txt"), 1, "none.txt: No such file"),
            (("m.safetensors", "a.safetensors", "--patch-size", 3), 2, "--patch-size: "),
            (("foreign.pth", "a.safetensors"), 1, "foreign.pth"),
            (("m.safetensors", "a.safetensors", "--dtype", "int8"), 2, "--dtype"),
        ],
    )
    def test_failures(self, run: Run, arguments: tuple[Any, ...], code: int, message: str) -> None:
        Path("foreign.pth").write_bytes(b"not a checkpoint")
        assert message in run("convert", *arguments, code=code).stderr
        assert not list(Path().glob("a.*"))


class TestWeights:
    """Which weights of a file are taken, and what is said of it on standard error."""

    @pytest.fixture
    def two(self, run: Run) -> str:
        a, b = (random_model(seed, in_channels=3).state_dict() for seed in (1, 2))
        torch.save({"model": a, "ema": b}, "two.ckpt")
        return "two.ckpt"

    def test_what_was_taken_is_one_line(self, run: Run, two: str) -> None:
        for command in (("info", two), ("info", "-m", two), ("convert", two, "a.safetensors")):
            done = run(*command)
            taken = "Warning: two.ckpt: its weights 'ema' were taken, not 'model'; --weights model takes those\n"
            assert done.stderr == taken
            assert "weights: ema of " in done.stdout
        facts = json.loads(run("info", two, "--json").stdout)["model"]
        assert facts["origin"] == {"path": str(Path(two).resolve()), "weights": "ema"}
        assert run("convert", two, "a.safetensors", "-q").output == ""

    @pytest.mark.parametrize(("name", "seed"), [("ema", 2), ("model", 1)])
    def test_a_choice(self, run: Run, two: str, name: str, seed: int) -> None:
        assert run("convert", two, "a.safetensors", "--weights", name).stderr == ""
        assert torch.equal(tff.load("a.safetensors").var, random_model(seed, in_channels=3).var)
        assert f"weights: {name} of " in run("info", two, "--weights", name).stdout
        assert "--weights: expected" in run("info", two, "--weights", "best", code=2).stderr
        run("sample", "-m", two, "--weights", name, "-n", 1, "-q")
        assert "--weights goes with --model" in run("sample", "--weights", name, code=2).stderr

    def test_missing_noise_is_said_once(self, run: Run) -> None:
        said = run("sample", "-m", "plain.pth", "-n", 1).stderr
        assert said.count("does not record the noise") == 1
        for options in (("--no-denoise",), ("--noise-std", 0.1), ("-q",)):
            assert run("sample", "-m", "plain.pth", "-n", 1, *options).stderr == ""

    def test_folders_names_and_urls(self, run: Run) -> None:
        Path("run").mkdir()
        Path("m.safetensors").rename("run/model.safetensors")
        assert "1×8×8" in run("info", "run").stdout
        run("convert", "run", "copy.safetensors")
        assert "no such file in it as" in run("info", ".", code=1).stderr
        assert "hf://owner/name" in run("info", "hf://", code=1).stderr
        assert "a whole URL" in run("convert", "https://", "x.safetensors", code=1).stderr
        assert "give one" in run("info", "run", "-m", "run", code=2).stderr

    def test_a_pth_that_cannot_describe_its_model_says_so(self, run: Run) -> None:
        tff.save(random_model(head_dim=32), "h.safetensors")
        assert "load it with --head-dim 32" in run("convert", "h.safetensors", "h.pth").stderr

    def test_what_a_file_says_is_escaped(self, run: Run) -> None:
        model = random_model(num_classes=2)
        model.metadata = {"card": "\x1b]0;title\x07\nlicence: MIT", "class_names": ["\x1b[31mred", "b"], "\x1b[2J": 1}
        tff.save(model, "evil.safetensors")
        torch.save({"\x1b[2Jx": torch.zeros(1)}, "evil.pth")
        text = run("info", "evil.safetensors").stdout
        assert "class_names: '\\x1b[31mred', b\n" in text
        for said in (text, run("info", "evil.pth", code=1).stderr, run("info", "evil.safetensors", "--json").stdout):
            assert said.replace("\n", "").isprintable()
            assert "MIT" not in [line[-3:] for line in said.splitlines() if line.lstrip().startswith("licence")]


class TestInfo:
    def test_text(self, run: Run) -> None:
        text = run("info", "-m", "m.safetensors").stdout
        assert f"tarflow_fast {version('tarflow_fast')}" in text
        assert f"torch {torch.__version__}" in text
        for status in tff.backends():
            state = "available" if status.available else "not available"
            (line,) = [x.split() for x in text.splitlines() if x.split()[:3] == [status.name, "on", status.device]]
            assert " ".join(line[3:]) == f"{state} {status.reason}"
        assert "1×8×8 in patches of 2×2, 16 tokens of 4 values" in text
        assert "class_names: cat, Dog, t-shirt/top" in text

    def test_json(self, run: Run) -> None:
        facts = json.loads(run("info", "-m", "plain.pth", "--json").stdout)
        assert facts["version"] == version("tarflow_fast")
        assert facts["backends"] == [status.to_dict() for status in tff.backends()]
        model = random_model(in_channels=3)
        assert {name: facts["model"][name] for name in model.config.to_dict()} == model.config.to_dict()
        assert facts["model"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["model"]["metadata"] == {}

    def test_numbers_that_are_not_finite_are_null(self, run: Run) -> None:
        model = random_model()
        model.metadata = {"score": float("nan")}
        tff.save(model, "nan.safetensors")
        text = run("info", "-m", "nan.safetensors", "--json").stdout
        assert json.loads(text, parse_constant=pytest.fail)["model"]["metadata"] == {"score": None}

    def test_the_shipped_model(self, run: Run) -> None:
        facts = json.loads(run("info", "--json").stdout)
        assert facts["model"]["img_size"] == 28
        assert facts["model"]["num_classes"] == 10


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


class TestPackage:
    def test_public_names(self) -> None:
        assert set(tff.__all__) == {*tff._HOME, "__version__"}
        assert dir(tff) == sorted(tff.__all__)
        for name in tff.__all__:
            assert getattr(tff, name) is not None
        with pytest.raises(AttributeError, match="nonsense"):
            _ = tff.nonsense

    def test_no_module_hides_a_function(self) -> None:
        """Importing a module puts it into its package under its own name."""
        for name in tff.__all__:
            with pytest.raises(ImportError):
                importlib.import_module(f"tarflow_fast.{name}")
