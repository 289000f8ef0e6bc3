"""The quickest of several engines: which one serves, that none is trusted unseen, and that results are its own."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engines import CPU, GUIDED

from tarflow_fast.backend import make_engines
from tarflow_fast.engine import BlockState, Condition, autotune, probe, timing
from tarflow_fast.engine.autotune import AutotunedEngine, Choices
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import BackendError, OutOfMemoryError
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
