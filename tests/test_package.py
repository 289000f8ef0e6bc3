"""The package as users meet it: names, types, the kernels' place, imports that stay downward and light."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import ExecError

import tarflow_fast

PACKAGE = Path(str(files("tarflow_fast")))


def test_every_public_name_is_there() -> None:
    for name in tarflow_fast.__all__:
        value = getattr(tarflow_fast, name)
        assert name == "__version__" or value.__doc__, name
    assert set(tarflow_fast.__all__) == set(tarflow_fast._HOME) | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tarflow_fast.nothing  # noqa: B018


def test_no_module_hides_a_public_name() -> None:
    """Importing tarflow_fast.x sets the attribute x of the package: it must not be a function's name."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(tarflow_fast.__all__)


def test_kernels_are_part_of_the_package() -> None:
    assert import_module("tarflow_fast.kernels").__doc__


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_import_does_not_wait_for_torch() -> None:
    code = "import sys, tarflow_fast, tarflow_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_reference_stands_alone() -> None:
    """It imports torch and the standard library; nothing that it is to judge imports it."""
    ours = {name for name in imports(PACKAGE / "reference.py") if name.startswith((".", "tarflow_fast"))}
    assert not ours
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.endswith("reference") for name in imports(path)), path


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("engine", {"solvers", "sampler", "cli", "trainer", "checkpoint"}),
        ("solvers", {"sampler", "cli", "trainer", "torch_engine", "registry"}),
        ("sampler.py", {"cli", "trainer"}),
        ("denoising.py", {"sampler", "engine", "cli", "trainer"}),
        ("checkpoint.py", {"sampler", "engine", "cli", "trainer"}),
        ("trainer", {"cli"}),
        ("ops.py", {"model", "engine"}),
        ("flow_block.py", {"model", "engine", "cpu_density"}),
        ("cpu_density.py", {"model", "engine", "sampler", "denoising"}),
        ("native.py", {"model", "engine", "cpu_density"}),
    ],
)
def test_imports_run_downwards(lower: str, higher: set[str]) -> None:
    target = PACKAGE / lower
    for path in [target] if target.is_file() else target.rglob("*.py"):
        for name in imports(path):
            assert not higher & set(name.split(".")), f"{path.name} imports {name}"


def load_nvcc() -> ModuleType:
    """What setup.py takes from csrc/cuda/nvcc.py."""
    spec = spec_from_file_location("nvcc", Path(__file__).parents[1] / "csrc" / "cuda" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = load_nvcc()


def program(folder: Path, text: str = "#!/bin/sh\n") -> Path:
    """An nvcc in a folder."""
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def codes(names: list[str]) -> list[str]:
    flags = nvcc.gencode(names)
    assert flags[::2] == ["-gencode"] * (len(flags) // 2)
    return flags[1::2]


def test_cuda_machine_code_for_each_architecture_and_ptx_of_the_lowest_for_others() -> None:
    assert codes(["90a", "100a"]) == ["arch=compute_90a,code=sm_90a", "arch=compute_100a,code=sm_100a"]
    assert codes(["120", "90a", "80"]) == [
        "arch=compute_120,code=sm_120",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_80,code=sm_80",
        "arch=compute_80,code=compute_80",
    ]
    assert codes(nvcc.DEFAULT)[-1] == "arch=compute_80,code=compute_80"


def test_cuda_architectures_from_the_environment() -> None:
    variable = "TARFLOW_FAST_CUDA_ARCHITECTURES"
    assert nvcc.architectures({}) is None
    assert nvcc.architectures({variable: "90a"}) == ["90a"]
    assert nvcc.architectures({variable: "120;80;100f;80"}) == ["120", "80", "100f"]
    for bad in ("", "75", "sm_80", "80,90a", "80;", "8.0", "80 ", "80b", "9０"):
        with pytest.raises(ValueError, match=rf"^{variable}: expected .*80;90a;100a, got {bad!r}$"):
            nvcc.architectures({variable: bad})


def test_whether_cuda_is_wanted_from_the_environment() -> None:
    assert nvcc.wanted({}) is None
    assert nvcc.wanted({"TARFLOW_FAST_CUDA": "0"}) is False
    assert nvcc.wanted({"TARFLOW_FAST_CUDA": "1"}) is True
    for bad in ("", "2", "yes"):
        with pytest.raises(ValueError, match=rf"^TARFLOW_FAST_CUDA: expected 0, 1 or not set, got {bad!r}$"):
            nvcc.wanted({"TARFLOW_FAST_CUDA": bad})


def test_which_nvcc_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDACXX, or else CUDA_HOME's, or else that of the PATH, or else the usual one."""
    monkeypatch.setattr(nvcc, "USUAL_PLACE", str(tmp_path / "usual"))
    environment = {"PATH": str(tmp_path / "path"), "CUDA_HOME": str(tmp_path / "home")}
    with pytest.raises(ExecError, match=r"no nvcc: not in CUDACXX, CUDA_HOME/bin, PATH or .*usual"):
        nvcc.find(environment)
    for folder in ("usual", "path", "home/bin"):
        wanted = program(tmp_path / folder)
        assert nvcc.find(environment) == str(wanted)
    own = program(tmp_path / "own")
    assert nvcc.find({**environment, "CUDACXX": str(own)}) == str(own)
    assert nvcc.find({**environment, "CUDACXX": "nvcc"}) == str(tmp_path / "path" / "nvcc")
    with pytest.raises(ExecError, match=r"^CUDACXX: expected an nvcc that can be run, got '/nonexistent'$"):
        nvcc.find({**environment, "CUDACXX": "/nonexistent"})


def test_an_older_nvcc_builds_for_what_it_knows(tmp_path: Path) -> None:
    assert nvcc.known(program(tmp_path / "12.4", "#!/bin/sh\necho compute_80; echo compute_90\n")) == ["80", "90a"]
    with pytest.raises(ExecError, match="too old: it compiles for none of 80, 90a, 100a"):
        nvcc.known(program(tmp_path / "9", "#!/bin/sh\necho compute_70\n"))
    with pytest.raises(ExecError, match="does not say what it compiles for"):
        nvcc.known(program(tmp_path / "broken", "#!/bin/sh\nexit 1\n"))
