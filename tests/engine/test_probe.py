"""How engines are tried: what they are given, and how far one is off another."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engines import CPU, GUIDED, engine_of
from torch import Tensor

from tarflow_fast.backend import make_engines
from tarflow_fast.engine import BlockState, Condition, probe, timing
from tarflow_fast.engine.backend import Request


class Off:
    """The torch engine, off by some. Notes the tokens that each part of the pass starts from."""

    def __init__(self, model: Any, off: float = 0.0):
        self.inner, self.off, self.setup_seconds = engine_of(model), off, 0.0
        self.begin = self.inner.begin
        self.given: list[Tensor] = []
        self.parts: list[tuple[int, int]] = []

    def reverse(self, state: BlockState, progress: None, start: int, stop: int) -> None:
        self.given.append(state.x[:, :start].clone())
        self.parts.append((start, stop))
        self.inner.reverse(state, progress, start, stop)
        state.x[:, start:stop] += self.off


@pytest.mark.parametrize(
    ("size", "parts"),
    [
        (2, [(1, 1)]),
        (4, [(1, 4)]),
        (6, [(1, 9)]),
        (8, [(1, 9), (9, 16)]),
        (12, [(1, 9), (9, 17), (17, 25)]),
    ],
)
def test_it_is_the_sequential_pass_to_beyond_the_middle(size: int, parts: list[tuple[int, int]]) -> None:
    model = random_model(3, img_size=size)
    z, engine = random_latents(model, 2), Off(model)
    pieces, seconds = probe.probe(engine, z, Condition(), [])  # type: ignore[arg-type]
    assert list(dict.fromkeys(engine.parts)) == parts
    assert set(engine.parts[len(pieces) :]) == {parts[-1]}  # what is timed
    assert len(engine.parts) >= len(pieces) + timing.RUNS[0]
    assert seconds > 0
    state = engine.inner.begin(z, Condition())
    engine.inner.reverse(state)
    whole = torch.cat([state.x, state.token_log_det.unsqueeze(-1)], dim=-1)[:, 1 : parts[-1][1]]
    assert torch.equal(torch.cat([z.new_zeros(2, 0, 5), *pieces], dim=1), whole)


def test_every_piece_goes_on_from_the_trusted_ones() -> None:
    model = random_model(3, img_size=12)
    z = random_latents(model, 2)
    sure, other = Off(model), Off(model, 0.01)
    trusted, _ = probe.probe(sure, z, Condition(), [])  # type: ignore[arg-type]
    pieces, _ = probe.probe(other, z, Condition(), trusted)  # type: ignore[arg-type]
    for a, b in zip(sure.given[:3], other.given[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(trusted, pieces, strict=True):
        assert not torch.equal(a, b)


def test_differences_are_of_the_worst_sample_and_piece_and_of_log_dets_too() -> None:
    sure = [torch.randn(3, 8, 5) + 1 for _ in range(4)]
    assert probe.difference(sure, sure) == 0
    for place in (slice(0, 4), slice(4, 5)):
        pieces = [piece.clone() for piece in sure]
        pieces[2][1, :, place] += 0.4
        size = sure[2][1, :, :4].square().mean().sqrt().item() if place.start == 0 else 4
        assert probe.difference(pieces, sure) == pytest.approx(0.4 / size, rel=1e-5)
        pieces[2][1, 3, place] = torch.nan
        assert not probe.difference(pieces, sure) <= 1e9
    sure[2][1, 3:, :] = torch.inf  # from there on nothing is known
    pieces = [piece.clone() for piece in sure]
    pieces[2][1, 3:, :] = torch.nan
    assert probe.difference(pieces, sure) == 0
    assert probe.difference([], []) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_disagreement(dtype: torch.dtype) -> None:
    """Another dtype's engine, which is as far off as an engine that rounds otherwise."""
    model = random_model(7, num_classes=3, layers_per_block=2, img_size=12)
    weights = model.block_weights(0)
    make = functools.partial(make_engines, "torch", [weights])
    condition = Condition(torch.tensor([0, 1, -1]), GUIDED)
    half, full = (make(Request(CPU, each))[0] for each in (dtype, torch.float32))
    z = random_latents(model, 3)
    trusted, _ = probe.probe(half, z, condition, [])
    pieces, _ = probe.probe(full, z, condition, trusted)
    assert 0 < probe.difference(pieces, trusted) <= probe.MAX_DEVIATION[dtype]
