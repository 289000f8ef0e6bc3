"""The native engines' build: what setup.py compiles, for which GPUs, what it keeps, and what it leaves out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import ExecError

ROOT = Path(__file__).parents[1]
ENGINES = ("_cpu", "_png", "_cuda")


def load_nvcc() -> ModuleType:
    """What setup.py takes from csrc/cuda/nvcc.py."""
    spec = spec_from_file_location("nvcc", Path(__file__).parents[1] / "csrc" / "cuda" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = load_nvcc()


def program(folder: Path, text: str = "#!/bin/sh\n", name: str = "nvcc") -> Path:
    """An nvcc, or what else is to be run, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
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
        with pytest.raises(ValueError, match=rf"^{variable}: expected .*80;90a;100;120, got {bad!r}$"):
            nvcc.architectures({variable: bad})


def test_whether_cuda_is_wanted_from_the_environment() -> None:
    assert nvcc.wanted({}) is None
    assert nvcc.wanted({"TARFLOW_FAST_CUDA": "0"}) is False
    assert nvcc.wanted({"TARFLOW_FAST_CUDA": "1"}) is True
    assert nvcc.wanted({"TARFLOW_FAST_CUDA_ARCHITECTURES": "90a"}) is True
    assert nvcc.wanted({"TARFLOW_FAST_CUDA_ARCHITECTURES": "90a", "TARFLOW_FAST_CUDA": "0"}) is False
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


NVCC_12_4 = "#!/bin/sh\necho compute_80; echo compute_86; echo compute_90\n"


def test_an_older_nvcc_builds_for_what_it_knows(tmp_path: Path) -> None:
    assert nvcc.default(str(program(tmp_path / "12.4", NVCC_12_4))) == ["80", "90a"]
    with pytest.raises(ExecError, match="too old: it compiles for none of 80, 90a, 100, 120"):
        nvcc.default(str(program(tmp_path / "9", "#!/bin/sh\necho compute_70\n")))
    with pytest.raises(ExecError, match="does not say what it compiles for"):
        nvcc.default(str(program(tmp_path / "broken", "#!/bin/sh\nexit 1\n")))


def test_the_gpus_that_are_here_are_compiled_for(tmp_path: Path) -> None:
    """One that nvcc does not know runs what the driver makes of PTX for an older one."""
    compiler = str(program(tmp_path, NVCC_12_4))
    assert nvcc.fitting(compiler, ["90", "86"]) == ["90a", "86"]
    assert nvcc.fitting(compiler, ["120", "100"]) == ["80"]


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("9.0\n9.0\n", ["90"]),
        ("8.6\n12.0\n", ["86", "120"]),
        ("7.5\n8.0\n[N/A]\n", ["80"]),
        ("7.5\n", "no NVIDIA GPU of compute capability 8.0 or later"),
        ("No devices were found\n", "no NVIDIA GPU of compute capability 8.0 or later"),
        (None, "the NVIDIA driver does not say which GPUs are here"),
    ],
)
def test_which_gpus_are_here(says: str | None, found: list[str] | str, tmp_path: Path) -> None:
    text = "#!/bin/sh\nexit 9\n" if says is None else f"#!/bin/sh\nprintf '{says}'\n"
    program(tmp_path, text, "nvidia-smi")
    if isinstance(found, list):
        assert nvcc.gpus({"PATH": str(tmp_path)}) == found
    else:
        with pytest.raises(ExecError, match=found):
            nvcc.gpus({"PATH": str(tmp_path)})


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path) -> None:
    with pytest.raises(ExecError, match="no NVIDIA driver here"):
        nvcc.gpus({"PATH": str(tmp_path)})


# Writes down what it is told to do, and makes an empty file of what it should.
COMPILER = """#!/bin/sh
case "$*" in
  *--version) echo 1.0; exit;;
  *--list-gpu-arch) echo compute_80; echo compute_90; echo compute_100; echo compute_120; exit;;
esac
echo "$0" "$@" >> "$LOG"
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
test -z "$BROKEN"
"""


class Source:
    """A copy of what setup.py needs, whose compilers do not take their time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.bin = folder / "source", folder / "log", folder / "bin"
        shutil.copytree(ROOT / "csrc", self.folder / "csrc")
        for package in ("tarflow_fast", "kernels"):
            (self.folder / package).mkdir()
            (self.folder / package / "__init__.py").touch()
        (self.folder / "tarflow_fast" / "pretrained").mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.folder)
        for name in ("g++", "nvcc"):
            program(self.bin, COMPILER, name)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TARFLOW", "CUDA", "C"))}
        self.environment = {**kept, "PATH": str(self.bin), "CXX": "g++", "LOG": str(self.log)}

    def with_gpu(self, capability: str) -> None:
        program(self.bin, f"#!/bin/sh\necho {capability}\n", "nvidia-smi")

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """As `pip install -e` does it, which gives each build folders of its own."""
        self.log.write_text("", encoding="utf-8")
        code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
        return subprocess.run(
            [sys.executable, "-c", code, str(self.folder / "dist")],
            cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip

    def compiled(self) -> set[str]:
        """Names of the sources that the last build compiled."""
        lines = [line.split() for line in self.log.read_text(encoding="utf-8").splitlines()]
        return {Path(line[line.index("-c") + 1]).name for line in lines if "-c" in line}

    def architectures(self) -> set[str]:
        words = self.log.read_text(encoding="utf-8").split()
        return {word.partition("code=")[2] for word in words if "code=" in word}

    def engines(self) -> list[str]:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return [name for name in ENGINES if (self.folder / "tarflow_fast" / f"{name}{suffix}").exists()]

    def left_out(self, name: str, output: str) -> str:
        """The one line that says so."""
        (line,) = [line for line in output.splitlines() if f"tarflow_fast.{name} was left out: " in line]
        return line


@pytest.fixture
def source(tmp_path: Path) -> Source:
    if sys.platform == "win32":
        pytest.skip("the compilers of these tests are shell scripts")
    return Source(tmp_path)


def names(*folders: str) -> set[str]:
    paths = [path for folder in folders for path in (ROOT / "csrc" / folder).iterdir()]
    return {path.name for path in paths if path.suffix in (".cpp", ".cu")}


HOST = ("cpu", "png")


@pytest.mark.slow
def test_a_second_build_compiles_what_has_changed(source: Source) -> None:
    source.with_gpu("9.0")
    everything = names(*HOST, "cuda")

    def built(**environment: str) -> set[str]:
        done = source.build(**environment)
        assert done.returncode == 0, done.stdout
        assert source.engines() == list(ENGINES)
        return source.compiled()

    assert built() == everything
    assert built() == set()
    with (source.folder / "csrc" / "cpu" / "pack.cpp").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert built() == {"pack.cpp"}
    with (source.folder / "csrc" / "cuda" / "params.h").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert built() == names("cuda")
    assert built(TARFLOW_FAST_CUDA_ARCHITECTURES="80;90a") == {name for name in everything if name.endswith(".cu")}
    assert built(TARFLOW_FAST_CUDA_ARCHITECTURES="80;90a", CXX="g++ -DOTHER") >= names(*HOST)
    program(source.bin, COMPILER.replace("1.0", "2.0"), "g++")
    assert built(TARFLOW_FAST_CUDA_ARCHITECTURES="80;90a", CXX="g++ -DOTHER") >= names(*HOST)


def test_an_object_that_was_not_finished_is_made_again(source: Source) -> None:
    assert source.build(BROKEN="1", TARFLOW_FAST_CUDA="0").returncode == 0
    assert source.engines() == []
    assert source.build(TARFLOW_FAST_CUDA="0").returncode == 0
    assert source.compiled() == names(*HOST)
    assert source.engines() == ["_cpu", "_png"]


def test_a_compiler_is_not_told_of_instructions_that_it_does_not_know(source: Source) -> None:
    """The kernels of a later instruction set are then left out, and those of the others are there."""
    program(source.bin, COMPILER.replace('case "$*" in', 'case "$*" in\n  *-mamx*) echo unknown >&2; exit 1;;'), "g++")
    assert source.build(TARFLOW_FAST_CUDA="0").returncode == 0
    assert source.engines() == ["_cpu", "_png"]
    lines = source.log.read_text(encoding="utf-8").splitlines()
    flags = {Path(line.split(" -c ")[1].split()[0]).stem: line.split() for line in lines if " -c " in line}
    assert "-mavx512bf16" in flags["kernels_avx512_bf16"]
    assert not [flag for flag in flags["kernels_amx_bf16"] if flag.startswith("-m")]


def test_without_a_compiler_the_install_goes_through_without_the_engine(source: Source) -> None:
    """That of an earlier install goes too: it may be of other sources."""
    assert source.build().returncode == 0
    assert source.engines() == ["_cpu", "_png"]
    done = source.build(CXX="/nonexistent/g++")
    assert done.returncode == 0
    line = source.left_out("_cpu", done.stdout)
    assert "no compiler: /nonexistent/g++ cannot be run" in line
    assert "backend 'torch' serves in its place" in line
    assert source.engines() == []


@pytest.mark.parametrize("broken", ["*csrc/png/png.cpp*", pytest.param("*' '-lz*", marks=pytest.mark.slow)])
def test_without_zlib_the_install_goes_through_without_the_reader_of_pngs(broken: str, source: Source) -> None:
    """Where its headers are missing, or the library."""
    program(source.bin, COMPILER.replace('case "$*" in', f'case "$*" in\n  {broken}) exit 1;;'), "g++")
    done = source.build()
    assert done.returncode == 0, done.stdout
    line = source.left_out("_png", done.stdout)
    assert (
        "Pillow serves in its place; to have it, install a C++17 compiler (g++ or clang++) and zlib's headers" in line
    )
    assert source.engines() == ["_cpu"]


def test_nvcc_runs_where_there_is_a_gpu_and_for_that_alone(source: Source) -> None:
    done = source.build()
    assert done.returncode == 0
    assert source.compiled() == names(*HOST)
    line = source.left_out("_cuda", done.stdout)
    assert "no NVIDIA driver here" in line
    assert "TARFLOW_FAST_CUDA=1" in line

    source.with_gpu("10.0")
    assert source.build().returncode == 0
    assert source.compiled() == names("cuda")
    assert source.architectures() == {"sm_100", "compute_100"}

    done = source.build(TARFLOW_FAST_CUDA="0")
    assert source.architectures() == set()
    assert source.engines() == ["_cpu", "_png"]
    assert "TARFLOW_FAST_CUDA=0" in source.left_out("_cuda", done.stdout)


@pytest.mark.parametrize(
    ("environment", "architectures"),
    [
        ({"TARFLOW_FAST_CUDA": "1"}, {"sm_80", "sm_90a", "sm_100", "sm_120", "compute_80"}),
        ({"TARFLOW_FAST_CUDA_ARCHITECTURES": "90a"}, {"sm_90a"}),
    ],
)
def test_an_engine_that_is_asked_for_is_built_without_a_gpu_or_the_install_fails(
    environment: dict[str, str], architectures: set[str], source: Source
) -> None:
    assert source.build(**environment).returncode == 0
    assert source.architectures() == architectures
    assert source.engines() == list(ENGINES)
    assert source.build(**environment, CUDACXX="/nonexistent/nvcc").returncode != 0
    (source.folder / "csrc" / "cuda" / "params.h").write_text("", encoding="utf-8")
    assert source.build(**environment, BROKEN="1").returncode != 0


def test_a_gpu_without_a_working_nvcc_does_not_stop_the_install(source: Source) -> None:
    source.with_gpu("9.0")
    program(source.bin, COMPILER.replace('test -z "$BROKEN"', "exit 1"), "nvcc")
    done = source.build()
    assert done.returncode == 0
    assert "nvcc" in source.left_out("_cuda", done.stdout)
    assert source.engines() == ["_cpu", "_png"]
