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
from gates import Told, pretend_probed, proven

from tarflow_fast import Sampler
from tarflow_fast.backend import make_engines, registry
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.devices import triton_missing
from tarflow_fast.engine import Condition
from tarflow_fast.engine.backend import Backend, Request
from tarflow_fast.errors import ArgumentError
from tarflow_fast.sampling import sampler

REQUEST = Request(torch.device("cuda", 0))


def pretend(monkeypatch: pytest.MonkeyPatch, **missing: str | None) -> None:
    """Backends of these names can serve every request, or cannot, for the reason that is given."""
    plain = registry.backend_named

    def named(name: str) -> Backend:
        return replace(plain(name), missing=lambda request: missing[name]) if name in missing else plain(name)

    monkeypatch.setattr(registry, "backend_named", named)


def test_on_a_gpu_it_is_torch_and_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=None, triton=None)
    several = ("auto", "the quickest of torch, cuda, triton that is proven, for each size of batch")
    assert registry.choose_backend("auto", REQUEST) == several
    pretend(monkeypatch, cuda="not built", triton="not installed")
    only = "the best available on cuda that needs no probe; 'cuda': not built; 'triton': not installed"
    assert registry.choose_backend("auto", REQUEST) == ("torch", only)
    assert registry.choose_backend("auto", Request(CPU, torch.float64))[0] == "torch"


def test_one_that_cannot_even_be_asked_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the library that it needs is broken: its import raises, and torch goes on serving."""

    def broken(request: Request) -> str | None:
        raise ImportError("libtriton.so: undefined symbol\nmore")

    plain = registry.backend_named
    monkeypatch.setattr(
        registry,
        "backend_named",
        lambda name: replace(plain(name), missing=broken) if name in ("triton", "cuda") else plain(name),
    )
    name, why = registry.choose_backend("auto", REQUEST)
    assert name == "torch"
    assert why.endswith("'triton': it cannot be asked, as it raises ImportError: libtriton.so: undefined symbol")


def test_one_engine_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: registry.choose_backend("auto", REQUEST))
    made = Sampler(model, solver="sequential")
    assert made.backend == "torch"
    assert {type(engine) for engine in made.engines} == {TorchEngine}
    assert made.sample(1).report.setup_seconds == 0


def test_auto_needs_a_gate() -> None:
    with pytest.raises(ArgumentError, match=r"^gate: expected what tells which backends are proven"):
        make_engines("auto", [], REQUEST)


@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
def test_triton_engines_share_a_pool_that_goes_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_probed(monkeypatch, "triton")
    gate = Told(triton=proven("triton", 0.5))
    model = random_model(img_size=4)
    weights = [model.block_weights(k) for k in range(2)]
    engines: Any = make_engines("auto", weights, Request(KERNEL_DEVICE, torch.float32, False), gate)
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
