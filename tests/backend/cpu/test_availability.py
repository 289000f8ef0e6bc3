"""Which instruction set the native CPU engine takes, and what serves in its place where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cases import random_model
from cpu_engines import engine_of
from engines import CPU
from instruction_sets import SETS

from tarflow_fast.backend import backends, choose_backend
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import BackendError
from tarflow_fast.native import ISA_VARIABLE, choose_instruction_set
from tarflow_fast.sampling.sampler import Sampler


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert engine_of(model).instruction_set == choose_instruction_set() == SETS[0]
    for name in SETS:
        monkeypatch.setenv(ISA_VARIABLE, name)
        assert engine_of(model).instruction_set == name
        assert name in next(status.reason for status in backends() if status.name == "cpu")
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(BackendError, match="TARFLOW_FAST_CPU_ISA: 'sse9' cannot be had here; choose one of"):
        engine_of(model)
    with pytest.raises(BackendError, match="sse9"):
        Sampler(model)
    assert not next(status for status in backends() if status.name == "cpu").available


@pytest.mark.skipif("avx512_bf16" not in SETS or not Path("/proc/cpuinfo").is_file(), reason="one set to choose from")
def test_dot_products_are_chosen_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's take as long as four multiply-adds of fp32, which do twice as much; AMD's as long as one. AMX wins."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert choose_instruction_set() == ("amx_bf16" if "amx_bf16" in SETS else "avx512" if intel else "avx512_bf16")


def test_what_it_cannot_do_goes_to_torch_with_the_reason() -> None:
    assert choose_backend("auto", Request(CPU, torch.float32, False))[0] == "cpu"
    assert choose_backend("auto", Request(CPU, torch.bfloat16, False))[0] == "cpu"
    for dtype, compile, reason in (
        (torch.float64, False, "no float64"),
        (torch.float16, False, "no float16"),
        (torch.float32, True, "nothing to compile"),
    ):
        name, why = choose_backend("auto", Request(CPU, dtype, compile))
        assert name == "torch"
        assert reason in why
        with pytest.raises(BackendError, match=rf"backend 'cpu' cannot be had: .*{reason}.* or\s.*backend='torch'"):
            choose_backend("cpu", Request(CPU, dtype, compile))
    with pytest.raises(BackendError, match="cannot be had: it runs on the CPU, and this is cuda"):
        choose_backend("cpu", Request(torch.device("cuda"), torch.float32, False))


def test_without_the_compiled_module_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tarflow_fast._cpu", None)
    name, why = choose_backend("auto", Request(CPU, torch.float32, False))
    assert name == "torch"
    assert "install a C++17 compiler" in why
    status = next(status for status in backends() if status.name == "cpu")
    assert not status.available
    assert status.reason == why
    with pytest.raises(BackendError, match="was not built"):
        Sampler(random_model(), backend="cpu")
