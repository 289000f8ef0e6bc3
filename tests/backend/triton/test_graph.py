"""CUDA graphs of the Triton engine: what is captured, when, and that replaying it changes nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from tolerances import GOLDEN, assert_close
from triton_engines import ON_GPU, TUNED, engine_of

from tarflow_fast import cache
from tarflow_fast.backend.triton import engine as triton_engine
from tarflow_fast.backend.triton import plan as triton_plan
from tarflow_fast.backend.triton.engine import TOKENS_PER_GRAPH
from tarflow_fast.backend.triton.graph import CaptureError
from tarflow_fast.engine import Condition, Guidance


def test_launches_are_run_once_then_captured_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is played on a GPU, with a stand-in for its graphs."""
    model = random_model(img_size=4)
    engine = engine_of(model)
    window = engine._window(engine.begin(random_latents(model, 1), Condition()).cache, 1)
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    def capture(run: Any) -> Graph:
        log.append("capture")
        return Graph()

    monkeypatch.setattr(triton_engine, "capture", capture)
    engine.device = torch.device("cuda")
    for key in ("a", "a", "b", "a"):
        engine._play(window, key, lambda: log.append("run"))
    assert log == ["run", "capture", "replay", "run", "replay"]
    assert engine.setup_seconds > 0


def test_launches_that_failed_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels may not be loaded, which cannot be done during capture."""
    model = random_model(img_size=4)
    engine = engine_of(model)
    window = engine._window(engine.begin(random_latents(model, 1), Condition()).cache, 1)
    monkeypatch.setattr(triton_engine, "capture", lambda run: pytest.fail("captured"))
    engine.device = torch.device("cuda")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            engine._play(window, "a", lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_every_rule_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one workspace: what is guided is compiled into the kernels that a graph replays."""
    model = random_model(img_size=4)
    engine, played = engine_of(model), []
    monkeypatch.setattr(engine, "_play", lambda window, key, run: played.append((window, key)))
    for what in ("a", "b", "ab"):
        state = engine.begin(random_latents(model, 1), Condition(None, Guidance(1.0, what)))
        engine.reverse(state)
        engine.fixed_point(state, 1, 2)
        del state
    assert len({id(window) for window, _ in played}) == 1
    assert len({key for _, key in played}) == len(played) == 6


def test_tokens_are_run_in_graphs_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(img_size=10)
    engine, steps = engine_of(model), []
    monkeypatch.setattr(engine, "_play", lambda window, key, run: steps.append(key[1]))
    state = engine.begin(random_latents(model, 1), Condition())
    seen: list[int] = []
    engine.reverse(state, seen.append)
    assert steps == seen == [TOKENS_PER_GRAPH] * 3  # of T − 1 = 24 tokens
    engine.reverse(state, seen.append, 2, 12)
    assert steps[3:] == seen[3:] == [TOKENS_PER_GRAPH, 2]


@pytest.mark.parametrize("pdl", [True, False])
def test_launches_that_cannot_be_captured_are_made_without_dependent_launch(
    pdl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As drivers before CUDA 12.3 have it. Kernels without it are run once before they are captured, as others are."""
    model = random_model(img_size=4)
    engine = engine_of(model)
    window = engine._window(engine.begin(random_latents(model, 1), Condition()).cache, 1)
    engine.device, engine.pdl, engine.chain.pdl = torch.device("cuda"), pdl, pdl
    log: list[str] = []

    def capture(run: Any) -> Any:
        if engine.chain.pdl or not pdl:
            raise CaptureError("operation not permitted when stream is capturing")
        log.append("capture")
        return SimpleNamespace(replay=lambda: log.append("replay"))

    def play() -> None:
        engine._play(window, "a", lambda: log.append(f"run, pdl={engine.chain.pdl}"))

    monkeypatch.setattr(triton_engine, "capture", capture)
    play()
    if not pdl:
        with pytest.raises(CaptureError, match="not permitted"):
            play()
        return
    for _ in range(3):
        play()
    assert log == ["run, pdl=True", "run, pdl=False", "capture", "replay", "replay"]
    assert engine.pdl is False


def test_tuning_goes_on_without_dependent_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton_plan.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "made up")
    monkeypatch.setattr("tarflow_fast.kernels.launch.Launch.compile", lambda self: None)
    model = random_model(img_size=4)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 1), Condition())
    engine.pdl = engine.chain.pdl = True

    def timed(run: Any, before: Any) -> float:
        if engine.chain.pdl:
            raise CaptureError("operation not permitted when stream is capturing")
        return 1.0

    monkeypatch.setattr(triton_engine, "timed", timed)
    shape = engine._shape(state.cache.size, 1)
    assert TUNED(engine, state.cache, shape) == triton_plan.first(triton_plan.candidates(shape))
    assert engine.pdl is False
    (file,) = (tmp_path / "tiles").iterdir()
    assert '"pdl": false' in file.read_text()


@ON_GPU
def test_eager_steps_graphs_and_dependent_launch_agree() -> None:
    """Bit for bit: a first batch, run launch by launch, others from graphs, and one on another stream."""
    model = random_model(num_classes=3, img_size=10)
    condition = Condition(torch.tensor([0, -1, 2], device=KERNEL_DEVICE), Guidance(1.5, "ab", 0.7, True))
    z = random_latents(model, 3)
    results = []
    for pdl in (False, None):
        engine = engine_of(model, pdl=pdl)
        for stream in (torch.cuda.current_stream(), torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                state = engine.begin(z, condition)
                engine.reverse(state)
                results.append(state.x.cpu())
                del state
    assert torch.isfinite(results[0]).all()
    for other in results[1:]:
        assert torch.equal(other, results[0])


@ON_GPU
def test_passes_of_a_window_are_graphs_too() -> None:
    model = random_model(img_size=10)
    engine, z, T = engine_of(model), random_latents(model, 2), model.config.num_patches
    state = engine.begin(z, Condition())
    for start in range(1, T):
        engine.fixed_point(state, start, T)
    assert set(state.cache.windows) == {1, 2, 4, 8, 16, 24}
    wanted = engine.begin(z, Condition())
    engine.reverse(wanted)
    assert_close(state.x, wanted.x, GOLDEN)


@ON_GPU
def test_tuning_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    model = random_model(img_size=8, layers_per_block=2)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    shape = engine._shape(state.cache.size, 1)
    plan = TUNED(engine, state.cache, shape)
    assert all(getattr(plan, name) in tiles for name, tiles in triton_plan.candidates(shape).items())
    assert engine.setup_seconds > 0
