"""`tarflow-fast sample`: what is drawn, and how it lies in a grid."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from command_lines import NAMES, Run, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tarflow_fast as tff
from tarflow_fast.cli.layout import MOST_ROWS, PER_CLASS, default_count, layout
from tarflow_fast.images import grid, to_uint8
from tarflow_fast.limits import MOST_NUMBER
from tarflow_fast.sampling.sampler import Sampler


@pytest.fixture
def run(command_line: Run) -> Run:
    return command_line


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
            (("--probe", "never"), {"probe": "never"}),
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
        default["probe"] = "background"
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
        monkeypatch.setattr("tarflow_fast.sampling.memory.free_memory", lambda device: 2**16)
        assert "--batch-size: " in run("sample", "-m", "m.safetensors", "--batch-size", 20, code=1).stderr

    def test_outputs_are_checked_before_anything_else(self, run: Run) -> None:
        assert "--gif" in run("sample", "-m", "none.pth", "--gif", "none/a.gif", code=2).stderr

    def test_options_of_a_file_need_a_file(self, run: Run) -> None:
        assert "--patch-size goes with --model" in run("sample", "--patch-size", 2, code=2).stderr

    def test_what_the_model_records_is_the_default(self, run: Run) -> None:
        model = tff.load("m.safetensors")
        model.metadata["sampling"] = {"guidance": 1.5, "attn_temp": 2.0, "denoise": False}
        tff.save(model, "own.safetensors")

        def facts(*options: object) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(
                run("sample", "-m", "own.safetensors", "-n", 1, "--json", *options).stdout
            )
            return found

        found = facts()
        assert (found["guidance"], found["attn_temp"], found["denoise"]) == (1.5, 2.0, False)
        found = facts("--guidance", 0.5, "--attn-temp", 3, "--denoise")
        assert (found["guidance"], found["attn_temp"], found["denoise"]) == (0.5, 3.0, True)
        found = facts("--guidance", 0)
        assert found["guidance"] == 0
        assert "attn_temp" not in found
        assert facts("--labels", "none")["guidance"] == 0

    def test_the_shipped_model_records_how_it_is_drawn_from(self, run: Run) -> None:
        facts = json.loads(run("sample", "-n", 2, "--json").stdout)
        assert (facts["guidance"], facts["denoise"]) == (1.0, True)
        images = tff.Sampler(tff.load_pretrained()).sample(2, [0, 1], guidance=1.0, denoise=True).images
        tff.save_grid(images, "wanted.png", columns=2, scale=3)
        assert np.abs(picture("samples.png").astype(int) - picture("wanted.png").astype(int)).max() <= 1

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
