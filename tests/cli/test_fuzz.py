"""The command line under any options and damaged files: an exit code of the list, one line of error, nothing left over.

What is wrong with an option is wrong usage that names its flag, and no line is in the spelling of Python.

Every command is tried in this process, for speed: models, data and damage are as small as can be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from cases import random_model
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import tarflow_fast as tff
from tarflow_fast.checkpoints.settings import HEADER
from tarflow_fast.cli import main
from tarflow_fast.cli.options import Option
from tarflow_fast.errors import BackendError
from tarflow_fast.evaluation import Features
from tarflow_fast.limits import MOST_NUMBER

EXIT_CODES = (0, 1, 2, 130, 143)
SECONDS = 60  # that one case may take, on a machine that does other things as well
TINY: dict[str, Any] = {"img_size": 4, "channels": 8, "head_dim": 8, "num_blocks": 1}
TITLE = "\x1b]0;title\x07\x9b2J\nError: not ours‮"  # what a terminal would obey

INTS = ["-1", "0", "1", "2", "3", "1.5", "x", "", "nan", "99999999999999999999", "-99999999999999999999", "٣", "0x1"]
FLOATS = ["-1", "0", "0.1", "1", "2.5", "1e-320", "1e300", "1e999", "nan", "inf", "-inf", "x", ""]
FILES = [
    *(
        "m.safetensors",
        "plain.pth",
        "latent.safetensors",
        "evil.safetensors",
        "odd.safetensors",
        "damaged",
        "names.txt",
    ),
    *(
        "d.npz",
        "named.npz",
        "alpha.npz",
        "floats.npz",
        "pictures",
        "mixed",
        "t10k-images-idx3-ubyte",
        "empty.npz",
        "s.npz",
        "empty.pth",
        "one.png",
    ),
    *("none", "", ".", "none/x", "x" * 300, "\udcff", "ü", "/dev/null", "@", "-", "--"),
]
TEXTS = [
    "auto",
    "cpu",
    "cuda:99",
    "x",
    "",
    "all",
    "none",
    "random",
    "0",
    "-1",
    "0-2",
    "2-0",
    "#1",
    "0,1",
    "a,,b",
    '"a',
    "@names.txt",
]
TEXTS += ["@none", "@one.png", "@.", "cat", TITLE, "\udcff", "9" * 5000, "0-99999999999", "x" * 300]
WRITTEN = [
    "out.png",
    "out.JPG",
    "out.npz",
    "out.NPZ",
    "out.gif",
    "out.pth",
    "out.safetensors",
    "made",
    "pictures",
    "none/out.png",
]
WRITTEN += ["", ".", "\udcff.png", "x" * 300 + ".png", "m.safetensors/out.npz", "/dev/null"]

SMALL_INTS = [word for word in INTS if not word.startswith("9")]
SIZES = [*INTS, "2x4", "4X4", "4×2", "0x4", "4x", "x", "1x2x3", "-4x4"]
WORDS: dict[str, list[str]] = {
    "-n": ["0", "1", "2", "7", "x", "", "99999999999999999999"],  # others take as long as they take
    "--draws": SMALL_INTS,
    "--epochs": SMALL_INTS,
    "--sample-rows": SMALL_INTS,
    "--limit": INTS,
    "--first": [*INTS, str(MOST_NUMBER - 1)],
    "--batch-size": [*SMALL_INTS, "7", "300"],
    "--labels": [*TEXTS, "5", "#7", "0-5", "1-3", "#0-#2", "#2-#1", "ALL", "Random", "1.0", "0.5", "1,", "\udcff"],
    "--class-names": ["cat,dog,owl", "dog,cat,owl", "owl", "1,0,2", "a,a,b", "cat,1,a", *TEXTS],
    "--img-size": SIZES,
    "--patch-size": SIZES,
    "--threads": ["1", "2", "0", "20000", "x"],  # those that are taken go to torch, for the whole process
    "--backend": ["auto", "cpu", "torch", "x", ""],
    "--probe": ["now", "never", "x"],
    "--solver": ["auto", "sequential", "adaptive", "x"],
    "--device": ["auto", "cpu", "cuda:99", "meta", "x", "", "\udcff"],
    "--scale": [*INTS, "100000", "65536"],
    "--columns": [*INTS, "65536"],
}
LEFT_OUT = {"--compile", "--tensorboard", "--help"}
OUTPUTS = {"--out", "--npz", "--gif", "--singles", "--save", "--plot", "--features"}
TRAINED = "done"  # a run that is copied to `run` where a line goes on with one
BASES = {
    "sample": ["sample", "-m", "m.safetensors", "-n", "2"],
    "info": ["info", "-m", "m.safetensors"],
    "convert": ["convert", "m.safetensors", "out.safetensors"],
    "eval": ["eval", "-m", "m.safetensors", "--data", "d.npz", "--limit", "2"],
    "eval by name": ["eval", "-m", "m.safetensors", "--data", "named.npz", "--limit", "2", "--class-names", "cat,1"],
    "fid": ["fid", "pictures", "--size", "4", "--save", "out.npz"],
    "prepare-stats": ["prepare-stats", "pictures", "--size", "4", "--out", "out.npz"],
    "tune": ["tune", "-m", "m.safetensors", "--stats", "s.npz", "-n", "2", "--guidance", "0", "--denoise-scale", "0"],
    "resume": ["train", "--resume", "--out", "run"],
    "train": [
        "train",
        *("--data", "d.npz", "--out", "run", "--channels", "8", "--head-dim", "8", "--blocks", "1", "--layers", "1"),
        *("--patch-size", "2", "--epochs", "1", "--batch-size", "3", "--dtype", "float32", "--warmup-steps", "1"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, whole and not."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = random_model(num_classes=3, **TINY)
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.1, "class_names": ["cat", "1", "a, b"]}
    tff.save(model, folder / "m.safetensors")
    tff.save(random_model(in_channels=3, **TINY), folder / "plain.pth")
    tff.save(random_model(in_channels=4, **TINY), folder / "latent.safetensors")
    model.metadata = {TITLE: TITLE, "class_names": [TITLE, "b", "c"], "license": TITLE}
    tff.save(model, folder / "evil.safetensors")
    metadata = {"noise_std": "much", "class_names": {"a": 1}, "noise_type": [TITLE]}
    header = {HEADER: json.dumps({"config": model.config.to_dict(), "metadata": metadata})}
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith("attn_mask")}
    save_file(weights, folder / "odd.safetensors", header)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    np.savez(folder / "d.npz", images=pixels, labels=np.arange(6) % 3)
    np.savez(folder / "named.npz", images=pixels, labels=np.arange(6) % 2, class_names=["cat", "dog"])
    channels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 2), dtype=np.uint8)
    np.savez(folder / "alpha.npz", images=channels, labels=np.arange(6) % 3)
    np.savez(folder / "floats.npz", images=pixels / 255, labels=np.arange(6.0))
    np.savez(folder / "empty.npz", images=pixels[:0])
    np.savez(folder / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name in ("a", TITLE.replace("/", "")):
        for i in range(2):
            for where in ("pictures", "mixed"):
                path = folder / where / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[i]).save(path)
    (folder / "mixed" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(pixels[0]).save(folder / "one.png")
    begin = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    (folder / "t10k-images-idx3-ubyte").write_bytes(begin + pixels.tobytes())
    (folder / "names.txt").write_text("cat\na, b\n0-1\n#2\n", encoding="utf-8")
    (folder / "empty.pth").touch()
    line = [str(folder / word) if word == "d.npz" else word for word in BASES["train"]]
    line[line.index("run")] = str(folder / TRAINED)
    assert CliRunner().invoke(main, [*line, "-q"]).exit_code == 0
    return folder


class Small:
    """A small extractor in the place of Inception-v3, which nothing here may download."""

    device, name = torch.device("cpu"), "small"

    def __init__(self, weights: str | None = None, *, device: Any = "cpu", download: bool = False):
        assert not download
        if weights is not None and not os.path.isfile(weights):
            raise BackendError(f"weights of Inception-v3: no such file as {weights!r}")
        self.network = torch.nn.Linear(3, 3)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images).pooled

    def features(self, images: torch.Tensor) -> Features:
        x = images.expand(-1, 3, -1, -1).float() / 255
        return Features(x.mean((2, 3)), x.amax((2, 3)), x.amin((2, 3)))


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Small)
    monkeypatch.delenv("TARFLOW_FAST_TRACEBACK", raising=False)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


def words_for(param: click.Option) -> list[str]:
    flag = param.opts[-1]
    if flag in WORDS:
        return WORDS[flag]
    if flag in OUTPUTS:
        return WRITTEN
    if isinstance(param.type, click.Choice):
        return [*map(str, param.type.choices), "x", ""]
    if isinstance(param.type, (click.IntRange, click.types.IntParamType)):
        return INTS
    if isinstance(param.type, (click.FloatRange, click.types.FloatParamType)):
        return FLOATS
    return (
        FILES if isinstance(param.type, click.Path) or flag in ("--data", "--eval-data", "--model") else TEXTS + FILES
    )


@st.composite
def command_lines(draw: st.DrawFn, name: str) -> list[str]:
    """A command that works, with up to five options more, or in place of its own."""
    line = list(BASES[name])
    for flag in sorted({"-m", "--data", "--class-names"} & set(line)):
        if draw(st.booleans()):
            line[line.index(flag) + 1] = draw(st.sampled_from(WORDS.get(flag, FILES)))
    options = [
        p
        for p in main.commands[line[0]].params
        if isinstance(p, click.Option) and not LEFT_OUT & {*p.opts, *p.secondary_opts}
    ]
    for param in draw(st.lists(st.sampled_from(options), max_size=5)):
        if param.is_flag:
            line.append(draw(st.sampled_from([*param.opts, *param.secondary_opts])))
        else:
            word = draw(st.sampled_from(words_for(param)))
            flag = draw(st.sampled_from(param.opts))
            line += [f"{flag}={word}"] if flag.startswith("--") else [flag, word]
    if line[0] == "convert" and draw(st.booleans()):
        line[1:3] = [draw(st.sampled_from([*FILES, "m.safetensors"])), draw(st.sampled_from(WRITTEN))]
    return line


damages = st.none() | st.tuples(
    st.sampled_from(["m.safetensors", "plain.pth", "d.npz", "one.png", "t10k-images-idx3-ubyte"]),
    st.floats(0, 1),
    st.sampled_from(["cut", "flip", "zero", "grow"]),
)


def damaged(folder: Path, damage: tuple[str, float, str]) -> str:
    """The name of a file that is not what it was."""
    name, where, how = damage
    content = bytearray((folder / name).read_bytes())
    at = min(int(where**3 * len(content)), len(content) - 1)  # more often in the header
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at] ^= 0xFF
    elif how == "zero":
        content[at : at + 64] = bytes(64)
    else:
        content[at:at] = b"\xff" * 1000
    target = folder / f"damaged{Path(name).suffix}"
    if target.suffix:
        target.write_bytes(content)
        return target.name
    (folder / "damaged-images-idx3-ubyte").write_bytes(content)
    return "damaged-images-idx3-ubyte"


def check(folder: Path, line: list[str], damage: tuple[str, float, str] | None) -> None:
    """Runs a command line as `tarflow-fast` would, with a damaged file in the place of its own."""
    if damage is not None:
        broken = damaged(folder, damage)
        for flag in ("-m", "--data"):
            if flag in line and not broken.endswith(".png"):
                line = [broken if i and line[i - 1] == flag else word for i, word in enumerate(line)]
                break
    if "--resume" in line:
        shutil.copytree(folder / TRAINED, folder / "run", dirs_exist_ok=True)
    started = time.monotonic()
    result = CliRunner().invoke(main, line, prog_name="tarflow-fast")
    said = f"{line}\n{result.exit_code}\n{result.output}\n{result.exception!r}"
    assert time.monotonic() - started < SECONDS, said
    assert result.exit_code in EXIT_CODES, said
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(said) from result.exception
    assert "Traceback" not in result.output, said
    if result.exit_code == 1:
        errors = [text for text in result.stderr.splitlines() if text.startswith("Error: ")]
        assert len(errors) == 1, said
    check_words(main.commands[line[0]], result.exit_code, result.stderr, said)
    shown = set(result.output) - set("\n\r")
    assert all(c.isprintable() for c in shown), said + repr(shown)
    if "--json" in line and result.exit_code == 0:
        json.loads(result.stdout)
    assert not list(folder.glob(".tarflow-*")), said
    for made in [*folder.glob("out*"), *folder.glob("samples*"), folder / "run", folder / "made"]:
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)


def check_words(command: click.Command, code: int, stderr: str, said: str) -> None:
    """What is said names flags as they are typed; the fault of an option that is not a file's is wrong usage."""
    options = {flag: param for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    lines = [text for text in stderr.splitlines() if text.startswith(("Error: ", "Warning: "))]
    for text in lines:
        python = "|".join(name for name in {param.name for param in command.params} if name and "_" in name)
        assert re.search(r"(?<![^\s(])\w+=('|True|False|None)", text) is None, said
        assert not python or re.search(rf"(?<![^\s(])({python})(?![\w:/.=])", text) is None, said
    if code == 1:
        named = re.match(r"Error: (--?[a-z][\w-]*|[a-z]\w*): expected", lines[-1])
        param = None if named is None else options.get(named[1])
        assert named is None or (isinstance(param, Option) and param.outside), said
    if code == 2:
        parts = [
            "Missing argument",
            "unexpected extra argument",
            "No such option",
            "SOURCE",
            "TARGET",
            "FILE",
            "IMAGES",
            "DATA",
        ]
        named = re.search(rf"(?<![\w-])({'|'.join([*options, *parts])})(?![\w-])", lines[-1])
        assert named is not None, said


def untouched(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith("damaged")}


@pytest.mark.parametrize("command", list(BASES))
def test_the_base_of_each_command_works(inside: Path, command: str) -> None:
    if command == "resume":
        shutil.copytree(inside / TRAINED, inside / "run")
    result = CliRunner().invoke(main, BASES[command], prog_name="tarflow-fast")
    assert result.exit_code == 0, result.output
    check(inside, BASES[command], None)


relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("command", list(BASES))
@settings(relaxed, max_examples=40)
@given(data=st.data())
def test_any_command_line_ends_as_it_should(inside: Path, command: str, data: st.DataObject) -> None:
    check(inside, data.draw(command_lines(command)), data.draw(damages))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", list(BASES))
@settings(relaxed, max_examples=800)
@given(data=st.data())
def test_many_command_lines_end_as_they_should(inside: Path, command: str, data: st.DataObject) -> None:
    check(inside, data.draw(command_lines(command)), data.draw(damages))
