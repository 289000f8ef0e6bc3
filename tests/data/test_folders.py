"""Folders as people have them: halves, junk, wrapping folders; and what is read by all cores into one array."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from remarks import Remarks

from tarflow_fast.data import load as load_module
from tarflow_fast.data import load_images
from tarflow_fast.data import store as store_module
from tarflow_fast.data.folders import find_pictures
from tarflow_fast.data.store import Store
from tarflow_fast.errors import ArgumentError, DataError


def fill(root: Path, *names: str) -> None:
    """A picture for each name; its grey level is its place in the list."""
    for level, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(path, "PNG")


def levels(root: Path, split: str = "train") -> tuple[list[int], list[int] | None, tuple[str, ...] | None]:
    data = load_images(root, size=4, channels=1, split=split)
    return data.images[:, 0, 0, 0].tolist(), None if data.labels is None else data.labels.tolist(), data.class_names


@pytest.mark.parametrize(
    ("first", "second"), [("train", "val"), ("train", "valid"), ("Train", "Validation"), ("training", "testing")]
)
def test_halves_are_never_classes(tmp_path: Path, first: str, second: str) -> None:
    fill(tmp_path, f"{first}/a/1.png", f"{first}/b/1.png", f"{second}/a/1.png", f"{second}/b/1.png")
    assert levels(tmp_path) == ([0, 1], [0, 1], ("a", "b"))
    assert levels(tmp_path, "test") == ([2, 3], [0, 1], ("a", "b"))


def test_halves_without_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "train/2.png", "val/1.png", "test/1.png")
    assert levels(tmp_path) == ([0, 1], None, None)
    assert levels(tmp_path, "val") == ([2], None, None)
    assert levels(tmp_path, "test") == ([3], None, None)


def test_val_serves_as_test_and_says_so(tmp_path: Path, remarks: Remarks) -> None:
    fill(tmp_path, "train/1.png", "val/1.png", "notes/1.png")
    assert levels(tmp_path, "test") == ([1], None, None)
    assert "is taken for the test half" in "\n".join(remarks.messages)
    assert "passed over 'notes'" in "\n".join(remarks.messages)


def test_a_half_that_is_not_there(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "test/a/1.png")
    with pytest.raises(DataError, match="no val half beside"):
        levels(tmp_path, "val")
    fill(tmp_path, "val/a/1.png", "valid/a/1.png")
    with pytest.raises(DataError, match="which is its val half"):
        levels(tmp_path, "val")


def test_train_may_be_a_class(tmp_path: Path) -> None:
    """Cars, planes and trains."""
    fill(tmp_path, "car/1.png", "plane/1.png", "train/1.png")
    assert levels(tmp_path) == ([0, 1, 2], [0, 1, 2], ("car", "plane", "train"))


def test_junk_is_counted_in_one_line(tmp_path: Path, remarks: Remarks) -> None:
    fill(tmp_path, "a/1.png", "b/1.JFIF")
    for name in ("a/Thumbs.db", "a/.DS_Store", "b/notes.txt", "b/.tarflow-0123456789abcdef.png", "desktop.ini"):
        (tmp_path / name).write_text("junk")
    for name in ("__MACOSX", "@eaDir", ".git", "b/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "__MACOSX" / "._1.png").write_text("junk")
    assert levels(tmp_path) == ([0, 1], [0, 1], ("a", "b"))
    assert len(remarks.messages) == 1
    assert "skipped 9 files or folders" in "\n".join(remarks.messages)


@pytest.mark.parametrize("name", ["1.heic", "1.CR2", "1.svg"])
def test_pictures_that_are_not_read_are_not_skipped(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "a/1.png")
    (tmp_path / "a" / name).touch()
    with pytest.raises(DataError, match="a kind of picture that is not read"):
        levels(tmp_path)


def test_pictures_beside_folders_of_them(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "empty").mkdir()
    assert levels(tmp_path) == ([0, 1], None, None)
    fill(tmp_path, "a/1.png")
    with pytest.raises(DataError, match="pictures of its own"):
        levels(tmp_path)
    fill(tmp_path / "halves", "1.png", "train/1.png", "val/1.png")
    with pytest.raises(DataError, match="beside its halves"):
        levels(tmp_path / "halves")


def test_nested_folders(tmp_path: Path, remarks: Remarks) -> None:
    """Pictures further down are of the class; a folder that wraps everything is none."""
    fill(tmp_path / "x" / "archive", "a/1.png", "a/more/2.png", "b/deep/er/3.png")
    wanted = ([0, 1, 2], [0, 0, 1], ("a", "b"))
    assert levels(tmp_path / "x" / "archive") == wanted
    assert not remarks.messages
    assert levels(tmp_path) == wanted
    assert "is the only folder" in "\n".join(remarks.messages)
    fill(tmp_path / "y" / "archive", "train/a/1.png", "test/a/1.png")
    assert levels(tmp_path / "y", "test") == ([1], [0], ("a",))


def test_links_in_a_circle(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
    with pytest.raises(DataError, match="without end"):
        levels(tmp_path)


def test_classes_in_one_unicode_form(tmp_path: Path) -> None:
    fill(tmp_path, "cafe\u0301/1.png", "tea/1.png")
    assert levels(tmp_path)[2] == ("caf\u00e9", "tea")


def test_order_is_that_of_names(tmp_path: Path) -> None:
    fill(tmp_path, *(f"a/{i}.png" for i in range(30)))
    assert [int(Path(p).stem) for p in find_pictures(tmp_path, "train").paths] == sorted(range(30), key=str)


def test_reading_by_threads_is_in_order_and_names_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, *(f"a/{i:03d}.png" for i in range(200)))
    monkeypatch.setattr(load_module, "own_cores", lambda: 4)
    assert levels(tmp_path)[0] == list(range(200))
    for i in (31, 40, 150):
        (tmp_path / "a" / f"{i:03d}.png").write_text("broken")
    before = threading.active_count()
    with pytest.raises(DataError, match=r"031\.png"):
        levels(tmp_path)
    assert threading.active_count() == before


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, "a/1.png", "a/2.png")
    load_images(tmp_path, size=4)
    assert capsys.readouterr() == ("", "")
    load_images(tmp_path, size=4, progress=True)
    assert re.search(r"reading: +0%\| *\| 0/2", capsys.readouterr().err)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The arrays that stores have made."""
    arrays = []
    plain = Store.empty

    def empty(store: Store, *how: object) -> np.ndarray:
        arrays.append(plain(store, *how))  # type: ignore[arg-type]
        return arrays[-1]

    monkeypatch.setattr(Store, "empty", empty)
    return arrays


def test_pixels_are_made_once(tmp_path: Path, made: list[np.ndarray]) -> None:
    """The tensor is the array into which pictures are read."""
    fill(tmp_path, "a/1.png", "b/1.png")
    data = load_images(tmp_path, size=4)
    assert [data.images.data_ptr()] == [array.ctypes.data for array in made]


def test_more_than_memory_is_mapped(
    tmp_path: Path, made: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, remarks: Remarks
) -> None:
    fill(tmp_path / "data", *(f"a/{i}.png" for i in range(9)))
    np.savez(tmp_path / "x.npz", images=np.arange(9, dtype=np.uint8).repeat(16).reshape(9, 4, 4))
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in (tmp_path / "data", tmp_path / "x.npz"):
        plain = load_images(path, size=4, channels=1, cache=cache)
        assert not isinstance(made[-1], np.memmap)
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "free_memory", lambda _: 100)
            mapped = load_images(path, size=4, channels=1, cache=cache)
        assert isinstance(made[-1], np.memmap)
        assert mapped.fingerprint == plain.fingerprint
        assert f"file in {str(cache)!r}" in "\n".join(remarks.messages)
        assert not list(cache.iterdir())  # nothing stays behind, whenever the process ends


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no room for"):
        Store(tmp_path, mapped=True).empty((1 << 60,), np.uint8)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArgumentError, match="cache"):
        load_images(tmp_path, size=4, cache=tmp_path / "absent")


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    dead = tmp_path / ".tarflow-0123456789abcdef.pixels"
    dead.write_bytes(b"of a process that is no more")
    mine = tmp_path / "images.pixels"
    mine.write_bytes(b"of the user")
    store = Store(tmp_path, mapped=True)
    store.empty((4,), np.uint8)
    assert not dead.exists()
    assert store.path is not None
    other = Store(tmp_path, mapped=True)
    other.empty((4,), np.uint8)
    assert store.path.exists()  # its process lives
    store.close()
    other.close()
    assert list(tmp_path.iterdir()) == [mine]
