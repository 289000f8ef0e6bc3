"""The CUDA engine beyond what tests/test_engine.py asks of every backend. Without a GPU it runs in the emulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, cuda_kernel_missing, random_latents, random_model
from cuda_emulation import emulated
from test_engine import GUIDED, expected, poisoned
from tolerances import BATCH, GOLDEN, assert_close, error_budget, max_error
from torch import Tensor

from tarflow_fast import BackendError, NonFiniteError, Sampler, reference
from tarflow_fast.backend import backends, choose_backend
from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.cuda import plan as cuda_plan
from tarflow_fast.backend.cuda.engine import CudaEngine, cuda_missing, head_dim_missing, load_native
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import ArgumentError
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.solvers.frontier import Frontier
from tarflow_fast.solvers.trail import SENSITIVITY, Trail

EMULATED = KERNEL_DEVICE.type == "cpu"
IN_EMULATION = pytest.mark.skipif(not EMULATED, reason="of the emulation")
HALVES = [torch.bfloat16, torch.float16]

if cuda_kernel_missing() is not None:
    pytest.skip(str(cuda_kernel_missing()), allow_module_level=True)


def engine_of(model: TarFlow, k: int = 0, dtype: torch.dtype = torch.float32) -> CudaEngine:
    return CudaEngine(model.block_weights(k), device=KERNEL_DEVICE, dtype=dtype)


def inverse(engine: CudaEngine, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    return state.x.cpu(), state.token_log_det.cpu()


@pytest.fixture
def device() -> Iterator[Any]:
    """Sets the emulated device: its multiprocessors, a block's shared memory, the order in which threads run."""
    native = cuda_engine.load_native()

    def choose(multiprocessors: int = 3, shared_bytes: int = 227 * 1024, seed: int = 0) -> None:
        native.set_device(multiprocessors, shared_bytes)
        native.set_seed(seed)

    yield choose
    choose()


# Every number of rows, every shape

TINY: dict[str, Any] = {"img_size": 4, "channels": 32, "head_dim": 16, "num_classes": 3}


AROUND_TILES = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 56, 63, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    "rows", [AROUND_TILES, pytest.param(range(1, 65), marks=pytest.mark.slow)], ids=["around tiles", "all"]
)
def test_any_number_of_rows(dtype: torch.dtype, guidance: Guidance, rows: Sequence[int]) -> None:
    """R = 1 … 64 in one launch, and then more in several: as a batch of all, which in fp32 is the reference's."""
    model = random_model(4, **TINY)
    z, labels = random_latents(model, 70), torch.arange(70) % 4 - 1
    engine = engine_of(model, 1, dtype)
    whole = inverse(engine, z, Condition(labels, guidance))
    if dtype == torch.float32:
        x, log_det = expected(model, 1, z, Condition(labels, guidance))
        assert_close(whole[0], x, GOLDEN)
        assert_close(whole[1], log_det, GOLDEN)
    branches = 2 if guidance.active else 1
    for batch in (*sorted({-(-R // branches) for R in rows}), 66):
        got = inverse(engine, z[:batch], Condition(labels[:batch], guidance))
        for ours, wanted in zip(got, whole, strict=True):
            assert_close(ours, wanted[:batch], BATCH if dtype == torch.float32 else 0.05)


SHAPES = [
    {"channels": 128, "layers_per_block": 2, "num_classes": 3},  # two heads of 64
    {"channels": 96, "head_dim": 32, "in_channels": 3, "img_size": 6},
    {"channels": 128, "head_dim": 128, "img_size": 6},  # a key fills a warp in fp32
    {"channels": 35, "head_dim": 7, "img_size": 10, "patch_size": 5, "layers_per_block": 2},  # nothing is even
    {"channels": 36, "head_dim": 12, "img_size": 8, "patch_size": 4, "in_channels": 3},  # D > C
    {"channels": 24, "head_dim": 8, "img_size": 6, "patch_size": 3, "num_classes": 2, "nvp": False},
    {"channels": 32, "head_dim": 32, "img_size": 14, "patch_size": 2},  # T = 49
    {"channels": 16, "head_dim": 16, "img_size": 4, "patch_size": 2, "layers_per_block": 3},
]
WIDE = {"channels": 1040, "head_dim": 16, "img_size": 4}  # a row does not fit in a warp's registers
SLOW = [pytest.mark.slow] if EMULATED else []


@pytest.mark.parametrize("sizes", [*SHAPES, pytest.param(WIDE, marks=SLOW)], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_shapes(sizes: dict[str, Any], guidance: Guidance) -> None:
    model = random_model(3, **sizes)
    z = random_latents(model, 3)
    condition = Condition(torch.tensor([0, -1, 1]) if model.config.num_classes else None, guidance)
    x, log_det = expected(model, 1, z, condition)
    got = inverse(engine_of(model, 1), z, condition)
    assert_close(got[0], x, GOLDEN)
    assert_close(got[1], log_det, GOLDEN)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *itertools.product(SHAPES, HALVES),
        (WIDE, torch.bfloat16),
        pytest.param(WIDE, torch.float16, marks=SLOW),
    ],
    ids=str,
)
def test_shapes_in_half_precision(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    """As good as the reference evaluated in that dtype."""
    model = random_model(3, **sizes)
    z = random_latents(model, 3)
    condition = Condition(torch.tensor([0, -1, 1]) if model.config.num_classes else None, GUIDED)
    exact, _ = expected(model, 0, z, condition)
    plain, _ = expected(model, 0, z, condition, dtype)
    got, _ = inverse(engine_of(model, 0, dtype), z, condition)
    assert max_error(got, exact) <= error_budget(plain, exact, dtype)


def test_a_single_token_passes_unchanged() -> None:
    model = random_model(img_size=2)
    engine, z = engine_of(model), random_latents(model, 2)
    state = engine.begin(z, Condition())
    engine.reverse(state)
    assert torch.equal(state.x.cpu(), z)
    assert not state.token_log_det.any()


@pytest.mark.parametrize("splits", [1, 3, 16])
def test_keys_may_be_split(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among blocks, two keys each at least; some splits are empty at first."""
    monkeypatch.setattr(cuda_plan, "LEAST_KEYS", 2)
    monkeypatch.setattr(cuda_plan, "choose_splits", lambda pairs, tokens, blocks: splits)
    model = random_model(6, channels=48, head_dim=16, img_size=10, layers_per_block=2)
    z, condition = random_latents(model, 3), Condition(None, GUIDED)
    for dtype, tolerance in ((torch.float32, GOLDEN), (torch.bfloat16, 0.1)):
        engine = engine_of(model, 0, dtype)
        assert engine.plan(6).splits == splits
        assert_close(inverse(engine, z, condition)[0], expected(model, 0, z, condition)[0], tolerance)


# Parallel passes


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_a_window_of_more_rows_than_a_launch_takes(guidance: Guidance) -> None:
    """A pass reads the tokens as they were before it, also those that an earlier launch of it has written."""
    model = random_model(6, num_classes=2, img_size=12, head_dim=16, channels=32)  # T = 36
    T, z = model.config.num_patches, random_latents(model, 3)
    labels = torch.tensor([0, -1, 1])
    engine = engine_of(model)
    state = engine.begin(z, Condition(labels, guidance))
    alone = [engine.begin(z[b : b + 1], Condition(labels[b : b + 1], guidance)) for b in range(3)]
    for _ in range(3):
        moved = engine.fixed_point(state, 1, T)
        for b, each in enumerate(alone):
            for row, wanted in zip(moved, engine.fixed_point(each, 1, T), strict=True):
                assert_close(row[b], wanted[0], BATCH)
            assert_close(state.x[b], each.x[0], BATCH)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    density, _ = reference.block_density(weights, 0, state.x.double().cpu(), labels, head_dim=16)
    if not guidance.active:
        moved = engine.fixed_point(state, 1, T)
        assert_close(moved.residual, (density - z).abs().amax(-1)[:, 1:], GOLDEN)


# What results do not depend on


@IN_EMULATION
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_the_same_bits_for_any_grid_and_any_order_of_threads(guidance: Guidance, device: Any) -> None:
    model = random_model(8, num_classes=2, img_size=6, channels=64, head_dim=32, layers_per_block=2)
    z, condition = random_latents(model, 2), Condition(torch.tensor([1, -1]), guidance)
    wanted = None
    for seed, multiprocessors in enumerate((3, 3, 1, 2, 5, 7)):
        device(multiprocessors, seed=seed)
        engine = engine_of(model, 0, torch.bfloat16)
        assert engine.blocks == multiprocessors
        got = inverse(engine, z, condition)
        wanted = wanted or got
        assert all(map(torch.equal, got, wanted))


@IN_EMULATION
def test_the_same_bits_in_any_shared_memory(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one slot, or eight rows at a time, to all at once."""
    model = random_model(8, img_size=6, channels=64, head_dim=32, layers_per_block=2)
    z, condition = random_latents(model, 13), Condition(None, GUIDED)
    plans, wanted = set(), None
    for kilobytes, slots in ((227, 8), (227, 1), (18, 8), (16, 8), (12, 8), (12, 2), (12, 1)):
        device(2, kilobytes * 1024)
        monkeypatch.setattr(cuda_plan, "MOST_SLOTS", slots)
        engine = engine_of(model, 0, torch.bfloat16)
        plan = engine.plan(26)
        plans.add((plan.slots, plan.staged_rows))
        got = inverse(engine, z, condition)
        wanted = wanted or got
        assert all(map(torch.equal, got, wanted))
    assert plans == {(8, 32), (1, 32), (4, 32), (4, 16), (3, 8), (2, 8), (1, 8)}


@IN_EMULATION
@pytest.mark.parametrize("batch", [1, 13])
def test_blocks_of_eight_warps_as_on_a_gpu(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_engine, "load_native", lambda: emulated(8))
    model = random_model(8, channels=64, head_dim=32, num_classes=2, img_size=4)
    z, condition = random_latents(model, batch), Condition(torch.arange(batch) % 3 - 1, GUIDED)
    for dtype, tolerance in ((torch.float32, GOLDEN), (torch.bfloat16, 0.1)):
        engine = engine_of(model, 1, dtype)
        state = poisoned(engine, z, condition)
        engine.reverse(state)
        assert_close(state.x, expected(model, 1, z, condition)[0], tolerance)
        moved = engine.fixed_point(state, 1, model.config.num_patches)
        assert moved.change.max() <= tolerance / 10


@IN_EMULATION
def test_phases_can_be_left_out(device: Any) -> None:
    """For measurements: what is left is still a pass, which fetches the same weights."""
    model = random_model(img_size=4, layers_per_block=2)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    for phase in range(7):
        state.cache.launch.set_size("skip_phases", 1 << phase)
        engine.reverse(state)
    state.cache.launch.set_size("skip_phases", 127)
    engine.reverse(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    model = random_model(5, num_classes=2, layers_per_block=2)
    engine = engine_of(model, 0, dtype)
    z, condition = random_latents(model, 3), Condition(torch.tensor([1, -1, 0]), GUIDED)
    first, second = (inverse(engine, z, condition) for _ in range(2))
    assert all(map(torch.equal, first, second))


# What goes wrong


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


# Passes without the host


def by_the_host(frontier: Frontier, window: int, most: int = 1000) -> int:
    """`Frontier.run` of an engine that does not do it by itself."""
    passes = 0
    while frontier.slowest < frontier.state.x.shape[1] and passes < most:
        frontier.advance(window)
        passes += 1
    return passes


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("tol", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize(
    ("batch", "window"), [(1, 15), (3, 1), (3, 5), pytest.param(5, 15, marks=pytest.mark.slow), (2, 32)]
)
def test_the_frontier_on_the_device_is_the_hosts(guidance: Guidance, tol: float, batch: int, window: int) -> None:
    """As many passes and evaluations, and the same tokens, also where samples need several launches."""
    model = random_model(6, num_classes=2, channels=32, head_dim=16)
    condition = Condition(torch.arange(batch) % 3 - 1, guidance)
    engine, z = engine_of(model), random_latents(model, batch)
    states = [poisoned(engine, z, condition) for _ in range(2)]
    for state in states:
        state.x.copy_(z)
    frontier, wanted = (Frontier(engine, state, tol) for state in states)
    passes = by_the_host(wanted, window)
    moved: list[int] = []
    assert frontier.run(window, progress=moved.append) == passes
    assert sum(moved) == model.config.num_patches - 1
    assert frontier.reached == wanted.reached
    assert frontier.evaluations == wanted.evaluations
    assert_close(frontier.residual, wanted.residual, GOLDEN)
    assert torch.equal(frontier.trail.values.isinf(), wanted.trail.values.isinf())
    assert_close(
        frontier.trail.values.nan_to_num(posinf=0), wanted.trail.values.nan_to_num(posinf=0), 2e-3 if tol else 0.2
    )
    if tol < 0.1 and window > 1:
        assert (wanted.trail.values[SENSITIVITY] > 0).any()
    assert_close(states[0].x, states[1].x, GOLDEN)
    assert_close(states[0].token_log_det, states[1].token_log_det, GOLDEN)
    if tol == 0:
        assert_close(states[0].x, expected(model, 0, z, condition)[0], GOLDEN)


def test_a_frontier_may_stop_and_go_on() -> None:
    model = random_model(6)
    engine, z = engine_of(model), random_latents(model, 2)
    states = [engine.begin(z, Condition()) for _ in range(2)]
    frontier, wanted = (Frontier(engine, state, 1e-3) for state in states)
    for most in (1, 2, 100):
        assert frontier.run(7, most) == by_the_host(wanted, 7, most)
        assert frontier.reached == wanted.reached
        assert_close(states[0].x, states[1].x, GOLDEN)
    assert frontier.reached == [16, 16]
    assert frontier.run(7) == 0


@pytest.mark.parametrize("where", ["guess", "final"])
def test_a_frontier_with_overflowing_tokens_is_the_hosts(where: str) -> None:
    """A guess that overflows begins again; a sample whose final token does has failed, and no other one."""
    model = random_model(6, img_size=6)
    with torch.no_grad():
        model.blocks[0].proj_out.weight[:4].mul_(60.0 if where == "final" else 25.0)
    engine, z = engine_of(model), random_latents(model, 4) * (3.0 if where == "final" else 1.0)
    states = [engine.begin(z, Condition()) for _ in range(2)]
    frontier, wanted = (Frontier(engine, state, 1e-3) for state in states)
    assert frontier.run(8) == by_the_host(wanted, 8)
    assert frontier.reached == wanted.reached
    assert frontier.evaluations == wanted.evaluations
    finite = states[1].x.isfinite()
    assert torch.equal(states[0].x.isfinite(), finite)
    if where == "final":
        assert not finite.all()
    scale = states[1].x[finite].abs().clamp(min=1)
    assert_close(states[0].x[finite] / scale, states[1].x[finite] / scale, 1e-2)


def test_a_window_too_wide_for_the_device_is_refused() -> None:
    model = random_model()
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition(None, GUIDED))
    assert engine.max_window(state) == 32
    trail = Trail(state)
    with pytest.raises(ArgumentError, match=r"^window: expected 1 to 32, got 33"):
        engine.iterate_on_device(state, state.x, [1, 1], trail, window=33, max_passes=1)
    with pytest.raises(ArgumentError, match=r"^guess: expected shape \(2, 16, 4\), got \(2, 15, 4\)"):
        engine.iterate_on_device(state, state.x[:, 1:], [1, 1], trail, window=3, max_passes=1)
    trail.values = trail.values[1:]
    with pytest.raises(
        ArgumentError, match=r"^trail: expected a contiguous float32 tensor \(4, 2, 16\), got \(3, 2, 16\)"
    ):
        engine.iterate_on_device(state, state.x, [1, 1], trail, window=3, max_passes=1)


def test_the_adaptive_solver_takes_the_devices_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(num_classes=3)
    windows = []
    iterate = CudaEngine.iterate_on_device

    def counted(self: CudaEngine, *arguments: Any, **options: Any) -> Any:
        windows.append(options["window"])
        return iterate(self, *arguments, **options)

    monkeypatch.setattr(CudaEngine, "iterate_on_device", counted)
    sampler = Sampler(model, backend="cuda", device=KERNEL_DEVICE, solver="adaptive", tol=1e-6)
    images = sampler.sample(3, [0, 1, 2]).images
    assert windows == [15, 15]
    assert_close(images, Sampler(model, backend="torch", solver="sequential").sample(3, [0, 1, 2]).images, GOLDEN)
