"""`tarflow-fast convert` and `info`, and which weights every command takes of a file."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model
from command_lines import NOISE, Run

import tarflow_fast as tff


@pytest.fixture
def run(command_line: Run) -> Run:
    return command_line


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

    def test_defaults_of_sampling(self, run: Run) -> None:
        options = ("--default-guidance", 2, "--default-denoise", "--default-attn-temp", 1.5)
        text = run("convert", "m.safetensors", "n.safetensors", *options).stdout
        assert "sampling: guidance = 2.0, attn_temp = 1.5, denoise = True\n" in text
        run("convert", "n.safetensors", "n.safetensors", "--default-guidance", 3, "-q")  # the others stay
        wanted = {"guidance": 3.0, "attn_temp": 1.5, "denoise": True}
        model = tff.load("n.safetensors")
        assert model.metadata["sampling"] == wanted
        assert "guidance = 3.0" in run("info", "n.safetensors").stdout
        assert json.loads(run("info", "n.safetensors", "--json").stdout)["model"]["metadata"]["sampling"] == wanted
        card = tff.model_card(model)
        assert "| sampled by default with | guidance = 3.0, attn_temp = 1.5, denoise = True |" in card
        assert ".sample(16, labels=[0, 1], denoise=True, guidance=3.0, attn_temp=1.5, seed=0)" in card
        run("convert", "n.safetensors", "n.pth")
        assert "--default-denoise needs --noise-std" in (
            run("convert", "n.pth", "o.safetensors", "--default-denoise", code=2).stderr
        )

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
            (("m.safetensors", "a.pth", "--default-guidance", 1), 2, "weights alone"),
            (("m.safetensors", "a.safetensors", "--default-guidance", -1), 2, "--default-guidance"),
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
