"""`--features FOLDER`: features are kept, by any number of processes, and what they tell is what one process tells."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command_lines import Run
from PIL import Image
from torch import Tensor

from tarflow_fast.cli import main
from tarflow_fast.evaluation import Features, Gaussian, Inception
from tarflow_fast.sampling.sharded.job import MANIFEST

N = 33
Line = tuple[object, ...]
STATS: Line = ("prepare-stats", "data", "--size", 8, "--batch-size", 4)
FID: Line = ("fid", "data", "--size", 8, "--batch-size", 4, "--stats", "s.npz", "--reference", "other.npz")
FID += ("--all", "--json")
TUNE: Line = ("tune", "-m", "m.safetensors", "--stats", "s.npz", "-n", 30, "--guidance", "0,1.5")
TUNE += ("--denoise-scale", "0,1", "--solver", "sequential", "--batch-size", 4, "--json")


class Small:
    """A small extractor, whose process is killed in its call of that number."""

    device, name = torch.device("cpu"), "small"
    left = -1

    def __init__(self, weights: Any = None, *, device: Any = "cpu", download: bool = False):
        assert not download

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(images).pooled

    def features(self, images: Tensor) -> Features:
        if Small.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Small.left -= 1
        x = images.expand(-1, 3, -1, -1).float() / 255
        return Features(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), x[:, :, :2, :2].flatten(1), 4 * x.std((2, 3)))


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Small)
    monkeypatch.setattr("tarflow_fast.evaluation.feature_shards.SHARD_SIZE", 8)
    monkeypatch.setattr("tarflow_fast.evaluation.tuning.SHARD_SIZE", 8)
    monkeypatch.setattr("tarflow_fast.evaluation.feature_shards.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("tarflow_fast.sampling.sharded.run.LOOK_SECONDS", 0.01)
    rng = np.random.default_rng(0)
    Path("data").mkdir()
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (10, 9 + i % 3, 3), dtype=np.uint8)).save(f"data/{i:02d}.png")
    np.savez("other.npz", images=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    Gaussian(torch.full((6,), 0.4).double(), 0.1 * torch.eye(6).double()).save("s.npz")
    return command_line


def told(text: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(text)
    assert facts.pop("seconds") > 0
    return facts


def left_over() -> list[str]:
    return [str(path) for path in Path("kept").rglob(".*")]


def test_one_process_tells_the_same_with_a_folder(run: Run) -> None:
    for line in (FID, TUNE):
        wanted = told(run(*line).stdout)
        for _ in range(2):
            assert told(run(*line, "--features", "kept").stdout) == wanted
        shutil.rmtree("kept")
    run(*STATS, "--out", "one.npz")
    run(*STATS, "--out", "two.npz", "--features", "kept")
    assert Path("one.npz").read_bytes() == Path("two.npz").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("line", [FID, STATS, TUNE], ids=lambda line: line[0])
def test_killed_processes_tell_what_one_does(run: Run, line: Line, world: int) -> None:
    """To the bit, as the first process adds up features in the order of the images."""
    from runs import fork

    out = ("--out", "one.npz") if line is STATS else ()
    wanted = run(*line, *out).stdout

    def action(killed: int) -> Callable[[], object]:
        def act() -> None:
            Small.left = killed
            out = ("--out", "many.npz") if line is STATS else ()
            result = CliRunner().invoke(main, [*map(str, (*line, *out)), "--features", "kept"])
            assert result.exit_code == 0, result.output
            rank = int(os.environ["RANK"])
            assert rank == 0 or result.stdout == ""
            Path(f"told-{rank}").write_text(result.stdout)

        return act

    for killed in (3, 1, -1):
        ends = [fork(action(killed), {"RANK": str(rank), "WORLD_SIZE": str(world)}) for rank in range(world)]
        codes = {child.wait() for child in ends}
        assert codes <= {0, -signal.SIGKILL}, [child.text for child in ends]
        assert killed < 0 or -signal.SIGKILL in codes
    assert codes == {0}
    if line is STATS:
        assert Path("many.npz").read_bytes() == Path("one.npz").read_bytes()
    else:
        assert told(Path("told-0").read_text()) == told(wanted)
    assert left_over() == []


def test_what_is_kept_is_not_computed_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [FID, (*STATS, "--out", "a.npz"), TUNE]
    wanted = [run(*line, "--features", f"kept/{line[0]}").stdout for line in lines]
    monkeypatch.setattr(Small, "features", None)
    for line, text in zip(lines, wanted, strict=True):
        found = run(*line, "--features", f"kept/{line[0]}").stdout
        assert line[0] == "prepare-stats" or told(found) == told(text)
    assert run("fid", f"kept/{FID[0]}/images", "--save", "again.npz").stdout.startswith("again.npz: statistics of 33")


def test_another_guidance_is_added_to_a_sweep(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = [*TUNE]
    longer[longer.index("0,1.5")] = "0,1.5,3"
    wanted = told(run(*longer).stdout)
    run(*TUNE, "--features", "kept")
    before = {path: path.read_bytes() for path in Path("kept").rglob("*") if path.is_file()}
    assert told(run(*longer, "--features", "kept").stdout) == wanted
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(Path("kept").glob(f"guidance-*/{MANIFEST}"))) == 3


def test_another_run_is_refused(run: Run) -> None:
    run(*FID, "--features", "kept/fid")
    run(*TUNE, "--features", "kept/tune")
    for line, folder, code, message in (
        ((*FID, "--batch-size", 3), "kept/fid", 1, "--features: expected a new folder, or --batch-size 4, with which"),
        (("fid", "other.npz", "--stats", "s.npz"), "kept/fid", 1, "--features: expected a new folder, or"),
        ((*TUNE, "--seed", 1), "kept/tune", 1, "--features: expected a new folder, or seed 0, with which"),
        ((*TUNE, "--denoise-scale", "0,2"), "kept/tune", 1, "at denoising rates 0.0, 1.0', with which"),
        ((*STATS, "--out", "a.npz"), "data", 2, "--features: expected a new or empty folder"),
        (FID, "data", 2, "--features: expected a new or empty folder, or that of the same command, got 'data', which"),
        (TUNE, "data", 2, "--features: expected a new or empty folder"),
        (FID, "s.npz", 2, "--features: expected a folder that can be written to"),
    ):
        text = " ".join(run(*line, "--features", folder, code=code).stderr.split())
        assert message in text, line


def test_several_processes_need_a_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for line in (FID, (*STATS, "--out", "a.npz"), TUNE):
        assert "--features: 2 processes divide the work by a folder that they share" in run(*line, code=2).stderr


def test_paths_are_told_before_weights_are_read(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(*_: Any, **how: Any) -> None:
        raise AssertionError("weights are read")

    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Inception)
    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", none)
    monkeypatch.setattr("torch.hub.download_url_to_file", none)
    Path("w.pth").write_bytes(b"weights")
    weights = ("--inception", "w.pth")
    Gaussian(torch.zeros(2).double(), torch.eye(2).double()).save("s2.npz")
    for line, code, message in (
        (("fid", "none", "--stats", "s.npz", *weights), 1, "'none': no such file or folder"),
        (("fid", "data", "--stats", "s.npz", *weights), 2, "--size: expected"),
        (("fid", "data", "--size", 8, "--stats", "none.npz", *weights), 1, "'none.npz': no such file"),
        (("fid", "data", "--size", 8, "--reference", "none", *weights), 1, "'none': no such file or folder"),
        (("fid", "data", "--size", 8, "--stats", "s.npz", "--save", "no/a.npz", *weights), 2, "--save: expected"),
        (("fid", "data", "--size", 8, "--stats", "s.npz", "--features", "data", *weights), 2, "--features: expected"),
        (("prepare-stats", "none", "--size", 8, "--out", "a.npz", *weights), 1, "'none': no such folder"),
        (("prepare-stats", "data", "--size", 8, "--out", "no/a.npz", *weights), 2, "--out: expected"),
        (("tune", "--stats", "none.npz", *weights), 1, "'none.npz': no such file"),
        (("tune", "-m", "none.pth", "--stats", "s.npz", *weights), 1, "none.pth: no such file"),
        ((*TUNE[:-1], "--labels", "zebra", *weights), 2, "--labels"),
        ((*TUNE[:-1], "--guidance", "1,1", *weights), 2, "--guidance: expected"),
        (("sample", "-m", "plain.pth", "--labels", "0", "--out", "f", "--shards", "features", *weights), 2, "--labels"),
        (("sample", "--out", "data", "--shards", "features", *weights), 2, "--out: expected a new or empty folder"),
        (("sample", "--out", "f", "--shards", "features", "--inception", "no.pth"), 1, "no such file as 'no.pth'"),
        (("fid", "data", "--size", 8, "--stats", "s.npz", "--inception", "no.pth"), 1, "no such file as 'no.pth'"),
    ):
        assert message in " ".join(run(*line, code=code).stderr.split()), line


def test_weights_are_downloaded_where_that_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Told(Small):
        def __init__(self, weights: Any = None, *, device: Any = "cpu", download: bool = False):
            asked.append({"weights": weights, "download": download})

    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Told)
    for given in ((), ("--inception", "download"), ("--inception", "./download")):
        run(*STATS, "--out", "a.npz", *given)
    assert [each["download"] for each in asked] == [False, True, False]
    assert [each["weights"] for each in asked] == [None, None, "./download"]
