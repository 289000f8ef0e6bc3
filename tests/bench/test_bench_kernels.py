"""`bench kernels`, of the CUDA engine: what cuobjdump says becomes a table, and what exceeds a limit a failure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import Result
from stand_in import bench

pytest.importorskip("triton")  # its cuobjdump is asked

from bench.suites.kernels import cuda, linted, suite
from bench.suites.kernels.compiled import SHARED_LIMIT, SIZES, Compiled


def usage(
    *codes: str, type: str = "13__nv_bfloat16", registers: int = 200, stack: int = 0, local: int = 0, shared: int = 0
) -> str:
    """As cuobjdump prints it, of a kernel for 64 rows in 8 warps."""
    function = f" Function _ZN7tarflow11pass_kernelI{type}Li8ELi8EEEvNS_6ParamsE:\n"
    numbers = f"  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:{local} CONSTANT[0]:1720 TEXTURE:0 SAMPLER:0\n"
    head = "\nFatbin elf code:\n================\narch = sm_{}\ncode version = [1,8]\nhost = linux\n\nResource usage:\n"
    ptx = "\nFatbin ptx code:\n================\narch = sm_80\ncompressed\nptxasOptions = \n"
    return ptx + "".join(head.format(code) + " Common:\n  GLOBAL:0\n" + function + numbers for code in codes)


def run(
    monkeypatch: pytest.MonkeyPatch, text: str, *more: str, found: dict[tuple[int, str], tuple[str, ...]] | None = None
) -> Result:
    monkeypatch.setattr(cuda, "module_path", lambda: "_cuda.so")
    monkeypatch.setattr(suite, "resource_usage", lambda path: text)
    monkeypatch.setattr(suite, "cuda_findings", lambda path: found or {})
    return bench("kernels", "--only", "cuda", *more)


def test_an_instance_is_a_row_for_each_architecture_that_is_asked_for() -> None:
    rows = list(cuda.survey(usage("80", "90a", "120"), [80, 90]))
    assert [row.architecture for row in rows] == [80, 90]
    for row in rows:
        assert (row.tile, row.warps, row.registers, row.stack) == ("bfloat16 rows=64", 8, 200, 0)
        assert SHARED_LIMIT[row.architecture] * 0.5 < row.shared <= SHARED_LIMIT[row.architecture]
        assert row.fault is None
    for type, name in (("6__half", "float16"), ("f", "float32")):
        (row,) = cuda.survey(usage("90a", type=type), [90])
        assert row.tile == f"{name} rows=64"


def test_what_cuda_reserves_is_no_static_shared_memory() -> None:
    for architecture, reserved in ((80, 0), (90, 1024), (100, 1024)):
        dynamic = max(cuda.dynamic_bytes(name, torch.bfloat16, 64, 8, architecture) for name in SIZES)
        for static in (0, 512):
            (row,) = cuda.survey(usage(str(architecture), shared=reserved + static), [architecture])
            assert row.shared == dynamic + static


def test_a_kernel_that_is_no_instance_is_no_row() -> None:
    for text in (usage("80").replace("pass_kernel", "other_kernel"), usage("80", type="d")):
        with pytest.raises(ValueError, match="expected instances of pass_kernel alone, got _ZN7tarflow"):
            list(cuda.survey(text, [80]))


def test_limits_of_an_architecture() -> None:
    fits = Compiled("k", 80, "", warps=8, registers=255, stack=0, shared=SHARED_LIMIT[80])
    assert fits.fault is None
    assert replace(fits, stack=8).fault == "spills 8 bytes"
    assert replace(fits, warps=9, registers=224).fault is None
    assert replace(fits, warps=9, registers=225).fault == "wants 66816 registers, there are 65536"  # 232 a thread
    assert "bytes of shared memory, there are 166912" in str(replace(fits, shared=fits.shared + 1).fault)


def test_the_table_of_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, usage("80", "90a"))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1] == "CUDA: not built for 100"
    assert [line.split()[:5] for line in lines[2:]] == [["cuda", "pass", sm, "200", "0"] for sm in ("80", "90")]
    assert all(line.endswith("bfloat16 rows=64 warps=8") for line in lines[2:])
    assert run(monkeypatch, usage("80", "90a"), "--arch", "90").output.splitlines()[1:] == lines[3:]


@pytest.mark.parametrize("spill", [{"stack": 200}, {"local": 200}], ids=str)
def test_a_spill_fails(monkeypatch: pytest.MonkeyPatch, spill: dict[str, int]) -> None:
    result = run(monkeypatch, usage("80", "90a", **spill))
    assert result.exit_code == 1
    assert result.output.count("FAULT: spills 200 bytes") == 2
    assert "2 kernels spill, do not fit or break a rule" in result.output


def test_a_broken_rule_fails_unless_it_is_kept_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "_ZN7tarflow11pass_kernelI13__nv_bfloat16Li8ELi8EEEvNS_6ParamsE"
    monkeypatch.setattr(linted, "LATER", frozenset({"narrow store"}))
    found = {(90, kernel): ("narrow store: four", "plain load: LDG.E at 0x10")}
    result = run(monkeypatch, usage("80", "90a"), found=found)
    assert result.exit_code == 1
    assert "FAULT: plain load: LDG.E at 0x10\n    later: narrow store: four\n" in result.output
    assert result.output.count("FAULT") == 1
    late = {(90, kernel): ("narrow store: four",)}
    assert run(monkeypatch, usage("80", "90a"), found=late).exit_code == 0


def test_static_memory_beyond_the_limit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, usage("80", shared=2**16))
    assert result.exit_code == 1
    assert "FAULT: wants" in result.output


def test_without_the_engine_its_kernels_cannot_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "module_path", lambda: None)
    result = bench("kernels", "--only", "cuda")
    assert result.exit_code == 1
    assert "the CUDA engine was not built here" in result.output
