"""This module runs scripts of other projects from a checkout of theirs, with what they import exchanged in memory, on a
CPU, at small sizes, and with a few random images for data."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

ON_CPU = {
    "'cuda:0'": "'cpu'",
    "'cuda'": "'cpu'",
    '"cuda"': '"cpu"',
    "dtype=torch.bfloat16": "dtype=torch.bfloat16, enabled=False",
    "num_workers=8": "num_workers=0",
    "pin_memory=True": "pin_memory=False",
}


class Images(Dataset[tuple[Tensor, int]]):
    """This dataset has random images in [-1, 1] in the place of a folder or of MNIST."""

    def __init__(self, shape: tuple[int, ...], number: int, classes: int):
        self.x = torch.rand(number, *shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
        self.classes = classes

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], i % self.classes


def source(path: Path, changes: Mapping[str, str]) -> str:
    """Returns a script's text, or that of a notebook's cells, with the changes made. Each has to be found."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    for old, new in ON_CPU.items():
        text = text.replace(old, new)
    for old, new in changes.items():
        assert old in text, f"{path} has no {old!r} any more"
        text = text.replace(old, new)
    return text


def modules(saved: list[Tensor], data: Images) -> dict[str, types.ModuleType]:
    """Returns stand-ins for torchvision and torchmetrics. saved: gets what scripts save as images, or give to FID."""

    class Distance(nn.Module):
        def __init__(self, **_: Any):
            super().__init__()

        def update(self, images: Tensor, real: bool) -> None:
            saved.append(images)

        def compute(self) -> Tensor:
            return torch.zeros(())

        def reset(self) -> None:
            pass

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content)
        return made

    anything = types.SimpleNamespace(
        **{name: lambda *_, **__: None for name in ("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize")}
    )
    datasets = types.SimpleNamespace(MNIST=lambda *_, **__: data, ImageFolder=lambda *_, **__: data)
    utils = types.SimpleNamespace(
        save_image=lambda images, *_, **__: saved.append(images.detach().clone()),
        make_grid=lambda images, **_: images,
    )
    return {
        "torchvision": module("torchvision", transforms=anything, datasets=datasets, utils=utils),
        "torchmetrics": module("torchmetrics"),
        "torchmetrics.image": module("torchmetrics.image"),
        "torchmetrics.image.fid": module("torchmetrics.image.fid", FrechetInceptionDistance=Distance),
    }


@contextmanager
def exchanged(checkout: Path, within: Mapping[str, types.ModuleType], folder: Path) -> Iterator[None]:
    """Puts modules in the place of others and lets a checkout's own be imported, on a machine with a GPU by name
    alone."""
    names = [*within, "utils", "transformer_flow", "GS_Jacobi_sampling"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path, where, arguments, system = list(sys.path), Path.cwd(), sys.argv, os.system
    cuda = (Tensor.cuda, nn.Module.cuda, torch.cuda.set_device)
    generator = torch.get_rng_state()
    sys.path.insert(0, str(checkout))
    sys.modules.update(within)
    os.chdir(folder)
    os.system = lambda _: 0  # downloads
    Tensor.cuda = nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign, assignment]
    torch.cuda.set_device = lambda _: None  # type: ignore[assignment]
    try:
        yield
    finally:
        Tensor.cuda, nn.Module.cuda, torch.cuda.set_device = cuda  # type: ignore[method-assign]
        os.system = system
        os.chdir(where)
        sys.path[:], sys.argv = path, arguments
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        torch.set_rng_state(generator)
