"""Which backend "auto" is on a GPU, and what its engines share."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from engines import CPU

from tarflow_fast import Sampler
from tarflow_fast.backend import make_engines, registry
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.devices import triton_missing
from tarflow_fast.engine import Condition, probe
from tarflow_fast.engine.backend import Backend, Request
from tarflow_fast.sampling import sampler

REQUEST = Request(torch.device("cuda", 0))


def pretend(monkeypatch: pytest.MonkeyPatch, **missing: str | None) -> None:
    """Backends of these names can serve every request, or cannot, for the reason that is given."""
    plain = registry.backend_named

    def named(name: str) -> Backend:
        return replace(plain(name), missing=lambda request: missing[name]) if name in missing else plain(name)

    monkeypatch.setattr(registry, "backend_named", named)


def test_none_but_proven_engines_serve_a_gpu_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=None, triton=None)
    assert registry.PROVEN_ON_GPU == ("torch",)
    only = ("torch", "the best that has been measured on a GPU; backend='triton' and 'cuda' have not")
    assert registry.choose_backend("auto", REQUEST) == only
    monkeypatch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cuda"))
    several = ("auto", "the quickest of torch, cuda, measured for each size of batch")
    assert registry.choose_backend("auto", REQUEST) == several
    pretend(monkeypatch, cuda="not built")
    assert registry.choose_backend("auto", REQUEST) == ("torch", "not built")
    assert registry.choose_backend("auto", Request(CPU, torch.float64))[0] == "torch"


def test_one_engine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: registry.choose_backend("auto", REQUEST))
    made = Sampler(model, solver="sequential")
    assert made.backend == "torch"
    assert {type(engine) for engine in made.engines} == {TorchEngine}
    assert made.sample(1).report.setup_seconds == 0


@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
def test_triton_engines_share_a_pool_that_goes_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PROVEN_ON_GPU", ("torch", "triton"))
    monkeypatch.setattr(probe, "seconds", lambda engine, run: 1.0 if hasattr(engine, "pool") else 2.0)
    model = random_model(img_size=4)
    weights = [model.block_weights(k) for k in range(2)]
    engines: Any = make_engines("auto", weights, Request(KERNEL_DEVICE, torch.float32, False))
    z = random_latents(model, 2).to(KERNEL_DEVICE)
    states = [engine.begin(z, Condition()) for engine in engines]
    first, second = (engine._engines["triton"] for engine in engines)
    assert first.pool is second.pool
    pool, each = weakref.ref(first.pool), engines[0].bytes_per_sample(False)
    assert engines[0].cached_bytes == 0
    states.clear()
    assert 0 < engines[0].cached_bytes <= 4 * each
    engines[0].empty_cache()
    assert engines[1].cached_bytes == 0
    del first, second
    for engine in engines:
        del engine._engines["triton"]
    gc.collect()
    assert pool() is None
