"""The files of `tarflow-fast sample`: what was there survives, each says how it was made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from PIL import Image
from sample_runs import ALL, NAMES, POSIX, Run, contents, how, numbers

import tarflow_fast as tff
from tarflow_fast.images import to_uint8
from tarflow_fast.sampling.sampler import Sampler


class TestContinuing:
    @pytest.mark.parametrize(
        "labels", [None, "all", "random", "none", "shark", "0-1,-1", "tench, Tinca tinca", "@classes.txt"], ids=str
    )
    def test_two_runs_are_one(self, run: Run, labels: str | None) -> None:
        Path("classes.txt").write_text("shark\n1\n0\nshark\n2\n")
        options = ["--singles", "whole", "--npz", "whole.npz", *([] if labels is None else ["--labels", labels])]
        run("-n", 7, *options)
        options[1], options[3] = "parts", "a.npz"
        run("-n", 4, *options)
        options[3] = "b.npz"
        run("-n", 3, "--first", 4, *options)
        whole, a, b = (numbers(name) for name in ("whole.npz", "a.npz", "b.npz"))
        np.testing.assert_allclose(whole["images"], np.concatenate([a["images"], b["images"]]), atol=1e-5)
        if labels == "none":
            assert "labels" not in whole
        else:
            assert whole["labels"].tolist() == [*a["labels"], *b["labels"]]
        names = sorted(path.name for path in Path("whole").iterdir())
        assert names == sorted(path.name for path in Path("parts").iterdir()) == [f"{i:05d}.png" for i in range(7)]
        for name in names:
            first, second = how(f"whole/{name}"), how(f"parts/{name}")
            assert first == second

    def test_all_classes_once_there_are_as_many_images(self, run: Run) -> None:
        tff.save(random_model(num_classes=40, img_size=4), "many.safetensors")
        out = run("-n", 40, "--npz", "s.npz", model="many.safetensors").stdout
        assert sorted(numbers()["labels"]) == list(range(40))
        assert "classes: all 40 in turn" in out
        assert "classes: random ones of 40" in run("-n", 2, "--labels", "random", model="many.safetensors").stdout
        out = run("-n", 2, "--labels", "3-5", "--columns", 2, model="many.safetensors").stdout
        assert "classes: 3, 4, 5 in turn (3, 4)" in out

    def test_rows_with_a_first_image_in_between(self, run: Run) -> None:
        run("-n", 5, "--first", 5, "--scale", 1, "--npz", "s.npz")  # numbers 5; 6, 7, 8; 9
        with Image.open("samples.png") as picture:
            sheet = np.asarray(picture)
        assert sheet.shape == (3 * 6 + 2, 3 * 6 + 2)
        cells = {divmod(place, 3): i for i, place in enumerate([6, 1, 4, 7, 2])}
        drawn = to_uint8(torch.from_numpy(numbers()["images"]))
        for row in range(3):
            for column in range(3):
                cell = sheet[row * 6 + 2 : row * 6 + 6, column * 6 + 2 : column * 6 + 6]
                wanted = drawn[cells[row, column], 0] if (row, column) in cells else np.full((4, 4), 255)
                np.testing.assert_array_equal(cell, wanted)


class TestHowItWasMade:
    def test_singles_and_grid(self, run: Run) -> None:
        run("-n", 4, "--first", 5, "--seed", 9, "--guidance", 2, "--dtype", "bfloat16", *ALL)
        one = how("d/00006.png")
        assert {key: one[key] for key in ("number", "seed", "label", "class_name", "model")} == {
            "number": 6,
            "seed": 9,
            "label": 0,
            "class_name": NAMES[0],
            "model": "m.safetensors",
        }
        assert one["options"]["guidance"] == 2
        assert one["options"]["denoise"] is True
        assert one["options"]["dtype"] == "bfloat16"
        all_ = how("g.png")
        assert (all_["first"], all_["images"], all_["labels"]) == (5, 4, [2, 0, 1, 2])
        assert all_["class_names"] == NAMES
        assert all_["options"] == one["options"]
        file = numbers()
        assert file["class_names"].tolist() == NAMES
        assert json.loads(str(file["options"])) == {"model": "m.safetensors", **one["options"]}
        assert (file["seed"], file["first"]) == (9, 5)

    def test_without_classes(self, run: Run) -> None:
        run("-n", 2, "--labels", "none", *ALL)
        assert how("d/00000.png")["label"] is None
        assert "labels" not in how("g.png")
        assert "class_names" not in numbers()

    def test_the_suffix_is_the_file(self, run: Run) -> None:
        run("-n", 2, "-o", "G.PNG", "--npz", "S.NPZ", "--gif", "M.GIF")
        assert {"G.PNG", "S.NPZ", "M.GIF"} < set(os.listdir())
        assert len(numbers("S.NPZ")["images"]) == 2
        assert how("G.PNG")["images"] == 2
        run("-n", 2, "-o", "G.JpG")
        with Image.open("G.JpG") as picture:
            assert picture.format == "JPEG"

    def test_the_same_command_gives_the_same_files(self, run: Run) -> None:
        run("-n", 5, *ALL)
        first = contents()
        run("-n", 5, *ALL)
        assert contents() == first


class TestSaidBefore:
    @pytest.fixture(autouse=True)
    def _nothing_is_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Sampler, "stream", lambda *_, **__: pytest.fail("drawn"))

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            (("-n", 9000, "--columns", 9000, "--scale", 8, "-o", "g.jpg"), "at most 65500 pixels"),
            (("-n", 9000, "--columns", 9000, "--scale", 8, "--gif", "g.gif", "--no-grid"), "at most 65535 pixels"),
            (
                (
                    "-n",
                    10**9,
                ),
                "--out: expected",
            ),
            (("-n", 2**62, "--columns", 2), "--out: expected at most"),
            (("-n", 2, "--columns", 65536, "--scale", 65536), "--out: expected"),
            (("-n", 1, "--scale", 65536), "a picture that memory can hold"),
            (("-n", 10**12, "--no-grid", "--npz", "s.npz"), "a disk that holds"),
            (("--no-grid",), "nothing to write"),
            (("--no-grid", "-o", "g.png"), "exclude each other"),
            (("--singles", "m.safetensors/d"), "--singles: expected a folder"),
            (("--npz", "none/s.npz"), "existing folder"),
            (("--seed", 2**64), "--seed"),
            (("--first", 2**70), "--first"),
            (("-n", 2**63), "-n"),
            (("--threads", 20000), "--threads"),
            (("--batch-size", 10**9), "--batch-size"),
            (("--guidance", 10**6), "--guidance"),
            (("--scale", 100000), "--scale"),
            (("--tol", 100), "--tol"),
            (("--labels", "none", "--guidance", 1), "--guidance has no effect"),
        ],
        ids=str,
    )
    def test_what_cannot_be(self, run: Run, options: tuple[Any, ...], what: str) -> None:
        before = contents()
        assert what in run(*options, code=2).stderr
        assert contents() == before
        assert not Path("d").exists()

    @pytest.mark.parametrize(
        "options", [("-o", "g.png"), (), ("--no-grid", "--gif", "m.gif"), ("--no-grid", "--singles", "d")]
    )
    def test_four_channels_are_no_picture(self, run: Run, options: tuple[str, ...]) -> None:
        assert "4 channels" in run("-n", 2, *options, model="latent.safetensors", code=2).stderr

    @POSIX
    def test_a_folder_that_is_not_ours(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("ro"))
        Path("ro").mkdir()
        for options in (("--singles", "ro"), ("--singles", "ro/d"), ("--npz", "ro/s.npz"), ("-o", "ro/g.png")):
            assert options[0] in run("-n", 2, *options, code=2).stderr


def test_latents_are_numbers(run: Run) -> None:
    out = run("-n", 2, "--npz", "s.npz", model="latent.safetensors").stdout
    assert out.startswith("s.npz: 2 images")
    assert numbers()["images"].shape == (2, 4, 4, 4)
    assert not Path("samples.png").exists()


def test_a_grid_of_nothing_but_singles(run: Run) -> None:
    assert run("-n", 2, "--no-grid", "--singles", "a/b").stdout.startswith(f"{Path('a/b')}: 2 images")
    assert sorted(os.listdir("a/b")) == ["00000.png", "00001.png"]


def test_a_link_is_replaced_not_followed(run: Run) -> None:
    Path("mine").write_text("mine")
    Path("d").mkdir()
    for name in ("g.png", "s.npz", "m.gif", "d/00001.png"):
        Path(name).symlink_to(Path("mine").absolute())
    run("-n", 2, *ALL)
    assert Path("mine").read_text() == "mine"
    assert not any(Path(name).is_symlink() for name in ("g.png", "s.npz", "m.gif", "d/00001.png"))
