"""The quickest of the proven engines: which one serves, when it changes, and that results are its own."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engines import CPU, GUIDED
from gates import Told, proven

from tarflow_fast.backend import make_engines
from tarflow_fast.engine import BlockState, Condition, autotune
from tarflow_fast.engine.autotune import AutotunedEngine, Choices
from tarflow_fast.engine.backend import Request
from tarflow_fast.engine.verdict import Size, Verdict
from tarflow_fast.errors import BackendError, OutOfMemoryError
from tarflow_fast.solvers.trail import Trail

PLAIN = Condition()
GUIDED_CONDITION = Condition(None, GUIDED)


class Entrant:
    """The torch engine in disguise, which notes what is asked. most: the largest batch that it has memory for."""

    def __init__(self, inner: Any, *, most: int = 1000, ragged: bool = True):
        self.inner, self.most, self.ragged = inner, most, ragged
        self.setup_seconds, self.cached_bytes = 0.0, 0
        self.reused: list[BlockState | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def empty_cache(self) -> None:
        self.cached_bytes = 0

    def begin(self, z: Any, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        if len(z) > self.most:
            raise OutOfMemoryError(f"{self.most} would fit")
        self.reused.append(reuse)
        return self.inner.begin(z, condition, reuse)


class Race:
    """The engines of a model's blocks, by the verdict on each; `made` tells which were made, in order.

    options: by name, what `Entrant` takes, or an exception that is raised when the engine is made; with a block's
    number, in that block alone.
    """

    def __init__(self, options: dict[str, Any] | None = None, **verdicts: Any):
        self.model = random_model(3, num_classes=2)
        self.made: list[tuple[int, str]] = []
        self.entrants: dict[tuple[int, str], Entrant] = {}
        self.gate = Told(**verdicts)
        self.choices = Choices("torch", self.gate)
        given = options or {}
        self.blocks = [
            AutotunedEngine(
                {name: functools.partial(self._make, k, name, given.get(name, {})) for name in ("torch", *verdicts)},
                torch.float32,
                self.choices,
            )
            for k in range(self.model.config.num_blocks)
        ]

    def _make(self, k: int, name: str, options: Any) -> Any:
        if isinstance(options, tuple):
            options = options[1] if options[0] == k else {}
        if isinstance(options, Exception):
            raise options
        self.made.append((k, name))
        inner = make_engines("torch", [self.model.block_weights(k)], Request(CPU))[0]
        entrant = self.entrants[k, name] = Entrant(inner, **options)
        return entrant

    def latents(self, batch: int) -> torch.Tensor:
        return random_latents(self.model, batch)

    def serves(self, batch: int, condition: Condition = PLAIN, k: int = -1, reuse: BlockState | None = None) -> str:
        state = self.blocks[k].begin(self.latents(batch), condition, reuse)
        assert state.delegate is not None
        name = self.blocks[k].served_by(batch, condition.guidance.active).name
        assert state.delegate[0] == name
        return name

    def why(self, batch: int, guided: bool = False) -> str:
        return self.blocks[0].served_by(batch, guided).why


# Which one


@pytest.mark.parametrize("k", [0, -1])
def test_the_quickest_serves_each_size_of_batch(k: int) -> None:
    race = Race(few=lambda size: proven("few", 0.1 * size.batch), many=lambda size: proven("many", 2 / size.batch))
    assert [race.serves(batch, k=k) for batch in (1, 2, 4, 5, 9, 11)] == ["few", "few", "few", "many", "many", "many"]
    assert race.why(2) == "the quickest that is proven: 5.0x torch, 5.0x many at batch 2"
    slow = Race(slow=proven("slow", 1.5))
    assert slow.serves(4, GUIDED_CONDITION) == "torch"
    assert slow.why(4, True) == "the quickest that is proven: 1.5x slow at batch 4, guided"
    assert slow.made == [(1, "torch")]


def test_what_is_not_proven_does_not_serve() -> None:
    race = Race(liar=Verdict(False, "0.1 off"), probed=None, other=None)
    assert race.serves(3) == "torch"
    assert race.made == [(1, "torch")]
    assert race.why(3) == "all that is proven at batch 3; 'probed', 'other' being probed; 'liar': 0.1 off"


def test_guided_batches_are_another_size() -> None:
    race = Race(other=lambda size: None if size.guided else proven("other", 0.5))
    assert [race.serves(2), race.serves(2, GUIDED_CONDITION), race.serves(2)] == ["other", "torch", "other"]
    assert race.gate.asked == [Size(2, False), Size(2, True), Size(2, False)]


# When it changes


def test_the_switch_comes_between_two_batches() -> None:
    """A batch goes through all blocks with one engine, whatever is proven meanwhile."""
    race = Race(other=None)
    first = race.blocks[1].begin(race.latents(2), PLAIN)
    race.gate.verdicts["other"] = proven("other", 0.5)
    assert race.serves(2, k=0, reuse=first) == "torch"
    state = race.blocks[1].begin(race.latents(2), PLAIN)
    assert state.delegate is not None
    assert state.delegate[0] == "other"
    race.gate.verdicts["other"] = Verdict(False, "revoked")
    assert race.serves(2, k=0, reuse=state) == "other"
    assert race.serves(2) == "torch"
    assert len(race.gate.asked) == 3


def test_a_state_stays_with_the_engine_that_made_it() -> None:
    race = Race(other=proven("other", 0.5))
    state = race.blocks[1].begin(race.latents(2), PLAIN)
    race.gate.verdicts["other"] = Verdict(False, "revoked")
    assert race.serves(2) == "torch"
    called: list[Any] = []
    race.entrants[1, "other"].inner = SimpleNamespace(reverse=lambda *given: called.append(given))
    race.blocks[1].reverse(state)
    assert len(called) == 1


# What cannot be had


@pytest.mark.parametrize("error", [BackendError("heads too wide"), OutOfMemoryError("weights too large")], ids=repr)
def test_one_that_cannot_be_had_is_passed_over(error: Exception) -> None:
    race = Race({"unable": error}, unable=proven("unable", 0.1), other=proven("other", 0.5))
    assert [race.serves(2), race.serves(2)] == ["other", "other"]
    assert race.why(2) == f"the quickest that is proven: 2.0x torch at batch 2; 'unable': {error}"


def test_one_that_cannot_be_had_in_another_block_is_passed_over_there() -> None:
    race = Race({"other": (0, BackendError("not this block"))}, other=proven("other", 0.5))
    state = race.blocks[1].begin(race.latents(2), PLAIN)
    assert race.serves(2, k=0, reuse=state) == "torch"
    assert race.serves(2) == "torch"  # from the next batch on in all blocks


def test_out_of_memory_is_for_that_size_alone() -> None:
    race = Race({"large": {"most": 3}}, large=proven("large", 0.5))
    assert [race.serves(batch) for batch in (4, 2, 4)] == ["torch", "large", "torch"]
    assert race.why(4) == "all that is proven at batch 4; 'large': 3 would fit"


@pytest.mark.parametrize("options", [{"most": 1}, BackendError("none would fit")], ids=repr)
def test_what_the_default_raises_is_raised(options: Any) -> None:
    with pytest.raises((OutOfMemoryError, BackendError), match="would fit"):
        Race({"torch": options}).serves(2)


# What is left behind


def test_a_spent_state_goes_to_the_engine_that_made_it_alone() -> None:
    race = Race(few=lambda size: proven("few", 0.3 * size.batch))
    few = race.blocks[1].begin(race.latents(2), PLAIN)
    same = race.blocks[0].begin(race.latents(2), PLAIN, reuse=few)
    assert race.entrants[0, "few"].reused == [few]
    many = race.blocks[0].begin(race.latents(4), PLAIN, reuse=same)
    race.blocks[0].begin(race.latents(2), PLAIN, reuse=many)
    assert race.entrants[0, "few"].reused == [few, None]
    assert race.entrants[0, "torch"].reused == [None]
    stranger = race.entrants[0, "torch"].begin(race.latents(4), PLAIN)
    race.blocks[0].begin(race.latents(4), PLAIN, reuse=stranger)
    assert race.entrants[0, "torch"].reused[-1] is None


def test_setup_is_what_choosing_and_making_takes_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of engines that count their own."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def look(size: Size) -> Verdict:
        clock.now += 2
        return proven("few", 0.3 * size.batch)

    race = Race(few=look)
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
    last = race.blocks[1]
    assert last.setup_seconds == 0
    for batch in (2, 4, 2, 8):
        race.serves(batch)
        assert last.setup_seconds == pytest.approx(clock.now)


def test_memory_is_that_of_the_most_demanding_that_is_there() -> None:
    race = Race(other=proven("other", 0.5), probed=None)
    last = race.blocks[-1]
    make = last.factories["other"]

    def hungry() -> Any:
        entrant = make()
        entrant.bytes_per_sample = lambda guided: 1 << (30 if guided else 29)
        return entrant

    last.factories["other"] = hungry
    assert last.bytes_per_sample(False) == race.entrants[1, "torch"].bytes_per_sample(False)
    assert race.serves(2) == "other"
    assert [last.bytes_per_sample(guided) for guided in (False, True)] == [1 << 29, 1 << 30]


def test_idle_memory_is_given_up_where_another_engine_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(few=lambda size: proven("few", 0.3 * size.batch))
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
    race = Race({"even": {"ragged": False}}, even=lambda size: proven("even", 0.3 * size.batch))
    race.serves(4)  # torch
    assert race.blocks[0].ragged
    race.serves(2)
    assert not race.blocks[0].ragged
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
