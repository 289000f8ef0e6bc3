"""The torch backend's compiled step equals the one that is not."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from engines import GUIDED
from tolerances import GOLDEN, assert_close

from tarflow_fast.backend import make_engines
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.backend import Request

NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # advice of torch.compile on a GPU
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=[NO_COMPILER, pytest.mark.slow])])
def test_compiled_step_equals_eager(compiler: str, guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a second state beside the first: on a GPU the step is a CUDA graph, which is made for one address.

    aot_eager is of torch.compile what comes before code is generated, which takes half a minute.
    """
    if compiler == "aot_eager":
        plain = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda step, dynamic, mode: plain(step, dynamic=dynamic, backend=compiler)
        )
    model = random_model(2, num_classes=2)
    weights = model.block_weights(0)
    condition = Condition(torch.tensor([0, -1], device=KERNEL_DEVICE), guidance)
    latents = [random_latents(model, 2, seed).to(KERNEL_DEVICE) for seed in (0, 1)]
    passes = []
    for compile in (False, True):
        engine = make_engines("torch", [weights], Request(KERNEL_DEVICE, torch.float32, compile))[0]
        states = [engine.begin(z, condition) for z in latents]
        for state in states:
            engine.reverse(state)
        for state in states:  # from token 3 on once more, after a pass that left NaN in the cache behind it
            state.x[:, 6] = torch.nan
            engine.fixed_point(state, 1, model.config.num_patches)
            assert state.x[:, 7:].isnan().all()
            engine.reverse(state, start=3)
        passes.append(states)
    for eager, compiled in zip(*passes, strict=True):
        assert_close(compiled.x, eager.x, GOLDEN)
        assert_close(compiled.token_log_det, eager.token_log_det, GOLDEN)
