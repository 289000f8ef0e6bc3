"""Pictures: 8-bit conversion, grids, PNG and GIF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tarflow_fast.errors import ArgumentError
from tarflow_fast.images import PAD_VALUE, check_path, grid, save_gif, save_grid, save_png, to_uint8


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def random_images(count: int, ch: int = 1, height: int = 4, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, ch, height, width, generator=generator) * 2 - 1


class TestToUint8:
    def test_known_values(self) -> None:
        x = torch.tensor([-9.0, -1.0, 0.0, 0.25, 1.0, 9.0, 1e38])
        assert to_uint8(x).tolist() == [0, 0, 128, 159, 255, 255, 255]

    def test_inverts_the_8_bit_scale(self) -> None:
        v = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(v / 127.5 - 1), v)
        assert torch.equal(to_uint8(v), v)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        x = torch.tensor([-1.0, 0.5, 1.0], dtype=dtype, requires_grad=True)
        assert to_uint8(x).tolist() == [0, 191, 255]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite(self, bad: float) -> None:
        with pytest.raises(ArgumentError, match="finite"):
            to_uint8(torch.tensor([0.0, bad]))

    @pytest.mark.parametrize("bad", [torch.zeros(2, dtype=torch.int64), [0.0], None])
    def test_not_images(self, bad: object) -> None:
        with pytest.raises(ArgumentError, match="images"):
            to_uint8(bad)  # type: ignore[arg-type]


class TestGrid:
    @given(
        count=st.integers(1, 7),
        ch=st.sampled_from([1, 3]),
        columns=st.none() | st.integers(1, 8),
        pad=st.integers(0, 3),
        scale=st.integers(1, 3),
    )
    def test_every_image_is_where_it_belongs(
        self, count: int, ch: int, columns: int | None, pad: int, scale: int
    ) -> None:
        images = random_images(count, ch)
        sheet = grid(images, columns, pad, scale)
        across = columns or int(np.ceil(np.sqrt(count)))
        down = -(-count // across)
        high, wide = 4 * scale, 5 * scale
        assert sheet.dtype == np.uint8
        assert sheet.shape == (down * (high + pad) + pad, across * (wide + pad) + pad, ch)
        rest = sheet.copy()
        for i, image in enumerate(to_uint8(images).numpy()):
            top, left = pad + (i // across) * (high + pad), pad + (i % across) * (wide + pad)
            cell = sheet[top : top + high, left : left + wide]
            enlarged = np.kron(image, np.ones((1, scale, scale), dtype=np.uint8))
            np.testing.assert_array_equal(cell.transpose(2, 0, 1), enlarged)
            rest[top : top + high, left : left + wide] = PAD_VALUE
        assert (rest == PAD_VALUE).all()

    @pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (2, 2, 4, 5), (0, 1, 4, 5), (2, 1, 0, 5), (1, 1, 1, 4, 5)])
    def test_bad_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ArgumentError, match="images"):
            grid(torch.zeros(shape))

    @pytest.mark.parametrize(("name", "value"), [("columns", 0), ("columns", 1.5), ("pad", -1), ("scale", 0)])
    def test_bad_numbers(self, name: str, value: object) -> None:
        with pytest.raises(ArgumentError, match=name):
            grid(random_images(2), **{name: value})  # type: ignore[arg-type]


class TestFiles:
    @pytest.mark.parametrize("ch", [1, 3])
    def test_grid_png_is_lossless(self, tmp_path: Path, ch: int) -> None:
        images = random_images(5, ch)
        path = save_grid(images, tmp_path / "grid.png", 3, pad=1, scale=2)
        assert path == tmp_path / "grid.png"
        np.testing.assert_array_equal(read(path).reshape(19, 34, ch), grid(images, 3, 1, 2))

    def test_grid_jpg(self, tmp_path: Path) -> None:
        image = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
        pixels = read(save_grid(image, tmp_path / "GRID.JPG", pad=0))
        assert np.abs(pixels.astype(int) - grid(image, pad=0)).max() <= 4

    def test_single_png(self, tmp_path: Path) -> None:
        image = random_images(1, 3)[0]
        pixels = read(save_png(image, str(tmp_path / "one.png"), scale=3))
        np.testing.assert_array_equal(pixels[::3, ::3].transpose(2, 0, 1), to_uint8(image).numpy())

    def test_a_file_of_that_name_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "one.png"
        path.write_text("something else")
        save_png(random_images(1)[0], path)
        assert read(path).shape == (4, 5)

    @pytest.mark.parametrize("ch", [1, 3])
    def test_gif(self, tmp_path: Path, ch: int) -> None:
        frames = [torch.full((2, ch, 6, 6), level) for level in (-1.0, 0.0, 1.0)]
        path = save_gif(frames, tmp_path / "a.gif", 2, scale=2, seconds=0.1, hold=0.5)
        with Image.open(path) as movie:
            assert (movie.n_frames, movie.info["loop"], movie.size) == (3, 0, (30, 16))
            durations, levels = [], []
            for index in range(3):
                movie.seek(index)
                durations.append(movie.info["duration"])
                levels.append(np.asarray(movie.convert("RGB"))[5, 5].tolist())
        assert durations == [100, 100, 500]
        assert levels == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]

    def test_gif_of_one_frame(self, tmp_path: Path) -> None:
        with Image.open(save_gif([random_images(2)], tmp_path / "a.gif")) as movie:
            assert movie.n_frames == 1

    @pytest.mark.parametrize(
        "frames", [[], torch.zeros(2, 1, 4, 4), [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5)], [None]]
    )
    def test_bad_frames(self, tmp_path: Path, frames: object) -> None:
        with pytest.raises(ArgumentError, match="frames"):
            save_gif(frames, tmp_path / "a.gif")  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    def test_bad_durations(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="seconds"):
            save_gif([random_images(1)], tmp_path / "a.gif", seconds=0)
        with pytest.raises(ArgumentError, match="hold"):
            save_gif([random_images(1)], tmp_path / "a.gif", hold=float("nan"))

    def test_a_batch_is_not_one_image(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="image"):
            save_png(random_images(1), tmp_path / "a.png")
        with pytest.raises(ArgumentError, match="image"):
            save_png(None, tmp_path / "a.png")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("grid.tiff", "ending in .png or .jpg"),
            ("grid", "ending in"),
            (".png", "ending in"),
            ("folder.png", "a file, got the folder"),
            ("missing/grid.png", "existing folder"),
        ],
    )
    def test_bad_paths(self, tmp_path: Path, name: str, expected: str) -> None:
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(ArgumentError, match=f"^path: expected .*{expected}"):
            save_grid(random_images(1), tmp_path / name)

    def test_a_path_that_is_none(self) -> None:
        with pytest.raises(ArgumentError, match="out: expected a path"):
            check_path("out", 3, (".png",))  # type: ignore[arg-type]
