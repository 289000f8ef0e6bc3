"""What the CUDA engine names as not finite, and what it refuses before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from cuda_engines import IN_EMULATION, engine_of, inverse

from tarflow_fast import BackendError, NonFiniteError, Sampler
from tarflow_fast.backend import backends, choose_backend
from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.cuda.engine import cuda_missing, head_dim_missing, load_native
from tarflow_fast.engine import Condition
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import ArgumentError


def test_the_first_token_that_is_not_finite_is_named() -> None:
    model = random_model(img_size=6)
    with torch.no_grad():
        model.blocks[0].proj_out.weight[0].fill_(50.0)
    z = random_latents(model, 3)
    found = []
    for backend in ("cuda", "torch"):
        with pytest.raises(NonFiniteError) as raised:
            Sampler(model, backend=backend, device=KERNEL_DEVICE).reverse(z.to(KERNEL_DEVICE))
        found.append((raised.value.block, raised.value.token, raised.value.sample))
    assert found[0] == found[1]


def test_a_nan_stays_with_its_sample() -> None:
    model = random_model(6)
    engine = engine_of(model)
    z = random_latents(model, 2)
    wanted, _ = inverse(engine, z, Condition())
    z[1, 0, 0] = torch.nan
    x, _ = inverse(engine, z, Condition())
    assert torch.equal(x[0], wanted[0])
    assert x[1, 1:].isnan().all()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "fits"),
    [
        (64, torch.bfloat16, True),
        (256, torch.bfloat16, True),
        (128, torch.float32, True),
        (7, torch.float16, True),
        (256, torch.float32, False),
        (36, torch.float32, True),
        (36, torch.bfloat16, False),
        (264, torch.bfloat16, False),
    ],
)
def test_which_heads_there_can_be(head_dim: int, dtype: torch.dtype, fits: bool) -> None:
    assert (head_dim_missing(head_dim, dtype) is None) == fits
    if not fits:
        model = random_model(channels=head_dim, head_dim=head_dim)
        with pytest.raises(BackendError, match=rf"heads of at most 32 .* and this model has {head_dim}"):
            engine_of(model, 0, dtype)


@IN_EMULATION
def test_a_model_too_wide_is_refused_before_any_work(device: Any) -> None:
    device(3, 16 * 1024)
    with pytest.raises(BackendError, match=r"needs \d+ bytes of shared memory .* a block has 16384 here"):
        Sampler(random_model(channels=512), backend="cuda")


def test_what_cannot_be_had_is_refused() -> None:
    assert "has no float64" in str(cuda_missing(KERNEL_DEVICE, torch.float64))
    assert "nothing to compile" in str(cuda_missing(KERNEL_DEVICE, compile=True))
    assert "needs a CUDA device, and this is mps" in str(cuda_missing(torch.device("mps")))
    with pytest.raises(BackendError, match=r"^backend 'cuda' cannot be had: the CUDA engine has no float64"):
        choose_backend("cuda", Request(KERNEL_DEVICE, torch.float64, False))


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cuda_engine, "import_module", missing)
    monkeypatch.setattr(cuda_engine, "load_native", load_native)
    with pytest.raises(BackendError, match=r"was not built; install the CUDA toolkit \(nvcc.*No module named"):
        load_native()
    with pytest.raises(BackendError, match=r"^backend 'cuda' cannot be had: the CUDA engine was not built"):
        Sampler(random_model(), backend="cuda")
    (status,) = [status for status in backends() if status.name == "cuda"]
    assert not status.available
    assert "install tarflow_fast again, with TARFLOW_FAST_CUDA=1 where the build sees no GPU" in status.reason


class Built:
    """A compiled module on a machine with a GPU, whose own CUDA runtime answers a probe."""

    device_type = "cuda"

    def __init__(self, says: str | None):
        self.says, self.asked = says, []

    def probe(self, index: int) -> None:
        self.asked.append(index)
        if self.says is not None:
            raise RuntimeError(self.says)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)


TOO_OLD = "the NVIDIA driver here serves CUDA 12.4, and the CUDA engine was built with CUDA 13.0; install another"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda", 2)])
def test_a_driver_that_is_too_old_for_the_module_is_said_before_any_work(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's CUDA runtime is its own, and a driver that serves torch's may be too old for it."""
    native = Built(TOO_OLD)
    monkeypatch.setattr(cuda_engine, "load_native", lambda: native)
    for _ in range(2):
        assert cuda_missing(torch.device(device)) == f"{TOO_OLD}; backend='triton' and 'torch' do without it"
    assert native.asked == [index]  # once, as it may take the driver a while
    with pytest.raises(BackendError, match=r"^backend 'cuda' cannot be had: the NVIDIA driver here serves CUDA 12\.4"):
        choose_backend("cuda", Request(torch.device(device), torch.float32, False))


@pytest.mark.usefixtures("gpu")
def test_a_device_that_answers_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    native = Built(None)
    monkeypatch.setattr(cuda_engine, "load_native", lambda: native)
    assert cuda_missing(torch.device("cuda", 3)) is None
    assert native.asked == [3]


@IN_EMULATION
def test_every_call_of_the_module_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runtime has a current device of its own, which torch does not set."""
    native, told = cuda_engine.load_native(), []

    class Told:
        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def probe(self, index: int) -> None:
            told.append(index)

        def device(self, index: int) -> Any:
            told.append(index)
            return native.device(index=index)

        def Launch(self) -> Any:
            launch = native.Launch()

            class Recorded:
                def __getattr__(self, name: str) -> Any:
                    return getattr(launch, name)

                def run(self, **arguments: Any) -> None:
                    told.append(arguments["index"])
                    launch.run(**arguments)

            return Recorded()

    monkeypatch.setattr(cuda_engine, "load_native", Told)
    monkeypatch.setattr(cuda_engine, "_index", lambda device: 5)
    model = random_model(img_size=4)
    inverse(engine_of(model), random_latents(model, 1), Condition())
    assert told == [5, 5, 5]  # the probe, the engine, a launch


def test_latents_of_another_shape_are_refused() -> None:
    engine = engine_of(random_model())
    with pytest.raises(ArgumentError, match=r"^z: expected shape \(B, 16, 4\), got \(2, 16, 5\)"):
        engine.begin(torch.zeros(2, 16, 5), Condition())


@pytest.mark.parametrize("name", ["x", "token_log_det"])
def test_a_state_that_was_tampered_with_is_refused(name: str) -> None:
    model = random_model()
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    setattr(state, name, getattr(state, name).double())
    with pytest.raises(ArgumentError, match=rf"^state.{name}: expected a contiguous float32 tensor"):
        engine.reverse(state)


def test_the_kernels_names_are_checked() -> None:
    launch = cuda_engine.load_native().Launch()
    with pytest.raises(ValueError, match="no size is called width"):
        launch.set_size("width", 1)
    with pytest.raises(ValueError, match="no buffer is called w"):
        launch.set_buffer("w", 0, 0)
    with pytest.raises(ValueError, match="1 to 64 positions"):
        launch.set_positions([])
