"""torch's default dtype and device are the process's own affair: they change no result, and no memory is misread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import KERNEL_DEVICE, cuda_kernel_missing, random_images, random_latents, random_model
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, denoise, dequantize, load, reference, save
from tarflow_fast.backend import make_engines
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine.backend import Request
from tarflow_fast.engine.contract import Condition, Guidance
from tarflow_fast.errors import ArgumentError
from tarflow_fast.evaluation import bayes_accuracy, bits_per_dim
from tarflow_fast.native import address
from tarflow_fast.trainer import TrainConfig, train

CPU_MISSING, CUDA_MISSING = cpu_missing(), cuda_kernel_missing()
NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING)))
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(CUDA_MISSING is not None, reason=str(CUDA_MISSING)))
DEFAULTS: list[tuple[torch.dtype | None, str | None]] = [
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (None, "meta"),
    (torch.bfloat16, "meta"),
]
others = pytest.mark.parametrize(("dtype", "device"), DEFAULTS, ids=str)


@contextmanager
def defaults(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    if device is not None:
        torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def same(make: Callable[[], Any], dtype: torch.dtype | None, device: str | None) -> None:
    """`make` gives the same to the bit under these defaults; it is called afresh, so that all is made under them."""
    wanted = make()
    with defaults(dtype, device):
        got = make()
    for a, b in zip(_tensors(got), _tensors(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in _tensors(part)]


@others
@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}, {"num_classes": 3, "nvp": False}], ids=str)
def test_sampling(backend: str, sizes: dict[str, int], dtype: torch.dtype | None, device: str | None) -> None:
    model = random_model(**sizes)
    labels = [0, 2, -1] if sizes else None
    rule: dict[str, Any] = {"guidance": 1.5, "attn_temp": 0.7, "annealed_guidance": True} if sizes else {}

    def make() -> Any:
        parts = []
        for solver in ("sequential", "adaptive"):
            for weights in (torch.float32, torch.bfloat16):
                sampler = Sampler(model, backend=backend, solver=solver, dtype=weights)
                parts.append(sampler.sample(3, labels, trajectory=True, **rule))
        return [[part.images, part.trajectory, *([] if rule else [part.log_prob])] for part in parts]

    same(make, dtype, device)


@others
@pytest.mark.parametrize("backend", ["torch", NATIVE, "triton", CUDA])
def test_an_engine(backend: str, dtype: torch.dtype | None, device: str | None) -> None:
    model = random_model(num_classes=3)
    z, on = random_latents(model, 2), KERNEL_DEVICE if backend in ("triton", "cuda") else torch.device("cpu")
    condition = Condition(torch.tensor([0, -1]), Guidance(1.5, "ab", 0.7, True))

    def make() -> Any:
        weights = model.block_weights(1)
        engine = make_engines(backend, [weights], Request(on, torch.float32, False))[0]
        state = engine.begin(z, condition)
        engine.reverse(state, None, 1, 6)
        moved = engine.fixed_point(state, 6, 12)
        if engine.ragged:
            engine.fixed_point(state, [8, 6], [9, 12])
        return [state.x[:, :12], state.token_log_det[:, :12], *moved]

    same(make, dtype, device)


@others
def test_a_plan(dtype: torch.dtype | None, device: str | None) -> None:
    model = random_model(num_classes=3)

    def make() -> Any:
        plan = Sampler(model, solver="adaptive").learn_plan(4, [0, 1])
        images = Sampler(model, solver="adaptive", plan=plan).sample(2, 1).images
        return [plan.slope, plan.shift, plan.passes, plan.evaluations, images]

    same(make, dtype, device)


@others
def test_densities(dtype: torch.dtype | None, device: str | None) -> None:
    model, y = random_model(num_classes=3), torch.tensor([0, 2, -1])
    images, levels = random_images(model, 3), torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)

    def make() -> Any:
        out = [dequantize(levels, torch.Generator().manual_seed(0))]
        for backend in ("auto", "torch"):
            model.set_density(backend)
            with torch.no_grad():
                out += [*model(images, y), model.log_prob(images, y), model.bits_per_dim(images)]
            out.append(denoise(model, images, y, noise_std=0.1, backend=backend))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out.append(model(images, y)[0])
        tokens = reference.patchify(images, 2)
        out += [reference.log_prob(model.state_dict(), tokens, y)]
        out += [reference.inverse(model.state_dict(), tokens, y, guidance=1.0, annealed_guidance=True).x]
        return out

    same(make, dtype, device)


@others
def test_evaluation(dtype: torch.dtype | None, device: str | None) -> None:
    model, levels = random_model(num_classes=3), torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    model.metadata = {"noise_std": 0.1, "noise_type": "gaussian"}

    def make() -> Any:
        accuracy = bayes_accuracy(model, levels, [0, 1, 2, 0, 1])
        return [torch.from_numpy(np.asarray(part)) for part in (bits_per_dim(model, levels).mean, accuracy.accuracy)]

    same(make, dtype, device)


@others
def test_a_checkpoint(dtype: torch.dtype | None, device: str | None, tmp_path: Path) -> None:
    model = random_model(num_classes=3)

    def make() -> Any:
        out: list[Tensor] = []
        for name in ("model.pth", "model.safetensors"):
            save(model, tmp_path / name)
            out += load(tmp_path / name, in_channels=1).state_dict().values()
        return out

    same(make, dtype, device)


@others
def test_training(dtype: torch.dtype | None, device: str | None, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=levels, labels=np.arange(8) % 2)
    runs = iter(range(9))

    def make() -> Any:
        config = TrainConfig(
            str(tmp_path / "data.npz"), str(tmp_path / f"{next(runs)}"), patch_size=4, channels=64, num_blocks=1,
            layers_per_block=1, epochs=1, batch_size=4, dtype="float32", device="cpu", drop_label=0.5, flip=True,
        )  # fmt: skip
        trained: TarFlow = train(config, progress=False)
        return trained.state_dict().values()

    same(make, dtype, device)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(4, device="meta"),
        torch.zeros(4, 2)[:, 0],
        torch.zeros(3),
    ],
    ids=["float64", "bfloat16", "meta", "gaps", "short"],
)
def test_no_address_of_what_native_code_would_misread(tensor: Tensor) -> None:
    assert address("x", torch.zeros(4), torch.float32, count=4)
    with pytest.raises(ArgumentError, match=r"x: expected a contiguous torch\.float32 tensor on cpu of 4 values"):
        address("x", tensor, torch.float32, count=4)
