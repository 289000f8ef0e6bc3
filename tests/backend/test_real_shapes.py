"""The GPU engines at the sizes of published models, T = 1024 tokens of C = 768 channels, late in the sequence.

Small shapes never split the keys of a row among blocks more than once, take a second round of them, or need more than
one slot of weights for a tile. What earlier tokens left in the cache is drawn at random, the same for each engine, so
that a few tokens at the end of the sequence take as much of the kernels as all of it.
"""

from __future__ import annotations

import pytest
import torch
from cases import KERNEL_DEVICE, cuda_kernel_missing, random_latents, random_model
from engines import GUIDED
from tolerances import GOLDEN, assert_close, error_budget, max_error
from torch import Tensor

from tarflow_fast.backend import make_engines
from tarflow_fast.engine import Condition
from tarflow_fast.engine.backend import Request
from tarflow_fast.models.tarflow import TarFlow

T = 1024
EMULATED = KERNEL_DEVICE.type == "cpu"
on_gpu = pytest.mark.skipif(EMULATED, reason="there is no GPU")


def afhq(layers: int) -> TarFlow:
    """One block of AFHQ-256's model."""
    sizes = {"in_channels": 3, "img_size": 256, "patch_size": 8, "channels": 768, "head_dim": 64, "num_classes": 3}
    return random_model(2, num_blocks=1, layers_per_block=layers, **sizes)


def ends(
    backend: str, dtype: torch.dtype, model: TarFlow, samples: int, tokens: int, window: int = 1
) -> tuple[Tensor, Tensor]:
    """The last tokens by the sequential pass, and what two parallel ones over the last window make of them."""
    (engine,) = make_engines(backend, [model.block_weights(0)], Request(KERNEL_DEVICE, dtype, False))
    z = random_latents(model, samples).to(KERNEL_DEVICE)
    condition = Condition(torch.arange(samples, device=KERNEL_DEVICE) % 4 - 1, GUIDED)
    state = engine.begin(z, condition)
    held = state.cache.keys_values
    held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(1)))
    held[..., T - 1 - tokens :, :] = torch.nan  # a pass makes these itself
    engine.reverse(state, start=T - tokens)
    sequential = state.x[:, T - tokens :].clone()
    assert state.x[:, : T - tokens].equal(z[:, : T - tokens])
    for _ in range(2):
        engine.fixed_point(state, T - window, T)
    return sequential.cpu(), state.x[:, T - window :].cpu()


def check(backend: str, dtype: torch.dtype, layers: int, samples: int, tokens: int, window: int) -> None:
    model = afhq(layers)
    exact = ends("torch", torch.float32, model, samples, tokens, window)
    plain = ends("torch", dtype, model, samples, tokens, window)
    for ours, by_torch, wanted in zip(ends(backend, dtype, model, samples, tokens, window), plain, exact, strict=True):
        if dtype == torch.float32:
            assert_close(ours, wanted, GOLDEN)
        else:
            assert max_error(ours, wanted) <= error_budget(by_torch, wanted, dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [2, 32, 64])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_real_shapes(backend: str, rows: int, dtype: torch.dtype) -> None:
    if backend == "cuda" and cuda_kernel_missing() is not None:
        pytest.skip(str(cuda_kernel_missing()))
    check(backend, dtype, layers=2, samples=rows // 2, tokens=9, window=64)


@pytest.mark.slow
@pytest.mark.skipif(not EMULATED or cuda_kernel_missing() is not None, reason="of the emulation of CUDA")
@pytest.mark.parametrize(("rows", "tokens"), [(2, 2), (64, 1)])
def test_a_real_shape_in_the_emulation(rows: int, tokens: int) -> None:
    """One layer, guided: the keys of two rows are split among blocks; 64 rows take all of the widest instance."""
    check("cuda", torch.bfloat16, layers=1, samples=rows // 2, tokens=tokens, window=tokens)
