"""The files that `tarflow-fast sample` writes: checked before the work, written after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..report import Samples


def output_path(option: str, path: str, suffixes: Sequence[str]) -> Path:
    """A file that can be written, else wrong usage of that option."""
    from ..errors import ArgumentError
    from ..images import check_path

    try:
        return check_path(option, path, suffixes)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error


@dataclass(frozen=True)
class Outputs:
    """Where the samples go; None: not asked for."""

    grid: Path
    singles: Path | None
    npz: Path | None
    gif: Path | None

    @classmethod
    def checked(cls, out: str, singles: str | None, npz: str | None, gif: str | None) -> Outputs:
        """Refuses what cannot be written, and makes the folder of singles."""
        from ..images import PICTURE_SUFFIXES

        outputs = cls(
            output_path("--out", out, PICTURE_SUFFIXES),
            None if singles is None else Path(singles),
            None if npz is None else output_path("--npz", npz, (".npz",)),
            None if gif is None else output_path("--gif", gif, (".gif",)),
        )
        if outputs.singles is not None:
            outputs.singles.mkdir(parents=True, exist_ok=True)
        return outputs

    def write(self, samples: Samples, *, columns: int, scale: int, seed: int, first: int, denoised: bool) -> None:
        from ..images import save_gif, save_grid, save_png

        images = samples.images.cpu()
        save_grid(images, self.grid, columns, scale=scale)
        if self.singles is not None:
            for number, image in enumerate(images, start=first):
                save_png(image, self.singles / f"{number:05d}.png")
        if self.npz is not None:
            _save_npz(self.npz, samples, seed, first)
        if self.gif is not None and samples.trajectory is not None:
            frames = [frame.cpu() for frame in samples.trajectory]
            save_gif([*frames, images] if denoised else frames, self.gif, columns, scale=scale)

    def to_dict(self) -> dict[str, str]:
        return {name: str(path) for name, path in vars(self).items() if path is not None}


def _save_npz(path: Path, samples: Samples, seed: int, first: int) -> None:
    import numpy as np

    arrays: dict[str, Any] = {"images": samples.images.float().cpu().numpy(), "seed": seed, "first": first}
    if samples.labels is not None:
        arrays["labels"] = samples.labels.cpu().numpy()
    if samples.log_prob is not None:
        arrays["log_prob"] = samples.log_prob.cpu().numpy()
    np.savez(path, **arrays)
