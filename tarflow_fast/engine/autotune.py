"""The quickest of several engines: for each size of batch they are measured when it first comes, and one serves it.

What is measured is a piece of the sequential pass, half way through the block. On the way there each engine's tokens
are held against the `torch` engine's, and one that disagrees is not used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..devices import free_memory
from ..errors import BackendError, OutOfMemoryError
from .base import Choice, EngineBase
from .contract import BlockEngine, BlockState, Condition, Converged, FrontierEngine, Moved, PassTrail, Progress
from .probe import MAX_DEVIATION, difference, probe
from .windows import Bounds

BASELINE = "torch"
OUT_OF_MEMORY = (OutOfMemoryError, torch.OutOfMemoryError)
Factories = dict[str, Callable[[], BlockEngine]]
Size = tuple[int, bool]  # of a batch: samples, and whether they are guided


class Choices:
    """What the blocks of a model have in common.

    chosen: by size of batch. left_out: engines that are not used for this model, and why not. bytes_per_sample: by
    whether guided, the most that any engine takes. ragged: whether all that were chosen are.
    """

    def __init__(self) -> None:
        self.chosen: dict[Size, Choice] = {}
        self.left_out: dict[str, str] = {}
        self.bytes_per_sample: dict[bool, int] = {}
        self.ragged = True

    def leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self.chosen = {size: choice for size, choice in self.chosen.items() if choice.name != name}


class AutotunedEngine(EngineBase):
    """BlockEngine that hands each batch to another, which it makes when it is needed.

    factories: by name, what makes each engine to choose from, `BASELINE` among them. dtype: of their weights and cache.
    choices: shared by the blocks of a model: the block that a size of batch comes to first makes all engines and
    measures them, the others make the one that was chosen. An engine that cannot be had for this model is left out; so
    is one that fails, or disagrees with the baseline, with a warning.
    """

    def __init__(self, factories: Factories, dtype: torch.dtype, choices: Choices):
        self.factories = {BASELINE: factories[BASELINE], **factories}
        self.dtype, self.choices = dtype, choices
        self._engines: dict[str, BlockEngine] = {}
        self._seconds = 0.0

    # What serves, and why.

    def served_by(self, batch: int, guided: bool) -> Choice:
        """Of a size of batch that has come."""
        return self.choices.chosen[batch, guided]

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
        """The most that any of the engines takes: a size that has not come yet is tried with all of them."""
        if guided not in self.choices.bytes_per_sample:
            engines = self._make_all()
            self.choices.bytes_per_sample[guided] = max(engine.bytes_per_sample(guided) for engine in engines.values())
        return self.choices.bytes_per_sample[guided]

    # The passes.

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        size = (z.shape[0], condition.guidance.active)
        engine = None
        while engine is None:  # what was chosen in another block may not be had for this one
            if size not in self.choices.chosen:
                with self._setting_up():
                    self.choices.chosen[size] = self._choose(z, condition)
            name = self.choices.chosen[size].name
            engine = self._make(name)
        self._make_room(name, z, condition)
        if reuse is not None and (reuse.delegate is None or reuse.delegate[0] != name):
            reuse = None
        state = engine.begin(z, condition, reuse)
        state.delegate = name, engine
        return state

    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        _delegate(state).reverse(state, progress, start, stop)

    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        return _delegate(state).fixed_point(state, start, stop)

    def max_window(self, state: BlockState) -> int:
        """0 where what serves makes one pass at a time."""
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

    # The choice.

    @contextmanager
    def _setting_up(self) -> Iterator[None]:
        """All that is done in here counts as setup, once."""
        before, started = self.setup_seconds, time.perf_counter()
        try:
            yield
        finally:
            within = sum(engine.setup_seconds for engine in self._engines.values())
            self._seconds = before + time.perf_counter() - started - within

    def _make(self, name: str) -> BlockEngine | None:
        """The engine of this name, or None if it is left out."""
        if name not in self._engines and name not in self.choices.left_out:
            try:
                # An engine outlives the mode that it is made in.
                with self._setting_up(), torch.inference_mode(False), torch.no_grad():
                    self._engines[name] = self.factories[name]()
            except (BackendError, *OUT_OF_MEMORY) as error:
                if name == BASELINE:
                    raise
                self.choices.leave_out(name, str(error))
        return None if name in self.choices.left_out else self._engines[name]

    def _make_all(self) -> dict[str, BlockEngine]:
        made = {name: self._make(name) for name in self.factories}
        return {name: engine for name, engine in made.items() if engine is not None}

    def _make_room(self, name: str, z: Tensor, condition: Condition) -> None:
        """Memory that other engines hold for batches to come is given up if this one needs it."""
        needed = z.shape[0] * self._engines[name].bytes_per_sample(condition.guidance.active)
        others = [engine for other, engine in self._engines.items() if other != name]
        if others and needed > free_memory(z.device):
            for engine in others:
                engine.empty_cache()

    def _choose(self, z: Tensor, condition: Condition) -> Choice:
        choices, batch = self.choices, _batch(z, condition)
        most = MAX_DEVIATION[self.dtype] * (1 + condition.guidance.scale)
        taken: dict[str, float] = {}
        too_large: dict[str, str] = {}  # for this size
        trusted: list[Tensor] = []
        for name, engine in self._make_all().items():
            self._make_room(name, z, condition)
            try:
                pieces, took = probe(engine, z, condition, trusted)
            except Exception as error:
                if name == BASELINE:
                    raise
                if isinstance(error, OUT_OF_MEMORY):
                    too_large[name] = str(error)
                else:
                    self._distrust(name, f"at {batch} it raised {type(error).__name__}: {error}")
                continue
            trusted = trusted or pieces
            off = difference(pieces, trusted)
            if off <= most:
                taken[name] = took
            else:  # or NaN
                self._distrust(name, f"at {batch} it is {off:.3g} off {BASELINE!r}, and at most {most:.3g} would do")
        best = min(taken, key=taken.__getitem__)
        for name in self._engines.keys() - {best, *(choice.name for choice in choices.chosen.values())}:
            del self._engines[name]
        choices.ragged = choices.ragged and self._engines[best].ragged
        why = f"all that can be had at {batch}"
        if len(taken) > 1:
            others = ", ".join(f"{took / taken[best]:.1f}x {name}" for name, took in taken.items() if name != best)
            why = f"the quickest of {', '.join(taken)}: {others} at {batch}"
        without = "".join(f"; {name!r}: {reason}" for name, reason in {**choices.left_out, **too_large}.items())
        return Choice(best, why + without)

    def _distrust(self, name: str, why: str) -> None:
        self.choices.leave_out(name, why)
        warnings.warn(f"backend {name!r} will not be used: {why}", RuntimeWarning, stacklevel=2)


def _delegate(state: BlockState) -> BlockEngine:
    assert state.delegate is not None, "a state that another engine began"
    return state.delegate[1]


def _batch(z: Tensor, condition: Condition) -> str:
    return f"batch {z.shape[0]}, guided" if condition.guidance.active else f"batch {z.shape[0]}"
