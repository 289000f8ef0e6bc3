"""The quickest of several engines: which one serves, that none is trusted unseen, and that results are its own."""

from __future__ import annotations

import functools
import gc
import itertools
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import test_engine
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import CPU, GUIDED, NATIVE
from tolerances import GOLDEN

from tarflow_fast import Sampler
from tarflow_fast.backend import make_engines, registry
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.devices import triton_missing
from tarflow_fast.engine import BlockState, Condition, Guidance, autotune, probe, timing
from tarflow_fast.engine.autotune import AutotunedEngine, Choices
from tarflow_fast.engine.backend import Backend, Request
from tarflow_fast.errors import BackendError, OutOfMemoryError
from tarflow_fast.sampling import sampler
from tarflow_fast.solvers.trail import Trail

PLAIN = Condition()
GUIDED_CONDITION = Condition(None, GUIDED)


class Entrant:
    """The torch engine in disguise. off: added to the tokens of what it reverses, for batches of at least `least`
    samples; fails: what it raises there; seconds: what it would take, by the number of samples. Notes what is asked."""

    def __init__(
        self,
        inner: Any,
        *,
        seconds: Callable[[int], float] = lambda batch: 1.0,
        off: float = 0.0,
        fails: Exception | None = None,
        least: int = 0,
        ragged: bool = True,
    ):
        self.inner, self.seconds, self.off, self.fails, self.least = inner, seconds, off, fails, least
        self.ragged, self.setup_seconds, self.cached_bytes = ragged, 0.0, 0
        self.reused: list[BlockState | None] = []
        self.batch = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def empty_cache(self) -> None:
        self.cached_bytes = 0

    def begin(self, z: Any, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        self.reused.append(reuse)
        self.batch = z.shape[0]
        return self.inner.begin(z, condition, reuse)

    def reverse(self, state: BlockState, progress: Any = None, start: int = 1, stop: int | None = None) -> None:
        self.inner.reverse(state, progress, start, stop)
        if state.x.shape[0] >= self.least:
            if self.fails is not None:
                raise self.fails
            state.x[:, start:stop] += self.off


class Race:
    """The engines of a model's blocks, by names and options of their entrants; `made` tells which were made, in order.

    An option that is an exception is raised when the engine is made; with a block's number, in that block alone."""

    def __init__(self, model: Any = None, **entrants: Any):
        self.model = random_model(3, num_classes=2) if model is None else model
        self.made: list[tuple[int, str]] = []
        self.entrants: dict[tuple[int, str], Entrant] = {}
        self.choices = Choices()
        self.blocks = []
        for k in range(self.model.config.num_blocks):
            factories = {
                name: functools.partial(self._make, k, name, options)
                for name, options in {"torch": {}, **entrants}.items()
            }
            self.blocks.append(AutotunedEngine(factories, torch.float32, self.choices))

    def _make(self, k: int, name: str, options: Any) -> Any:
        if isinstance(options, tuple):
            options = options[1] if options[0] == k else {}
        if isinstance(options, Exception):
            raise options
        self.made.append((k, name))
        weights = self.model.block_weights(k)
        inner = make_engines("torch", [weights], Request(CPU, torch.float32, False))[0]
        entrant = self.entrants[k, name] = Entrant(inner, **options)
        return entrant

    def latents(self, batch: int) -> torch.Tensor:
        return random_latents(self.model, batch)

    def serves(self, batch: int, condition: Condition = PLAIN, k: int = -1) -> str:
        state = self.blocks[k].begin(self.latents(batch), condition)
        assert state.delegate is not None
        name = self.blocks[k].served_by(batch, condition.guidance.active).name
        assert state.delegate[0] == name
        return name


@pytest.fixture(autouse=True)
def _told_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take what they say they take."""

    def told(engine: Any, run: Callable[[], None]) -> float:
        run()
        return engine.seconds(engine.batch) if isinstance(engine, Entrant) else 1.0

    monkeypatch.setattr(probe, "seconds", told)


def takes(seconds: float) -> dict[str, Any]:
    return {"seconds": lambda batch: seconds}


# Which one


@pytest.mark.parametrize("k", [0, -1])
def test_the_quickest_serves_each_size_of_batch(k: int) -> None:
    race = Race(few={"seconds": lambda batch: 0.1 * batch}, many={"seconds": lambda batch: 1 / batch})
    assert [race.serves(batch, k=k) for batch in (1, 2, 3, 4, 9, 11)] == ["few", "few", "few", "many", "many", "many"]
    assert (
        race.blocks[k].served_by(2, False).why == "the quickest of torch, few, many: 5.0x torch, 2.5x many at batch 2"
    )
    slow = Race(slow=takes(1.5))
    assert slow.serves(4, GUIDED_CONDITION) == "torch"
    assert slow.blocks[-1].served_by(4, True).why == "the quickest of torch, slow: 1.5x slow at batch 4, guided"


def test_guided_batches_are_another_size() -> None:
    race = Race(other=takes(0.5))
    assert race.serves(2) == "other"
    race.entrants[1, "other"].seconds = lambda batch: 2.0
    assert race.serves(2, GUIDED_CONDITION) == "torch"
    assert race.serves(2) == "other"


def test_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "seconds", timing.seconds)

    class Slow(Entrant):
        def reverse(self, *arguments: Any) -> None:
            time.sleep(0.2)  # long beside what a busy machine makes of the quickest of several passes
            super().reverse(*arguments)

    for slow, quick in itertools.permutations(["torch", "other"]):
        race = Race(other={})
        make = race.blocks[0].factories[slow]
        race.blocks[0].factories[slow] = functools.partial(lambda make: Slow(make()), make)
        assert race.serves(2, k=0) == quick


def test_the_choice_is_made_once_and_shared_by_the_blocks() -> None:
    race = Race(other=takes(0.5), third=takes(0.7))
    assert race.serves(2) == "other"
    assert race.made == [(1, "torch"), (1, "other"), (1, "third")]
    race.made.clear()
    assert [race.serves(2), race.serves(2, k=0), race.serves(2, k=0)] == ["other"] * 3
    assert race.made == [(0, "other")]
    assert race.blocks[1]._engines.keys() == {"other"}  # losers are not kept


def test_a_loser_that_serves_another_size_is_kept() -> None:
    race = Race(few={"seconds": lambda batch: 0.3 * batch})
    assert [race.serves(batch) for batch in (2, 4)] == ["few", "torch"]
    race.made.clear()
    assert [race.serves(batch) for batch in (2, 4)] == ["few", "torch"]
    assert race.made == []


# Whom to trust


@pytest.mark.parametrize("off", [0.1, torch.nan, torch.inf])
@pytest.mark.parametrize("condition", [PLAIN, GUIDED_CONDITION], ids=["unguided", "guided"])
def test_one_that_disagrees_is_never_chosen(off: float, condition: Condition) -> None:
    race = Race(liar={**takes(0.1), "off": off})
    guided = ", guided" if condition.guidance.active else ""
    with pytest.warns(
        RuntimeWarning, match=f"^backend 'liar' will not be used: at batch 3{guided} it is .* off 'torch'"
    ):
        assert race.serves(3, condition) == "torch"
    race.made.clear()
    with warnings.catch_warnings():  # the warning comes once
        warnings.simplefilter("error")
        assert [race.serves(4, condition), race.serves(3, condition, k=0)] == ["torch"] * 2
    assert race.made == [(0, "torch")]
    assert "; 'liar': at batch 3" in race.blocks[0].served_by(4, condition.guidance.active).why


def test_one_that_disagrees_at_one_size_serves_no_other_any_more() -> None:
    race = Race(liar={**takes(0.1), "off": 0.1, "least": 4})
    assert [race.serves(2), race.serves(2, k=0)] == ["liar"] * 2
    with pytest.warns(RuntimeWarning, match="at batch 4 it is"):
        assert race.serves(4) == "torch"
    assert [race.serves(2), race.serves(2, k=0), race.serves(3, k=0)] == ["torch"] * 3


def test_one_that_raises_is_never_chosen() -> None:
    race = Race(broken={**takes(0.1), "fails": ValueError("no such kernel")})
    with pytest.warns(RuntimeWarning, match="^backend 'broken' .*: at batch 2 it raised ValueError: no such kernel$"):
        assert race.serves(2) == "torch"
    assert race.serves(3) == "torch"


@pytest.mark.parametrize("error", [BackendError("heads too wide"), OutOfMemoryError("weights too large")], ids=repr)
def test_one_that_cannot_be_had_is_left_out_with_its_reason(error: Exception) -> None:
    race = Race(unable=error)
    assert race.serves(2) == "torch"
    assert race.blocks[-1].served_by(2, False).why == f"all that can be had at batch 2; 'unable': {error}"


def test_one_that_cannot_be_had_in_another_block_is_left_out_there() -> None:
    race = Race(other=(0, BackendError("not this block")), third=takes(0.5))
    race.blocks[1].factories["other"] = functools.partial(race._make, 1, "other", takes(0.1))
    assert [race.serves(2, k=1), race.serves(2, k=0), race.serves(2, k=1)] == ["other", "third", "third"]


def test_out_of_memory_is_for_that_size_alone() -> None:
    race = Race(large={**takes(0.1), "fails": OutOfMemoryError("3 would fit"), "least": 4})
    assert [race.serves(batch) for batch in (4, 2, 4)] == ["torch", "large", "torch"]
    assert race.blocks[-1].served_by(4, False).why.endswith("; 'large': 3 would fit")


@pytest.mark.parametrize("error", [ValueError("broken"), OutOfMemoryError("3 would fit")], ids=repr)
def test_what_the_trusted_one_raises_is_raised(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        Race(torch={"fails": error}, other=takes(0.1)).serves(2)
    with pytest.raises(BackendError, match="none at all"):
        Race(torch=BackendError("none at all"), other=takes(0.1)).serves(2)


# What is left behind


def test_measuring_leaves_no_trace() -> None:
    race = Race(other=takes(0.5))
    z = race.latents(3)
    given_z, random = z.clone(), torch.get_rng_state()
    state = race.blocks[0].begin(z, GUIDED_CONDITION)
    assert torch.equal(z, given_z)
    assert torch.equal(state.x, given_z)
    assert not state.token_log_det.any()
    assert torch.equal(torch.get_rng_state(), random)


def test_a_spent_state_goes_to_the_engine_that_made_it_alone() -> None:
    race = Race(few={"seconds": lambda batch: 0.3 * batch})
    few = race.blocks[1].begin(race.latents(2), PLAIN)
    same = race.blocks[0].begin(race.latents(2), PLAIN, reuse=few)
    assert race.entrants[0, "few"].reused == [few]
    many = race.blocks[0].begin(race.latents(4), PLAIN, reuse=same)
    race.blocks[0].begin(race.latents(2), PLAIN, reuse=many)
    assert race.entrants[0, "few"].reused == [few, None, None]  # the second is the probe
    assert race.entrants[0, "torch"].reused == [None, None]
    stranger = race.entrants[0, "torch"].begin(race.latents(4), PLAIN)
    race.blocks[0].begin(race.latents(4), PLAIN, reuse=stranger)
    assert race.entrants[0, "torch"].reused[-1] is None


def test_a_state_stays_with_the_engine_that_made_it() -> None:
    """Also when that engine serves no more."""
    race = Race(liar={**takes(0.1), "off": 0.1, "least": 4})
    wanted = race.latents(2)
    state = race.blocks[1].begin(wanted, PLAIN)
    liar = race.entrants[1, "liar"]
    with pytest.warns(RuntimeWarning, match="'liar'"):
        race.serves(4)
    called: list[Any] = []
    liar.inner = SimpleNamespace(reverse=lambda *given: called.append(given))
    race.blocks[1].reverse(state)
    assert len(called) == 1


def test_setup_is_what_choosing_and_making_takes_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of engines that count their own, and are dropped again."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    race = Race(few={"seconds": lambda batch: 0.3 * batch}, loser=takes(9.0))
    make, begin = race._make, Entrant.begin

    def making(k: int, name: str, options: Any) -> Any:
        clock.now += 5
        return make(k, name, options)

    def beginning(self: Entrant, *arguments: Any) -> BlockState:
        clock.now += 1
        self.setup_seconds += 1
        return begin(self, *arguments)

    monkeypatch.setattr(Entrant, "begin", beginning)
    for block in race.blocks:
        for name, factory in block.factories.items():
            block.factories[name] = functools.partial(making, *factory.args)
    last, first = race.blocks[1], race.blocks[0]
    assert last.setup_seconds == 0
    for batch in (2, 4, 2, 8):  # few, torch, few, torch
        race.serves(batch)
        assert last.setup_seconds == pytest.approx(clock.now)
    before = clock.now
    race.serves(4, k=0)
    assert first.setup_seconds == pytest.approx(clock.now - before) == 6


def test_memory_is_that_of_the_most_demanding(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(other={}, unable=BackendError("no"))
    last = race.blocks[-1]
    make = last.factories["other"]

    def hungry() -> Any:
        entrant = make()
        entrant.bytes_per_sample = lambda guided: 1 << (30 if guided else 29)
        return entrant

    last.factories["other"] = hungry
    assert [last.bytes_per_sample(guided) for guided in (False, True)] == [1 << 29, 1 << 30]
    assert race.serves(2) == "torch"
    assert [last.bytes_per_sample(guided) for guided in (False, True)] == [1 << 29, 1 << 30]
    assert race.blocks[0].bytes_per_sample(False) == 1 << 29
    assert {k for k, _ in race.made} == {1}


def test_idle_memory_is_given_up_where_another_engine_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(few={"seconds": lambda batch: 0.3 * batch})
    for batch in (2, 4):
        race.serves(batch)
    few, other = (race.entrants[1, name] for name in ("few", "torch"))
    few.cached_bytes, other.cached_bytes = 1000, 200
    assert race.blocks[1].cached_bytes == 1200
    each = other.bytes_per_sample(False)
    monkeypatch.setattr(autotune, "free_memory", lambda device: 4 * each)
    race.serves(4)
    assert race.blocks[1].cached_bytes == 1200
    monkeypatch.setattr(autotune, "free_memory", lambda device: 4 * each - 1)
    race.serves(4)
    assert (few.cached_bytes, other.cached_bytes) == (0, 200)
    race.blocks[1].empty_cache()
    assert race.blocks[1].cached_bytes == 0


def test_ragged_if_all_that_serve_are() -> None:
    race = Race(even={"seconds": lambda batch: 0.3 * batch, "ragged": False})
    race.serves(4)  # torch
    assert race.blocks[0].ragged
    race.serves(2)
    assert not race.blocks[0].ragged
    assert not race.blocks[1].ragged
    race.serves(6)  # torch: states of the other may still be about
    assert not race.blocks[0].ragged


def test_passes_by_itself_are_asked_of_an_engine_that_can() -> None:
    race = Race()
    state = race.blocks[0].begin(race.latents(2), PLAIN)
    assert race.blocks[0].max_window(state) == 0
    race.entrants[0, "torch"].max_window = lambda state: 7  # type: ignore[attr-defined]
    race.entrants[0, "torch"].iterate_on_device = lambda state, guess, reached, trail, **how: (reached, how)  # type: ignore[attr-defined]
    assert race.blocks[0].max_window(state) == 7
    how = {"window": 3, "max_passes": 2}
    assert race.blocks[0].iterate_on_device(state, state.x, [1, 1], Trail(state), **how) == ([1, 1], how)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("size", [2, 4, 6, 8, 10])
def test_any_number_of_tokens(size: int) -> None:
    """One token, fewer than are timed together, and parts of such a piece."""
    race = Race(random_model(1, img_size=size), other={**takes(0.5)})
    assert race.serves(2) == "other"


# The laws of engines, through it


@pytest.fixture(params=["torch", NATIVE])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """backend="auto" of engines that are to be had here, of which this one is the quickest."""
    monkeypatch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cpu"))
    monkeypatch.setattr(probe, "seconds", lambda engine, run: 1.0 if quick(engine) == request.param else 2.0)
    return str(request.param)


def quick(engine: Any) -> str:
    return {"TorchEngine": "torch", "CpuEngine": "cpu"}[type(engine).__name__]


LAWS = {
    "reference": lambda: test_engine.test_reverse_equals_the_reference(
        "auto", GUIDED, 3, 1, {"num_classes": 4, "channels": 128, "layers_per_block": 2, "img_size": 6}
    ),
    "volume-preserving": lambda: test_engine.test_reverse_equals_the_reference(
        "auto", Guidance(), 2, 0, {"num_classes": 2, "nvp": False}
    ),
    "one token": lambda: test_engine.test_reverse_equals_the_reference(
        "auto", Guidance(), 4, 0, {"img_size": 4, "patch_size": 4}
    ),
    "progress": lambda: test_engine.test_progress_counts_every_step("auto"),
    "ragged": lambda: test_engine.test_an_engine_says_whether_it_takes_a_window_for_each_sample("auto"),
    "causal": lambda: test_engine.test_a_token_depends_on_the_tokens_before_it_alone("auto", GUIDED, torch.nan),
    "residual": lambda: test_engine.test_the_residual_is_that_of_the_tokens_before_the_pass("auto", True),
    "autocast": lambda: test_engine.test_autocast_around_an_engine_changes_nothing("auto"),
    "spent": lambda: test_engine.test_a_spent_cache_is_taken_over_if_it_fits("auto"),
    "bytes": lambda: test_engine.test_bytes_per_sample_covers_the_cache("auto", True),
    "window": lambda: test_engine.test_a_window_outside_the_sequence_is_refused("auto", (3, 2)),
    "part": lambda: test_engine.test_a_part_outside_the_sequence_is_refused("auto", (3, 2)),
}


@pytest.mark.parametrize("law", LAWS)
def test_laws_of_engines(served: str, law: str) -> None:
    engine = test_engine.engine_of(random_model(), 0, "auto")
    state = engine.begin(random_latents(random_model(), 1), PLAIN)
    assert isinstance(engine, AutotunedEngine)
    assert state.delegate is not None
    assert state.delegate[0] == served
    LAWS[law]()


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("law", [test_engine.check_windows, test_engine.check_parts])
@settings(max_examples=5)
@given(data=st.data())
def test_laws_of_windows_and_parts(backend: str, law: Any, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cpu"))
        patch.setattr(probe, "seconds", lambda engine, run: 1.0 if quick(engine) == backend else 2.0)
        law("auto", torch.float32, GOLDEN, GUIDED, data)


# Through the sampler


@pytest.mark.parametrize("solver", ["sequential", "adaptive"])
def test_results_are_those_of_the_engine_that_serves(monkeypatch: pytest.MonkeyPatch, served: str, solver: str) -> None:
    model = random_model(5, num_classes=2)
    wanted = Sampler(model, backend=served, solver=solver)
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: ("auto", "the quickest of several"))
    auto = Sampler(model, solver=solver)
    assert (auto.backend, auto.backend_reason) == ("auto", "the quickest of several")
    for guidance in (0.0, 1.5):
        found, alone = (each.sample(5, [0, 1, -1], guidance=guidance, batch_size=3) for each in (auto, wanted))
        assert torch.equal(found.images, alone.images)
        assert guidance or torch.equal(found.log_prob, alone.log_prob)  # type: ignore[arg-type]
        assert found.report.backend == served
        other, guided = "cpu" if served == "torch" else "torch", ", guided" if guidance else ""
        why = f"the quickest of torch, cpu: 2.0x {other} at batch 3{guided}"
        assert found.report.backend_reason == why
        assert found.report.setup_seconds > 0
    again = auto.sample(5, [0, 1, -1], batch_size=3)
    assert again.report.setup_seconds == 0
    z = random_latents(model, 2)
    assert torch.equal(auto.reverse(z), wanted.reverse(z))


@pytest.mark.skipif(bool(NATIVE.marks[0].args[0]), reason="of two engines")
def test_the_report_names_every_engine_that_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(engine: Any, run: Callable[[], None]) -> float:
        run()
        return {"torch": 1.0, "cpu": 0.3 * batch[0]}[quick(engine)]

    batch = [0]
    begin = AutotunedEngine.begin

    def beginning(self: AutotunedEngine, z: torch.Tensor, *arguments: Any, **named: Any) -> BlockState:
        batch[0] = z.shape[0]
        return begin(self, z, *arguments, **named)

    monkeypatch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cpu"))
    monkeypatch.setattr(probe, "seconds", told)
    monkeypatch.setattr(AutotunedEngine, "begin", beginning)
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: ("auto", "the quickest of several"))
    report = Sampler(random_model()).sample(10, batch_size=4).report
    assert report.backend == "torch, cpu"
    assert report.backend_reason == (
        "the quickest of torch, cpu: 1.2x cpu at batch 4; the quickest of torch, cpu: 1.7x torch at batch 2"
    )


# What "auto" is on a GPU


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
    states = [engine.begin(z, PLAIN) for engine in engines]
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
