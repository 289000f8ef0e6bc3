"""The subject of a probe: an engine, what it is given, and what PyTorch makes of the same in two precisions."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend.registry import backend_named
from ..engine.backend import Backend, Request
from ..engine.contract import BlockEngine, BlockState, Condition, Guidance
from ..engine.shape import BlockShape
from .job import EngineJob
from .weights import random_weights
from .zones import RedZones

PERIOD = 7
"""Sample i has the inputs of sample i mod 7.

PyTorch then has to compute 7 samples, however large the batch is. 7 is prime, so that samples that kernels might mix
up, whose distance is a power of two, are different ones.
"""
GUIDED = Guidance(1.5, "ab", attn_temp=0.7, annealed=True)
POSITIONS = (1, 2, 127, 128, 129, 255, 256, 257)  # tokens that are made alone, beside the middle and the last two
START, PIECE = 9, 4  # tokens [1, START) from the start; PIECE tokens half way


@dataclass
class Outputs:
    """What the passes gave: tensors whose first dimension is the sample, by the name of the pass."""

    tensors: dict[str, Tensor]

    def rows(self, batch: int) -> Outputs:
        """Returns those of a batch of so many samples, given those of `PERIOD`."""
        index = torch.arange(batch) % PERIOD
        return Outputs({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()})


class Subject:
    """An engine for one block, as a job asks for it.

    zones: the red zones round all that this engine allocates. engine: the engine that is probed. backend: its backend.
    """

    def __init__(self, job: EngineJob, shape: BlockShape):
        self.job, self.shape = job, shape
        self.backend: Backend = backend_named(job.backend) if isinstance(job.backend, str) else job.backend
        self.request = Request(job.device, job.dtype)
        self.weights = random_weights(shape, job.seed)
        self.zones = RedZones()
        missing = self.backend.missing(self.request) or self.backend.unsupported(shape, job.dtype)
        if missing is not None:
            raise RuntimeError(missing)
        with self.zones:
            self.engine = self.backend.maker(self.request)(self.weights)
        self._torch = backend_named("torch").maker

    # What it is given.

    def latents(self, batch: int) -> Tensor:
        """Returns z, (B, T, D) fp32 on the device."""
        return self._noise(1, batch)

    def tokens(self, batch: int) -> Tensor:
        """Returns the tokens that passes start from, (B, T, D) fp32 on the device; token 0 is that of the latents."""
        x = self._noise(2, batch)
        x[:, 0] = self.latents(batch)[:, 0]
        return x

    def condition(self, batch: int, guided: bool) -> Condition:
        """Returns labels that go round the classes and "no class", where there are classes, and the guidance."""
        labels = None
        if self.shape.classes:
            labels = torch.arange(batch, device=self.job.device) % PERIOD % (self.shape.classes + 1) - 1
        return Condition(labels, GUIDED if guided else Guidance())

    def _noise(self, stream: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * self.job.seed + stream)
        sizes = (PERIOD, self.shape.tokens, self.shape.token_dim)
        noise = torch.randn(sizes, generator=generator, device="cpu", dtype=torch.float32)
        return noise[torch.arange(batch) % PERIOD].to(self.job.device)

    # What is expected of it.

    @functools.cached_property
    def exact(self) -> BlockEngine:
        """Returns PyTorch's engine in a wider precision: fp32 for half precision, else fp64."""
        wide = torch.float32 if self.job.dtype.itemsize < 4 else torch.float64
        return self._torch(Request(self.job.device, wide))(self.weights)

    @functools.cached_property
    def peer(self) -> BlockEngine:
        """Returns PyTorch's engine in the same dtype, whose error is what an error is measured by."""
        return self._torch(self.request)(self.weights)

    @functools.cache  # noqa: B019 - it goes with the subject, which lives as long as its process
    def expected(self, guided: bool) -> tuple[Outputs, Outputs]:
        """Returns what `whole` gives for `PERIOD` samples: of the exact engine, and of the peer."""
        exact, peer = (whole(engine, self, PERIOD, guided) for engine in (self.exact, self.peer))
        return exact, peer

    @property
    def middle(self) -> int:
        """Returns the token half way through the block, from 1 on."""
        return max(self.shape.tokens // 2, 1)

    @property
    def positions(self) -> list[int]:
        """Returns the tokens that are made alone."""
        T = self.shape.tokens
        return sorted({p for p in (*POSITIONS, T // 2, T - 2, T - 1) if 1 <= p < T})


def begin(
    engine: BlockEngine, subject: Subject, batch: int, guided: bool, reuse: BlockState | None = None
) -> BlockState:
    """Returns a new state of this engine, of the subject's latents."""
    return engine.begin(subject.latents(batch), subject.condition(batch, guided), reuse=reuse)


def whole(engine: BlockEngine, subject: Subject, batch: int, guided: bool) -> Outputs:
    """Runs every kind of pass once, each from tokens that are given, so that errors do not add up.

    These are: the first steps of the sequential pass; a parallel pass over all tokens; single steps at the positions
    that are most likely to go wrong; and a piece of the sequential pass half way, which goes on from the cache of the
    parallel pass.
    """
    state = begin(engine, subject, batch, guided)
    x, T, out = subject.tokens(batch).to(state.x), subject.shape.tokens, {}

    def kept(name: str, start: int, stop: int) -> None:
        out[f"{name}: tokens"] = state.x[:, start:stop].clone()
        out[f"{name}: log-dets"] = state.token_log_det[:, start:stop].clone()

    first = min(START, T)
    engine.reverse(state, None, 1, first)
    kept("the first steps", 1, first)
    state.x.copy_(x)
    moved = engine.fixed_point(state, 1, T)
    kept("a pass over all tokens", 1, T)
    out["a pass over all tokens: residual"] = moved.residual.clone()
    for position in subject.positions:
        state.x.copy_(x)
        engine.reverse(state, None, position, position + 1)
        kept(f"the step to token {position}", position, position + 1)
    state.x.copy_(x)
    start, stop = subject.middle, min(subject.middle + 2 * PIECE, T)
    engine.reverse(state, None, start, stop)
    kept(f"steps from token {start} on", start, stop)
    return Outputs(out)


def brief(
    engine: BlockEngine, subject: Subject, state: BlockState, *, fill: bool = True, tokens: Tensor | None = None
) -> Outputs:
    """Runs the first steps, a window against nothing, a window against a prefix, and steps after that prefix.

    fill: whether the first window is the whole prefix, which has to be in the cache otherwise. tokens: (B, T, D), where
    the passes start from, by default the subject's.
    """
    x = (subject.tokens(len(state.x)) if tokens is None else tokens).to(state.x)
    T, out = subject.shape.tokens, []
    first, middle = min(START, T), subject.middle
    parts = [("steps", 1, first), ("window", 1, max(middle if fill else 0, first))]
    parts += [("window", middle, min(middle + START, T)), ("steps", middle, min(middle + PIECE, T))]
    for kind, start, stop in parts:
        if start >= stop:
            continue
        state.x[:, 1:] = x[:, 1:]
        moved: tuple[Tensor, ...] = ()
        if kind == "window":
            moved = engine.fixed_point(state, start, stop)
        else:
            engine.reverse(state, None, start, stop)
        kept = [state.x[:, start:stop], state.token_log_det[:, start:stop], *moved]
        out += [(f"{kind} [{start}, {stop}), {i}", tensor.clone()) for i, tensor in enumerate(kept)]
    return Outputs(dict(out))
