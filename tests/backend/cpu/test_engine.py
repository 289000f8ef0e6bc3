"""The native CPU engine, beyond what tests/engine/ asks of every backend: each instruction set that this machine has,
and bit-equal results for any number of threads and any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from cpu_engines import SHAPES, Problem, engine_of, inverse
from engines import GUIDED, expected
from instruction_sets import every_set
from tolerances import GOLDEN, assert_close

from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.errors import ArgumentError
from tarflow_fast.sampling.sampler import Sampler


@every_set
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_shapes(isa: str, sizes: dict[str, Any], guidance: Guidance) -> None:
    problem = Problem.of(sizes, guidance)
    engine = engine_of(problem.model, 1, instruction_set=isa, threads=1)
    for got, wanted in zip(inverse(engine, problem.z, problem.condition), problem.exact, strict=True):
        assert_close(got, wanted, GOLDEN)


@every_set
@pytest.mark.parametrize(("heads", "threads"), [(1, 2), (2, 3), (3, 2), (4, 3), (5, 3)])
def test_any_number_of_threads_shares_any_number_of_heads(isa: str, heads: int, threads: int) -> None:
    """Threads of one team, with whole heads each or not: equal to one thread, from a cache of NaNs, time after time."""
    model = random_model(8, channels=16 * heads, head_dim=16, layers_per_block=2)
    z = random_latents(model, 3)
    engine = engine_of(model, 0, instruction_set=isa, threads=1)
    wanted = inverse(engine, z, Condition())
    assert_close(wanted[0], expected(model, 0, z, Condition())[0], GOLDEN)
    engine.threads = threads
    for _ in range(3):
        assert all(map(torch.equal, inverse(engine, z, Condition()), wanted))


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_every_batch_and_thread_count_gives_the_same_bits(isa: str, dtype: torch.dtype, guidance: Guidance) -> None:
    """All tiles of rows, both ways of dividing work, batches in several groups: equal to each sample alone."""
    model = random_model(4, num_classes=3, img_size=6, layers_per_block=2, channels=128)
    z = random_latents(model, 101)
    labels = torch.arange(101) % 4 - 1
    engine = engine_of(model, 0, dtype, instruction_set=isa, threads=1)
    alone = [inverse(engine, z[i : i + 1], Condition(labels[i : i + 1], guidance)) for i in range(101)]
    x, log_det = (torch.cat(parts) for parts in zip(*alone, strict=True))
    if dtype == torch.float32:
        assert_close(x, expected(model, 0, z, Condition(labels, guidance))[0], GOLDEN)
    for batch in (*range(1, 26), 48, 65, 101):
        engine.threads = 1 + batch % 3
        got = inverse(engine, z[:batch], Condition(labels[:batch], guidance))
        assert torch.equal(got[0], x[:batch]), batch
        assert torch.equal(got[1], log_det[:batch]), batch


def test_a_nan_is_seen() -> None:
    """What is not finite is not hidden by a maximum or a clamp: it reaches x, and the change of a fixed point."""
    model = random_model(6)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    state.x[1, 0, 0] = torch.nan
    engine.reverse(state)
    assert state.x[0].isfinite().all()
    assert state.x[1, 1:].isnan().all()
    change = engine.fixed_point(state, 1, model.config.num_patches).change
    assert change[1].isnan().all()
    assert not change[0].any()


def test_refused_arguments() -> None:
    model = random_model()
    with pytest.raises(ArgumentError, match=r"^threads: expected"):
        engine_of(model, threads=0)
    engine = engine_of(model)
    with pytest.raises(ArgumentError, match=r"^z: expected"):
        engine.begin(torch.zeros(2, 3, 4), Condition())
    state = engine.begin(random_latents(model, 2), Condition())
    state.x = state.x.double()
    for run in (engine.reverse, lambda state: engine.fixed_point(state, 1, 2)):
        with pytest.raises(ArgumentError, match=r"^state\.x: expected"):
            run(state)


def test_the_sampler_hands_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled engine is asked for so many, and for torch's number, as it is then, where none was given."""
    asked: list[int] = []

    class Spy:
        def __init__(self, native: Any):
            self.native = native

        def __getattr__(self, name: str) -> Any:
            return getattr(self.native, name)

        def run(self, **arguments: Any) -> None:
            asked.append(arguments["threads"])
            self.native.run(**arguments)

    model = random_model(2)
    images = []
    for threads in (None, 3):
        sampler = Sampler(model, backend="cpu", threads=threads)
        for engine in sampler.engines:
            engine._native = Spy(engine._native)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        images.append(sampler.sample(3).images)
    assert asked == [2, 2, 3, 3]
    assert torch.equal(*images)


def test_the_sampler_takes_it_by_default() -> None:
    model = random_model(2, num_classes=3)
    ours, torchs = Sampler(model), Sampler(model, backend="torch")
    assert ours.backend == "cpu"
    a, b = (sampler.sample(5, [0, 1, 2], guidance=1.0) for sampler in (ours, torchs))
    assert_close(a.images, b.images, GOLDEN)
    assert a.report.backend == "cpu"
