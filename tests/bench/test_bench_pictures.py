"""`bench pictures`: what is compared, and the suite from end to end on a few small pictures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_in import bench

from bench.common import record
from bench.common.decoding import decode_all
from bench.suites import pictures
from bench.suites.pictures import SUITE, THREADS, by_load_images, by_open_images, verdict, write_pictures

NAMES = [THREADS, pictures.PROCESSES, "load_images", "open_images", "training_images"]


def test_the_verdict_is_on_the_slowest_of_ours_and_the_best_of_pillow() -> None:
    times = ([3.0, 8.0, 6.0], [6.0, 4.0, 9.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.5, 1.5, 1.5])
    cell = {"label": {"size": 32}, "runs": [{"name": n, "seconds": t} for n, t in zip(NAMES, times, strict=True)]}
    assert verdict(cell) == (
        "32 x 32 pixels: ours are at least as fast: open_images, the slowest, 2.00 times as fast as Pillow's best"
    )
    cell["runs"][4]["seconds"] = [5.0, 5.0, 5.0]  # type: ignore[index]
    assert verdict(cell).startswith("32 x 32 pixels: ours are slower: training_images, the slowest, 0.80 times")


@pytest.fixture(autouse=True)
def threads_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, as a new process would import all that pytest has."""

    def pool(workers: int, **_: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(pictures, "ProcessPoolExecutor", pool)


def test_all_read_the_same_pixels(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", 9, 12, 0)
    paths = [str(path) for path in sorted((tmp_path / "a").iterdir())]
    wanted = [int(np.asarray(Image.open(path))[0].astype(int).sum()) for path in paths]
    assert len(set(wanted)) == 9
    with ThreadPoolExecutor(2) as pool:
        assert decode_all(pool, paths, 4) == wanted
    assert (
        by_load_images(str(tmp_path / "a"), 12).tolist() == by_open_images(str(tmp_path / "a"), 12).tolist() == wanted
    )


def test_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    result = bench("pictures", "--count", 5, "--size", 8, "--size", 12, "--repeat", 2, "--out", out)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert [cell["label"] for cell in made["cells"]] == [{"pictures": 5, "size": 8}, {"pictures": 5, "size": 12}]
    assert [[run["name"] for run in cell["runs"]] for cell in made["cells"]] == [NAMES, NAMES]
    assert SUITE.table(made) in result.output
    assert [line.partition(":")[0] for line in result.output.splitlines() if "Pillow's best" in line] == [
        "8 x 8 pixels",
        "12 x 12 pixels",
    ]
    (axes,) = SUITE.figure(made).axes
    ratios = [run["ratio"]["median"] for cell in made["cells"] for run in cell["runs"][1:]]
    assert [bar.get_height() for bar in axes.patches] == ratios
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()


def test_other_pixels_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pictures.by_open_images
    monkeypatch.setattr(pictures, "by_open_images", lambda folder, size: plain(folder, size) + 1)
    result = bench("pictures", "--count", 5, "--size", 8, "--repeat", 1, "--out", tmp_path / "run.json")
    assert result.exit_code == 1
    assert "open_images: differs by 1.0e+00" in result.output
