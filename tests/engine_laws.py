"""Every engine obeys the laws in this module, whichever backend a test gives: the tests of the contract check them, and
those of an engine that is made of several."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engines import GUIDED, engine_of, expected, poisoned
from hypothesis import strategies as st
from tolerances import GOLDEN, assert_close
from torch import Tensor

from tarflow_fast import reference
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.errors import ArgumentError
from tarflow_fast.solvers import sequential


def check_reverse(backend: str, guidance: Guidance, batch: int, k: int, sizes: dict[str, int]) -> None:
    """Checks that the sequential pass is the reference's inverse, and leaves its input alone."""
    model = random_model(3, **sizes)
    labels = torch.arange(-1, batch - 1).clamp(max=1) if model.config.num_classes else None
    condition = Condition(labels, guidance)
    z = random_latents(model, batch)
    given_z = z.clone()
    engine = engine_of(model, k, backend)
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    x, log_det = expected(model, k, z, condition)
    assert_close(state.x, x, GOLDEN)
    assert_close(state.token_log_det, log_det, GOLDEN)
    assert_close(state.log_det, log_det.sum(1), GOLDEN)
    assert torch.equal(z, given_z)


def check_causality(backend: str, guidance: Guidance, bad: float) -> None:
    """Checks that a token depends on those before it alone, also where a later one of the window, or a stale one behind
    it in the cache, overflows."""
    model = random_model(11, num_classes=2, img_size=6)
    condition = Condition(torch.tensor([1, -1]), guidance)
    z, T = random_latents(model, 2), model.config.num_patches
    engine = engine_of(model, 0, backend)
    wanted, spoilt = (engine.begin(z, condition) for _ in range(2))
    spoilt.x[0, 4] = bad
    for state in (wanted, spoilt):
        engine.fixed_point(state, 1, T)
    assert torch.equal(spoilt.x[0, :5], wanted.x[0, :5])
    assert torch.equal(spoilt.x[1], wanted.x[1])
    assert not torch.equal(spoilt.x[0, 5:], wanted.x[0, 5:])
    assert bad == 1e38 or spoilt.x[0, 5:].isnan().all()
    spoilt.x[0, 4:] = wanted.x[0, 4:]
    for state in (wanted, spoilt):  # the cache behind the window is still spoilt
        engine.fixed_point(state, 2, 4)
        engine.fixed_point(state, 4, T)
    assert torch.equal(spoilt.x, wanted.x)


def check_residual(backend: str, nvp: bool) -> None:
    """Checks that the residual of a pass is that of the tokens before it."""
    model = random_model(11, img_size=6, nvp=nvp)
    engine, T = engine_of(model, 0, backend), model.config.num_patches
    state = engine.begin(random_latents(model, 3), Condition())
    weights = {name: value.double() for name, value in model.state_dict().items()}
    for _ in range(3):
        z, _ = reference.block_density(weights, 0, state.x.double().cpu())
        moved = engine.fixed_point(state, 1, T)
        assert_close(moved.residual, (z - state.z.cpu()).abs().amax(-1)[:, 1:], GOLDEN)


def check_progress(backend: str) -> None:
    """Checks that the steps that are told add up to all tokens but the first."""
    model = random_model(img_size=6)
    engine = engine_of(model, 0, backend)
    steps: list[int] = []
    sequential(engine, engine.begin(random_latents(model, 2), Condition()), steps.append)
    assert sum(steps) == model.config.num_patches - 1


def check_reuse(backend: str) -> None:
    """Checks that only memory is reused: not its contents, and what the other block made stays as it is."""
    model = random_model(img_size=6)
    z = random_latents(model, 3)
    first, second = (engine_of(model, k, backend) for k in (1, 0))
    spent = first.begin(z, Condition())
    first.reverse(spent)
    made = spent.x.clone()
    spent.cache.keys_values.fill_(torch.nan)
    state = second.begin(spent.x, Condition(), reuse=spent)
    assert state.cache.keys_values.data_ptr() == spent.cache.keys_values.data_ptr()
    second.reverse(state)
    assert_close(state.x, expected(model, 0, made, Condition())[0], GOLDEN)
    assert torch.equal(spent.x, made)
    other = second.begin(z[:2], Condition(), reuse=spent)
    assert other.cache.keys_values.data_ptr() != spent.cache.keys_values.data_ptr()


def check_autocast(backend: str) -> None:
    """Checks that autocast around an engine changes nothing."""
    model = random_model(img_size=6)
    z = random_latents(model, 2)
    engine = engine_of(model, 0, backend)
    plain, under = engine.begin(z, Condition()), engine.begin(z, Condition())
    engine.reverse(plain)
    with torch.autocast("cpu", torch.bfloat16):
        engine.reverse(under)
    assert torch.equal(plain.x, under.x)


def check_bytes(backend: str, guided: bool) -> None:
    """Checks that what a sample is said to take covers its cache, z and x."""
    model = random_model(num_classes=2)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 3), Condition(None, GUIDED if guided else Guidance()))
    assert state.cache_bytes == state.cache.keys_values.nbytes
    assert 3 * engine.bytes_per_sample(guided) >= state.cache_bytes + state.z.nbytes + state.x.nbytes


def memory_held(data: st.DataObject, dtype: torch.dtype) -> float:
    """Yields while a cache is no number before it is written to, or one whose products overflow."""
    held: float = data.draw(st.sampled_from([torch.nan, torch.finfo(dtype).max]))
    return held


def check_windows(
    backend: str, dtype: torch.dtype, tolerance: float, guidance: Guidance, data: st.DataObject, img_size: int = 6
) -> None:
    """Checks that windows [start, stop), repeated stop − start times one after the other, give the sequential
    result."""
    model = random_model(11, dtype, num_classes=2, img_size=img_size)
    T = model.config.num_patches
    cuts = sorted({1, T, *data.draw(st.lists(st.integers(1, T), max_size=4))})
    condition = Condition(torch.tensor([1, -1]), guidance)
    z = random_latents(model, 2, seed=data.draw(st.integers(0, 9)))
    engine = engine_of(model, 0, backend, dtype)
    wanted = poisoned(engine, z, condition)
    engine.reverse(wanted)
    state = engine.begin(z, condition)
    state.cache.keys_values.fill_(memory_held(data, dtype))
    for start, stop in itertools.pairwise(cuts):
        for passes in range(stop - start):
            before = state.x.clone()
            moved = engine.fixed_point(state, start, stop)
            assert moved.change.shape == moved.residual.shape == (2, stop - start)
            assert_close(moved.change, (state.x - before)[:, start:stop].abs().amax(-1), 0.0)
            assert torch.equal(state.x[:, stop:], before[:, stop:])
            # after p passes the first p tokens of the window are final
            assert_close(state.x[:, : start + passes + 1], wanted.x[:, : start + passes + 1], tolerance)
    assert_close(state.token_log_det[:, 1:], wanted.token_log_det[:, 1:], tolerance)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Asserts that both are the same bit for bit, or NaN in both."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def check_parts(
    backend: str, dtype: torch.dtype, tolerance: float, guidance: Guidance, data: st.DataObject, img_size: int = 6
) -> None:
    """Checks that any parts, each by either pass, are the whole; what is beyond a part stays as it is, and is not
    looked at."""
    model = random_model(11, dtype, num_classes=2, img_size=img_size, layers_per_block=2)
    T = model.config.num_patches
    cuts = sorted([1, T, *data.draw(st.lists(st.integers(1, T), max_size=4))])
    condition = Condition(torch.tensor([1, -1]), guidance)
    z = random_latents(model, 2, seed=data.draw(st.integers(0, 9)))
    engine = engine_of(model, 0, backend, dtype)
    wanted = poisoned(engine, z, condition)
    engine.reverse(wanted)
    state = poisoned(engine, z, condition)
    for start, stop in itertools.pairwise(cuts):
        before, log_det = state.x.clone(), state.token_log_det.clone()
        steps = [0]
        if start == stop or data.draw(st.booleans()):
            engine.reverse(state, steps.append, start, stop)
            assert sum(steps) == stop - start
        else:
            for _ in range(stop - start):
                engine.fixed_point(state, start, stop)
        outside = torch.ones(T, dtype=torch.bool)
        outside[start:stop] = False
        assert_same(state.x[:, outside], before[:, outside])
        assert_same(state.token_log_det[:, outside], log_det[:, outside])
    assert_close(state.x, wanted.x, tolerance)
    assert_close(state.token_log_det, wanted.token_log_det, tolerance)
    assert state.first_nonfinite().tolist() == [T, T]


def check_raggedness(backend: str) -> None:
    """Checks that an engine takes a window for each sample if it says so, and refuses it otherwise."""
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    assert engine.ragged == (backend != "triton")
    if engine.ragged:
        engine.fixed_point(state, [1, 1], [3, 2])
    else:
        with pytest.raises(ArgumentError, match=r"^start, stop: expected integers .*, got \(\[1, 1\], \[3, 2\]\)"):
            engine.fixed_point(state, [1, 1], [3, 2])


def check_window_refused(backend: str, window: tuple[Any, Any]) -> None:
    """Checks that a window outside of the sequence is refused before any work."""
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    with pytest.raises(ArgumentError, match=r"^start, stop: expected integers with 1 <= start < stop <= 4"):
        engine.fixed_point(state, *window)
    assert torch.equal(state.x, state.z)


def check_part_refused(backend: str, part: tuple[Any, Any]) -> None:
    """Checks that a part outside of the sequence is refused before any work."""
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    with pytest.raises(ArgumentError, match=r"^start, stop: expected integers with 1 <= start <= stop <= 4"):
        engine.reverse(state, None, *part)
    assert torch.equal(state.x, state.z)
