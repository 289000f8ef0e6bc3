"""The laws that a probe holds an engine to, and the cases in which it does.

Each law is a function of a subject, a number of samples, and whether they are guided. It returns a `Finding`, or raises
what the engine raised. The cases are data: `cases` lists them for a job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, FrontierEngine
from ..engine.shape import BlockShape
from ..engine.verdict import Size
from ..solvers.trail import Trail
from .job import EngineJob
from .subject import PIECE, START, Outputs, Subject, begin, brief, whole

TIMES = 2.0  # an error may be so many times that of PyTorch in the same dtype
FLOOR = {torch.float32: 32.0, torch.bfloat16: 0.5, torch.float16: 0.5, torch.float64: 32.0}
"""What an error may be beside that, in units of the dtype's resolution at the size of the result.

½ is one rounding of half precision. In fp32, where sums of thousands of products are taken in another order, it is 32.
"""
PASSES, WINDOW = 6, 16  # of `iterate_on_device`
LEAK = 16 * 2**20  # bytes that the repeats of a pass may leave behind


class Finding(NamedTuple):
    """What a check found: the error, how large it may be, and what is wrong beside, or None."""

    error: float | None = None
    allowed: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Case:
    """A law, and the block and batch for which an engine is held to it."""

    law: str
    shape: BlockShape
    size: Size

    @property
    def name(self) -> str:
        """Returns the name of the check."""
        return f"{self.law}, {self.size}"


def cases(job: EngineJob) -> list[Case]:
    """Returns all checks of a job, the quickest to tell that something is wrong first."""
    asked = job.size
    found = []
    for shape in job.shapes:
        if shape.tokens > 1:
            found += [Case("accuracy", shape, Size(batch, asked.guided)) for batch in job.batches]
            found += [Case(law, shape, asked) for law in LAWS if law != "accuracy"]
    return found


def check(subject: Subject, case: Case) -> Finding:
    """Returns what is found by this case; that nothing is written beyond a buffer is part of every case."""
    with subject.zones:
        finding = LAWS[case.law](subject, case.size.batch, case.size.guided)
    broken = subject.zones.broken()
    return finding if broken is None or finding.fault is not None else finding._replace(fault=broken)


# Numbers.


def accuracy(subject: Subject, batch: int, guided: bool) -> Finding:
    """|engine − exact| ≤ 2 |PyTorch − exact| + floor, for all that `whole` runs."""
    exact, peer = (outputs.rows(batch) for outputs in subject.expected(guided))
    got = whole(subject.engine, subject, batch, guided)
    worst = Finding(0.0, float("inf"))
    for kind in ("tokens", "log-dets", "residual"):
        names = [name for name in got.tensors if name.endswith(f": {kind}")]
        theirs = max(_off(peer.tensors[name], exact.tensors[name]) for name in names)
        size = max(exact.tensors[name].abs().max().item() for name in names)
        for name in names:
            found = _judge(subject, name, got.tensors[name], exact.tensors[name], theirs, size)
            if found.fault is not None:
                return found
            worst = max(worst, found, key=lambda each: (each.error or 0.0) / (each.allowed or 1.0))
    return worst


def _judge(subject: Subject, name: str, got: Tensor, exact: Tensor, theirs: float, size: float) -> Finding:
    """Returns whether an error is within what is allowed.

    got, exact: results and what they would be without rounding, with the samples along dimension 0. theirs: PyTorch's
    error. size: the largest of the exact values.
    """
    dtype = subject.job.dtype
    allowed = TIMES * theirs + FLOOR[dtype] * torch.finfo(dtype).eps * size
    error = _off(got, exact)
    if error <= allowed:
        return Finding(error, allowed)
    rows = (got.double() - exact.double()).abs().flatten(1).amax(1)  # an error, or a NaN
    first = int((~(rows <= allowed)).int().argmax())
    return Finding(error, allowed, f"{name} {error:.3g} off in sample {first}, and at most {allowed:.3g} would do")


def converge(subject: Subject, batch: int, guided: bool) -> Finding:
    """Passes by the device itself give the sequential result for all tokens that they reach."""
    engine = subject.engine
    state = begin(engine, subject, batch, guided)
    most = engine.max_window(state) if isinstance(engine, FrontierEngine) else 0
    if most == 0 or not isinstance(engine, FrontierEngine):
        return Finding()
    guess, window = subject.tokens(batch).to(state.x), min(most, WINDOW, subject.shape.tokens - 1)
    done = engine.iterate_on_device(
        state, guess, [1] * batch, Trail(state, subject.job.dtype), window=window, max_passes=PASSES
    )
    reached = min(done.reached)
    wanted = min(1 + PASSES, subject.shape.tokens)
    if reached < wanted:
        return Finding(fault=f"{done.passes} passes have reached token {reached}, where {wanted} must be")
    stop = min(wanted, START)
    exact, peer = (outputs.rows(batch).tensors["the first steps: tokens"] for outputs in subject.expected(guided))
    got, size = state.x[:, 1:stop], exact.abs().max().item()
    return _judge(subject, "tokens", got, exact[:, : stop - 1], _off(peer, exact), size)


def ragged(subject: Subject, batch: int, guided: bool) -> Finding:
    """A window for each sample gives what one window gives, and leaves alone what is outside."""
    engine, T = subject.engine, subject.shape.tokens
    if not engine.ragged:
        return Finding()
    starts = [1 + b % min(3, T - 1) for b in range(batch)]
    stops = [min(start + (5 * b) % 4, T) for b, start in enumerate(starts)]
    exact, peer = (
        outputs.rows(batch).tensors["a pass over all tokens: tokens"] for outputs in subject.expected(guided)
    )
    state = begin(engine, subject, batch, guided)
    x = subject.tokens(batch).to(state.x)
    state.x.copy_(x)
    engine.fixed_point(state, 1, T)
    state.x.copy_(x)
    engine.fixed_point(state, starts, stops)
    inside = torch.zeros(batch, T, dtype=torch.bool)
    for b in range(batch):
        inside[b, starts[b] : stops[b]] = True
    if not torch.equal(state.x[~inside], x[~inside]):
        return Finding(fault="tokens outside of the windows have changed")
    marked = inside[:, 1:, None].to(exact.device)
    got = torch.where(marked, state.x[:, 1:].to(exact), exact)
    return _judge(subject, "tokens", got, exact, _off(peer, exact), exact.abs().max().item())


# Bits.


def repeats(subject: Subject, batch: int, guided: bool) -> Finding:
    """The same passes give the same bits each time, eager and as a replayed graph, and leave no memory behind."""
    engine = subject.engine
    state = begin(engine, subject, batch, guided)
    brief(engine, subject, state)
    first, held = None, 0
    for i in range(subject.job.repeats):
        again = brief(engine, subject, state, fill=False)
        if first is None:
            first = again
        elif (other := _other_bits(again, first)) is not None:
            return Finding(fault=f"{other} has other bits in repeat {i + 1}")
        if (broken := subject.zones.broken()) is not None:  # which also lets go of what the zones were round
            return Finding(fault=broken)
        if i == min(3, subject.job.repeats - 1):  # by then all that is made once is there
            held = _memory(subject.job.device)
    grown = _memory(subject.job.device) - held
    return Finding(fault=None if grown <= LEAK else f"{grown / 2**20:.0f} MiB more are held after the repeats")


def inputs(subject: Subject, batch: int, guided: bool) -> Finding:
    """Latents and labels stay as they are."""
    condition = subject.condition(batch, guided)
    z = subject.zones.around(subject.latents(batch))
    given = z.clone()
    labels = None if condition.labels is None else condition.labels.clone()
    state = subject.engine.begin(z, condition)
    brief(subject.engine, subject, state)
    changed = [name for name, a, b in (("z", z, given), ("state.z", state.z, given)) if not torch.equal(a.to(b), b)]
    if labels is not None and condition.labels is not None and not torch.equal(condition.labels, labels):
        changed.append("labels")
    return Finding(fault=f"{', '.join(changed)} changed" if changed else None)


def isolation(subject: Subject, batch: int, guided: bool) -> Finding:
    """A sample of NaN changes no bit of its batch mates, and a token of NaN none of the tokens before it."""
    engine = subject.engine
    wanted = brief(engine, subject, begin(engine, subject, batch, guided))
    z, x = subject.latents(batch), subject.tokens(batch)
    z[0], x[0] = torch.nan, torch.nan
    state = engine.begin(z, subject.condition(batch, guided))
    got = brief(engine, subject, state, tokens=x)
    other = _other_bits(got, wanted, slice(1, None)) if batch > 1 else None
    if other is not None:
        return Finding(fault=f"NaN in sample 0 changes {other} of another sample")
    T = subject.shape.tokens
    at = T // 2
    results = []
    for bad in (False, True):
        state, x = begin(engine, subject, batch, guided), subject.tokens(batch)
        state.x.copy_(x.to(state.x))
        if bad:
            state.x[:, at:] = torch.nan
        engine.fixed_point(state, 1, T)
        results.append(state.x[:, : at + 1].clone())
    same = torch.equal(*results)
    return Finding(fault=None if same else f"NaN in token {at} changes tokens before it, or itself")


def poison(subject: Subject, batch: int, guided: bool) -> Finding:
    """What the cache held before changes no bit: NaN, numbers whose products overflow, or a batch that failed."""
    engine = subject.engine
    wanted = brief(engine, subject, begin(engine, subject, batch, guided))
    for held in (torch.nan, torch.finfo(subject.job.dtype).max):
        state = begin(engine, subject, batch, guided)
        keys_values = getattr(state.cache, "keys_values", None)
        if isinstance(keys_values, Tensor):
            keys_values.fill_(held)
        if (other := _other_bits(brief(engine, subject, state), wanted)) is not None:
            return Finding(fault=f"{held:.3g} in a cache that was not written to changes {other}")
    spent = engine.begin(torch.full_like(subject.latents(batch), torch.nan), subject.condition(batch, guided))
    engine.fixed_point(spent, 1, subject.shape.tokens)
    reused = brief(engine, subject, begin(engine, subject, batch, guided, reuse=spent))
    other = _other_bits(reused, wanted)
    return Finding(fault=None if other is None else f"the cache of a batch of NaN, used again, changes {other}")


def streams(subject: Subject, batch: int, guided: bool) -> Finding:
    """Two batches whose passes take turns, on a GPU on two streams, have the bits that each has alone."""
    engine, T = subject.engine, subject.shape.tokens
    ends = [*range(1, min(START, T), PIECE), min(START, T)]
    mates = (batch, 1)

    def start(b: int) -> BlockState:
        return begin(engine, subject, b, guided)

    def step(state: BlockState, k: int) -> None:
        engine.reverse(state, None, ends[k], ends[k + 1])

    alone = []
    for b in mates:
        state = start(b)
        for k in range(len(ends) - 1):
            step(state, k)
        alone.append(state.x[:, : ends[-1]].clone())
    states = [start(b) for b in mates]
    on = list(_streams(subject.job.device, len(mates)))
    for k in range(len(ends) - 1):
        for state, stream in zip(states, on, strict=True):
            with stream:
                step(state, k)
    _synchronize(subject.job.device)
    same = all(torch.equal(state.x[:, : ends[-1]], sure) for state, sure in zip(states, alone, strict=True))
    return Finding(fault=None if same else "two batches at the same time change each other")


def variants(subject: Subject, batch: int, guided: bool) -> Finding:
    """Engines that the backend launches in other ways give the same bits."""
    makers = subject.backend.variants(subject.request)
    if not makers:
        return Finding()
    wanted = brief(subject.engine, subject, begin(subject.engine, subject, batch, guided))
    for name, make in makers.items():
        engine = make(subject.weights)
        if (other := _other_bits(brief(engine, subject, begin(engine, subject, batch, guided)), wanted)) is not None:
            return Finding(fault=f"{name}: {other} has other bits")
    return Finding()


LAWS: dict[str, Callable[[Subject, int, bool], Finding]] = {
    "accuracy": accuracy,
    "converge": converge,
    "ragged windows": ragged,
    "inputs unchanged": inputs,
    "NaN stays where it is": isolation,
    "poisoned caches": poison,
    "two batches at once": streams,
    "other launches": variants,
    "same bits again": repeats,
}


def timed_run(engine: BlockEngine, subject: Subject, size: Size) -> Callable[[], None]:
    """Returns a function that runs a piece of the sequential pass half way through the block, and waits for it."""
    state, T = begin(engine, subject, *size), subject.shape.tokens
    state.x.copy_(subject.tokens(size.batch).to(state.x))
    start, stop = subject.middle, min(subject.middle + 2 * PIECE, T)
    if start > 1:
        engine.fixed_point(state, 1, start)

    def run() -> None:
        engine.reverse(state, None, start, stop)
        state.x[:, stop - 1, 0].sum().item()  # waits for the device

    return run


def _off(got: Tensor, exact: Tensor) -> float:
    """Returns the largest difference; NaN where there is one in `got`."""
    if got.numel() == 0:
        return 0.0
    return (got.double() - exact.double()).abs().max().item()


def _other_bits(got: Outputs, wanted: Outputs, rows: slice = slice(None)) -> str | None:
    """Returns the name of the first tensor that is not the same to the bit, in these samples, or None."""
    for name, tensor in wanted.tensors.items():
        if not torch.equal(got.tensors[name][rows], tensor[rows]):
            return name
    return None


def _memory(device: torch.device) -> int:
    """Returns the bytes that this process holds: by torch's allocator on a GPU, else of the machine's memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _streams(device: torch.device, count: int) -> Iterator[AbstractContextManager[Any]]:
    for _ in range(count):
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            yield torch.cuda.stream(stream)
        else:
            yield nullcontext()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
