"""What the shards of a run hold, in each of the formats."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from PIL import Image

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError
from tarflow_fast.images import to_uint8
from tarflow_fast.sampling.sharded import FORMATS, draw_shards
from tarflow_fast.sampling.sharded.formats import UNLABELLED, class_folders

NAMES = ["cat", "Dog", "t-shirt/top"]
LABELS = [2, 0, -1, 1]
N, SIZE, FIRST = 11, 4, 3
HOW: dict[str, Any] = {"seed": 5, "first": FIRST}


@pytest.fixture(scope="module")
def sampler() -> tff.Sampler:
    model = random_model(in_channels=3, num_classes=3)
    model.metadata = {"class_names": NAMES, "noise_std": 0.1}
    return tff.Sampler(model, solver="sequential")


@pytest.fixture(scope="module")
def expected(sampler: tff.Sampler) -> tff.Samples:
    return sampler.sample(N, LABELS, denoise=True, **HOW)


def draw(sampler: tff.Sampler, out: Path, format: str, **how: Any) -> dict[str, Any]:
    return draw_shards(
        sampler, out, N, LABELS, format=format, shard_size=SIZE, batch_size=3, **{**HOW, "denoise": True, **how}
    )


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def pixels(expected: tff.Samples) -> np.ndarray:
    return to_uint8(expected.images).permute(0, 2, 3, 1).numpy()


def assert_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    """Batches of another size may round otherwise, where a value lies between two levels."""
    assert found.dtype == np.uint8
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (found != wanted).mean() < 1e-3


def test_npz_is_what_the_evaluation_suite_of_adm_reads(
    sampler: tff.Sampler, expected: tff.Samples, tmp_path: Path
) -> None:
    draw(sampler, tmp_path, "npz")
    files = [arrays(path) for path in sorted(tmp_path.glob("*.npz"))]
    assert [list(file) for file in files] == [["arr_0", "arr_1", "log_prob"]] * 3
    assert [len(file["arr_0"]) for file in files] == [4, 4, 3]
    assert_alike(np.concatenate([file["arr_0"] for file in files]), pixels(expected))
    assert expected.labels is not None
    assert expected.log_prob is not None
    assert np.concatenate([file["arr_1"] for file in files]).tolist() == expected.labels.tolist()
    nats = np.concatenate([file["log_prob"] for file in files])
    np.testing.assert_allclose(nats, expected.log_prob.numpy(), rtol=1e-5, atol=1e-3)


def test_png_folders_are_read_as_classes(sampler: tff.Sampler, expected: tff.Samples, tmp_path: Path) -> None:
    draw(sampler, tmp_path, "png")
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"cat", "Dog", "t-shirt_top", UNLABELLED}
    rows = [row for path in sorted(tmp_path.glob("*.csv")) for row in table(path)]
    assert [int(row["number"]) for row in rows] == list(range(FIRST, FIRST + N))
    assert expected.labels is not None
    assert [int(row["label"]) for row in rows] == expected.labels.tolist()
    found = []
    for row in rows:
        content = (tmp_path / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        with Image.open(io.BytesIO(content)) as image:
            found.append(np.asarray(image))
            facts = json.loads(image.info["tarflow_fast"])
        assert (facts["number"], facts["log_prob"]) == (int(row["number"]), float(row["log_prob"]))
    assert_alike(np.stack(found), pixels(expected))
    data = tff.load_images(tmp_path / "images", size=8)
    assert data.class_names is not None
    assert set(data.class_names) == {"cat", "Dog", "t-shirt_top", UNLABELLED}
    assert len(data.images) == N


def test_tar_is_a_web_dataset(sampler: tff.Sampler, expected: tff.Samples, tmp_path: Path) -> None:
    draw(sampler, tmp_path, "tar")
    found, labels, nats = [], [], []
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as archive:
            content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for key in dict.fromkeys(name.split(".")[0] for name in content):
            with Image.open(io.BytesIO(content[f"{key}.png"])) as image:
                found.append(np.asarray(image))
            labels.append(int(content[f"{key}.cls"]))
            facts = json.loads(content[f"{key}.json"])
            assert (facts["number"], facts["label"]) == (int(key), labels[-1])
            nats.append(facts["log_prob"])
    assert_alike(np.stack(found), pixels(expected))
    assert expected.labels is not None
    assert expected.log_prob is not None
    assert labels == expected.labels.tolist()
    np.testing.assert_allclose(nats, expected.log_prob.numpy(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_guided_images_have_no_log_prob(sampler: tff.Sampler, tmp_path: Path, format: str) -> None:
    draw(sampler, tmp_path, format, guidance=1.5)
    if format == "npz":
        assert list(arrays(tmp_path / "00000.npz")) == ["arr_0", "arr_1"]
    elif format == "png":
        assert {row["log_prob"] for row in table(tmp_path / "00000.csv")} == {""}
    else:
        with tarfile.open(tmp_path / "00000.tar") as archive:
            facts = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]  # type: ignore[arg-type]
        assert len(facts) == SIZE
        assert all("log_prob" not in each for each in facts)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_without_classes(tmp_path: Path, format: str) -> None:
    sampler = tff.Sampler(random_model(), solver="sequential")
    draw_shards(sampler, tmp_path, 5, format=format, shard_size=3)
    if format == "npz":
        found = arrays(tmp_path / "00000.npz")
        assert list(found) == ["arr_0", "log_prob"]
        assert found["arr_0"].shape == (3, 8, 8, 1)
    elif format == "png":
        assert len(list((tmp_path / "images" / UNLABELLED).glob("*.png"))) == 5
    else:
        with tarfile.open(tmp_path / "00001.tar") as archive:
            assert {name.split(".")[1] for name in archive.getnames()} == {"png", "json"}


def test_sequences_are_floats(tmp_path: Path) -> None:
    model = tff.TarFlow.for_tokens(4, 3, 64, num_blocks=2, layers_per_block=1, num_classes=0)
    sampler = tff.Sampler(model, solver="sequential")
    draw_shards(sampler, tmp_path / "a", 5, shard_size=3, batch_size=3)
    whole = np.concatenate([arrays(path)["arr_0"] for path in sorted((tmp_path / "a").glob("*.npz"))])
    assert (whole.shape, whole.dtype) == ((5, 4, 3), np.float32)
    torch.testing.assert_close(torch.from_numpy(whole), sampler.sample(5, batch_size=3).images)
    for format in ("png", "tar"):
        with pytest.raises(ArgumentError, match="format: expected 'npz' for what is no picture"):
            draw_shards(sampler, tmp_path / "b", 5, format=format)
    assert not (tmp_path / "b").exists()


def test_folders_of_classes() -> None:
    assert class_folders(2, ["a", "b c"]) == ["a", "b c"]
    assert class_folders(2, ['a/"b', "c."]) == ["a__b", "c"]
    for names in ([], ["a", "A"], ["a/", "a:"], ["a", ""], ["a", ".b"], ["con", "b"], ["a", UNLABELLED], ["..", "b"]):
        assert class_folders(2, names) == ["0", "1"], names
    assert class_folders(1000, ["a"])[7] == "007"
