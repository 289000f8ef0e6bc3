"""`tarflow-fast sample --out FOLDER` draws shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sample_runs import NAMES, Run, numbers

from tarflow_fast.cli.shards import wants_shards


@pytest.mark.parametrize(
    ("out", "folder"),
    [
        (None, False),
        ("a.png", False),
        ("none/a.jpg", False),
        ("a.tiff", False),
        ("a", True),
        ("a/b", True),
        ("v1.5/", True),
        (".", True),
        ("there.png", True),
    ],
)
def test_what_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None, folder: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.png").mkdir()
    assert wants_shards({"out": out}) is folder


def test_shards_are_what_npz_holds(run: Run) -> None:
    result = run("-n", 8, "--out", "d", "--shard-size", 3, "--seed", 4, "--labels", "shark,7")
    assert "d: 8 images of 4×4 in 3 shards (npz), unguided, denoised" in result.stdout
    assert "this process drew 8 of them" in result.stdout
    assert "classes: shark, 7 in turn" in result.stdout
    assert "manifest.json" in result.stdout
    assert result.stderr == ""
    run("-n", 8, "--no-grid", "--npz", "s.npz", "--seed", 4, "--labels", "shark,7")
    whole, parts = numbers(), [numbers(f"d/0000{i}.npz") for i in range(3)]
    assert np.concatenate([part["arr_1"] for part in parts]).tolist() == whole["labels"].tolist() == [2, 1] * 4
    levels = (np.clip(whole["images"], -1, 1) + 1) * 127.5
    drawn = np.concatenate([part["arr_0"] for part in parts]).transpose(0, 3, 1, 2)
    assert np.abs(drawn - levels).max() < 0.51
    nats = np.concatenate([part["log_prob"] for part in parts])
    np.testing.assert_allclose(nats, whole["log_prob"], rtol=1e-5, atol=1e-3)


def test_the_same_command_goes_on_and_another_one_is_refused(run: Run) -> None:
    run("-n", 8, "--out", "d", "--shard-size", 3)
    assert "this process drew 0 of them" in run("-n", 8, "--out", "d", "--shard-size", 3).stdout
    message = run("-n", 8, "--out", "d", "--shard-size", 3, "--seed", 1, code=1).stderr
    assert message == "Error: --out: expected a new folder, or seed 0, with which 'd' was begun, got 1\n"


def test_labels_of_a_file(run: Run) -> None:
    np.savez("numbers.npz", arr_1=np.array([2, 0, 1, 1]))
    np.savez("names.npz", labels=np.array([NAMES[2], NAMES[0], NAMES[1], NAMES[1]]))
    np.savez("none.npz", images=np.zeros(3))
    for name in ("numbers", "names"):
        run("-n", 4, "--out", name, "--labels", f"@{name}.npz")
        assert numbers(f"{name}/00000.npz")["arr_1"].tolist() == [2, 0, 1, 1]
    assert "labels or arr_1" in run("-n", 4, "--labels", "@none.npz", code=2).stderr
    Path("bad.npz").write_text("no archive")
    assert "'bad.npz' is no .npz file" in run("-n", 4, "--labels", "@bad.npz", code=2).stderr
    run("-n", 4, "--out", "balanced", "--labels", "balanced")
    assert numbers("balanced/00000.npz")["arr_1"].tolist() == [0, 1, 2, 0]


def test_json_and_quiet(run: Run) -> None:
    facts = json.loads(run("-n", 4, "--out", "d", "--json").stdout)
    assert (facts["out"], facts["images"], facts["shards"], facts["drawn"]) == ("d", 4, 1, 4)
    assert facts["report"]["solver"] == "sequential"
    assert run("-n", 4, "--out", "e", "--quiet").output == ""


def test_only_the_first_process_prints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run("-n", 4, "--out", "d").output == ""
    assert Path("d/manifest.json").exists()


def test_dry_run_prints_what_it_takes(run: Run) -> None:
    lines = run("-n", 5000, "--out", "d", "--dry-run").stdout.splitlines()
    assert lines[0] == "d: 5000 images are left to draw; nothing was written"
    assert [line.split(":")[0] for line in lines] == ["d", "time", "memory", "disk"]
    assert not Path("d").exists()
    facts = json.loads(run("-n", 5000, "--out", "d", "--dry-run", "--json").stdout)
    assert facts["images_left"] == 5000


def test_a_latent_model_has_npz_shards_alone(run: Run) -> None:
    run("-n", 2, "--out", "d", model="latent.safetensors")
    assert numbers("d/00000.npz")["arr_0"].shape == (2, 4, 4, 4)
    message = run("-n", 2, "--out", "e", "--shards", "png", model="latent.safetensors", code=2).stderr
    assert "--shards: expected 'npz' for what is no picture of 1 or 3 channels" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "d", "--columns", 2), "--columns has no effect where --out is a folder"),
        (("--out", "d", "--npz", "s.npz"), "--npz has no effect where --out is a folder"),
        (("--out", "d", "--no-grid"), "--out and --no-grid exclude each other"),
        (("--shards", "tar"), "--shards has no effect where --out is no folder"),
        (("--out", "g.png", "--dry-run"), "--dry-run has no effect where --out is no folder"),
        (("--shard-size", 4), "--shard-size has no effect where --out is no folder"),
        (("--out", "m.safetensors/d"), "--out: expected a folder that can be written to"),
        (("--out", "."), "--out: expected a new or empty folder, or that of the same run"),
    ],
)
def test_refusals(run: Run, options: tuple[object, ...], message: str) -> None:
    result = run("-n", 2, *options, code=2)
    assert message in " ".join(result.stderr.split())
    assert not Path("d").exists()
