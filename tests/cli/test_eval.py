"""`tarflow-fast eval`: both figures, and the data that they are of."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from command_lines import NOISE, Run
from PIL import Image

import tarflow_fast as tff
from tarflow_fast.evaluation import Noise, bayes_accuracy, bits_per_dim


@pytest.fixture
def run(command_line: Run) -> Run:
    return command_line


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
