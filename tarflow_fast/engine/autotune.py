"""The autotuned engine: each batch is handed to the quickest of the engines that are proven on this device.

Which are proven, and how quick they are, a `Gate` tells. While it cannot yet, the default engine serves. One engine
serves a batch in all blocks, and a verdict that comes meanwhile counts from the next batch on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..devices import free_memory
from ..errors import BackendError, OutOfMemoryError
from .base import Choice, EngineBase
from .contract import BlockEngine, BlockState, Condition, Converged, FrontierEngine, Moved, PassTrail, Progress
from .verdict import Gate, Size
from .windows import Bounds

OUT_OF_MEMORY = (OutOfMemoryError, torch.OutOfMemoryError)
Factories = dict[str, Callable[[], BlockEngine]]


class Choices:
    """The choices that the blocks of a model have in common.

    default: the name of the engine that serves where no other is proven. gate: what tells which are. chosen: the
    engine that served the last batch of each size. left_out: the engines that cannot be had in this process, each with
    the reason. too_large: for each size, the engines that lack memory for it. ragged: whether all engines that were
    chosen are ragged.
    """

    def __init__(self, default: str, gate: Gate) -> None:
        self.default, self.gate = default, gate
        self.chosen: dict[Size, Choice] = {}
        self.left_out: dict[str, str] = {}
        self.too_large: dict[Size, dict[str, str]] = {}
        self.ragged = True

    def ranking(self, size: Size) -> list[Choice]:
        """Returns the engines that may serve a batch of this size, the quickest first, each with the reason.

        The default engine is the last, as none that is slower serves.
        """
        verdicts = self.gate.look(size)
        without = {name: verdict.reason for name, verdict in verdicts.items() if verdict and not verdict.proven}
        without |= self.left_out | self.too_large.get(size, {})
        times = {self.default: 1.0} | {
            name: verdict.seconds[name] / verdict.seconds[self.default]
            for name, verdict in verdicts.items()
            if verdict and name not in without
        }
        order = sorted(times, key=times.__getitem__)
        order = order[: order.index(self.default) + 1]
        probed = [repr(name) for name, verdict in verdicts.items() if verdict is None and name not in without]
        more = [f"{', '.join(probed)} being probed"] if probed else []
        more += [f"{name!r}: {why}" for name, why in without.items()]
        choices = []
        for name in order:
            others = ", ".join(f"{took / times[name]:.1f}x {other}" for other, took in times.items() if other != name)
            why = f"the quickest that is proven: {others} at {size}" if others else f"all that is proven at {size}"
            choices.append(Choice(name, "; ".join([why, *more])))
        return choices


class AutotunedEngine(EngineBase):
    """A BlockEngine that hands each batch to another engine, which it makes when it is needed.

    factories: functions without arguments that make the engines to choose from, by name; the default of `choices` is
    among them. dtype: the dtype of weights and cache. choices: what the blocks of a model share. The first block of a
    batch, whose state is begun without another to reuse, chooses; the other blocks take the same engine. An engine that
    cannot be had, or that lacks memory for a batch, is passed over.
    """

    def __init__(self, factories: Factories, dtype: torch.dtype, choices: Choices):
        self.factories, self.dtype, self.choices = factories, dtype, choices
        self._engines: dict[str, BlockEngine] = {}
        self._seconds = 0.0

    # Which engine serves, and why.

    def served_by(self, batch: int, guided: bool) -> Choice:
        """Returns the engine that served the last batch of this size, which must have begun, with the reason."""
        return self.choices.chosen[Size(batch, guided)]

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.choices.ragged

    @property
    def setup_seconds(self) -> float:
        return self._seconds + sum(engine.setup_seconds for engine in self._engines.values())

    @property
    def cached_bytes(self) -> int:
        return sum(engine.cached_bytes for engine in self._engines.values())

    def empty_cache(self) -> None:
        for engine in self._engines.values():
            engine.empty_cache()

    def bytes_per_sample(self, guided: bool) -> int:
        """Returns the most that any of the engines takes that are there; the default is always there."""
        self._make(self.choices.default)
        return max(engine.bytes_per_sample(guided) for engine in self._engines.values())

    # The passes.

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        choices, size = self.choices, Size(z.shape[0], condition.guidance.active)
        if reuse is None or reuse.delegate is None or size not in choices.chosen:
            with self._setting_up():
                among = choices.ranking(size)
        else:
            among = [choices.chosen[size], Choice(choices.default, f"the default at {size}")]
        for choice in among:
            engine = self._make(choice.name)
            if engine is None:
                continue
            self._make_room(choice.name, z, condition)
            own = reuse is not None and reuse.delegate is not None and reuse.delegate[0] == choice.name
            try:
                state = engine.begin(z, condition, reuse if own else None)
            except OUT_OF_MEMORY as error:
                if choice.name == choices.default:
                    raise
                choices.too_large.setdefault(size, {})[choice.name] = str(error)
                continue
            choices.chosen[size] = choice
            choices.ragged = choices.ragged and engine.ragged
            state.delegate = choice.name, engine
            return state
        raise AssertionError("the default engine serves or raises")

    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        _delegate(state).reverse(state, progress, start, stop)

    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        return _delegate(state).fixed_point(state, start, stop)

    def max_window(self, state: BlockState) -> int:
        """Returns the limit of the engine that serves this state, or 0 where that engine makes one pass at a time."""
        engine = _delegate(state)
        return engine.max_window(state) if isinstance(engine, FrontierEngine) else 0

    def iterate_on_device(
        self,
        state: BlockState,
        guess: Tensor,
        reached: Sequence[int],
        trail: PassTrail,
        *,
        window: int,
        max_passes: int,
    ) -> Converged:
        engine = _delegate(state)
        assert isinstance(engine, FrontierEngine)
        return engine.iterate_on_device(state, guess, reached, trail, window=window, max_passes=max_passes)

    # The parts of a choice.

    @contextmanager
    def _setting_up(self) -> Iterator[None]:
        """Count all time that is spent within this context as setup, once."""
        before, started = self.setup_seconds, time.perf_counter()
        try:
            yield
        finally:
            within = sum(engine.setup_seconds for engine in self._engines.values())
            self._seconds = before + time.perf_counter() - started - within

    def _make(self, name: str) -> BlockEngine | None:
        """Returns the engine of this name, or None if it cannot be had."""
        if name not in self._engines and name not in self.choices.left_out:
            try:
                # An engine outlives the mode that it is made in.
                with self._setting_up(), torch.inference_mode(False), torch.no_grad():
                    self._engines[name] = self.factories[name]()
            except (BackendError, *OUT_OF_MEMORY) as error:
                if name == self.choices.default:
                    raise
                self.choices.left_out[name] = str(error)
        return None if name in self.choices.left_out else self._engines[name]

    def _make_room(self, name: str, z: Tensor, condition: Condition) -> None:
        """Free the memory that other engines hold for later batches if the engine of this name needs it."""
        needed = z.shape[0] * self._engines[name].bytes_per_sample(condition.guidance.active)
        others = [engine for other, engine in self._engines.items() if other != name]
        if others and needed > free_memory(z.device):
            for engine in others:
                engine.empty_cache()


def _delegate(state: BlockState) -> BlockEngine:
    assert state.delegate is not None, "a state that another engine began"
    return state.delegate[1]
