"""`accelerate` takes any module with ml-tarflow's state dict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import GOLDEN as CASES
from cases import Case, random_latents, random_model
from tolerances import GOLDEN, assert_close
from torch import nn

from tarflow_fast.adapters import accelerate
from tarflow_fast.errors import ArgumentError, CheckpointError
from tarflow_fast.sampling.sampler import Sampler

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Published(nn.Module):
    """Somebody else's module: ml-tarflow's state dict under a root of its own, and what accelerate may read."""

    def __init__(self, case: Case):
        super().__init__()
        model = case.model()
        self.blocks = model.blocks
        self.register_buffer("var", model.var)
        self.patch_size = case.constructor["patch_size"]


@golden
def test_accelerate_takes_any_module_with_the_state_dict(case: Case) -> None:
    theirs = Published(case)
    before = copy.deepcopy(theirs.state_dict())
    z = case.tensor("in.z")
    fast = accelerate(theirs)
    assert_close(fast.reverse(z, case.y, **case.reverse_args), case.tensor("out.reverse"), GOLDEN)
    wrapped = accelerate(nn.DataParallel(theirs))
    assert_close(wrapped.reverse(z, case.y, **case.reverse_args), case.tensor("out.reverse"), GOLDEN)
    assert torch.equal(z, case.tensor("in.z"))
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())


def test_accelerate_reads_the_number_of_heads() -> None:
    model = random_model(head_dim=16)
    theirs = nn.Module()
    theirs.blocks, theirs.patch_size = model.blocks, model.patch_size
    theirs.register_buffer("var", model.var)
    z = random_latents(model, 2)
    assert_close(accelerate(theirs).reverse(z), Sampler(model).reverse(z), 0.0)


@pytest.mark.parametrize("model", [None, "model.pth", nn.Linear(3, 3), nn.Module()], ids=repr)
def test_accelerate_refuses_what_is_no_tarflow(model: Any) -> None:
    with pytest.raises((ArgumentError, CheckpointError), match=r"TarFlow|torch module"):
        accelerate(model)
