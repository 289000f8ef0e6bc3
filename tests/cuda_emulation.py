"""The CUDA engine's kernel runs here without a GPU: the host compiler builds the same source for emulated threads.

What was built is kept in a folder of temporary files, and shared by all processes of a test run and by later runs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
WARPS = 2  # of a block: on a GPU 8, which a step takes four times as long for here
FLAGS = (
    "-std=c++17", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",  # which takes a longjmp to another stack for an attack
    "-fno-gnu-unique",  # else two modules of this name in one process share what is static in them
    "-DTARFLOW_EMULATION",
)  # fmt: skip


def compiler_missing() -> str | None:
    """Returns why nothing can be built, or None."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    return (
        None if shutil.which(compiler) else f"the emulation of CUDA needs a C++ compiler, and {compiler} is not there"
    )


@functools.cache
def emulated(warps: int = WARPS, folder: Path = SOURCES, gates: bool = True) -> ModuleType:
    """Returns the module `_cuda`, whose device is the CPU. folder: of sources that were changed, which are built
    quickly. gates: whether the device has those of csrc/cuda/pair.cuh, as those of compute capability 9 and 10 do."""
    sources = [*folder.glob("*.cu"), *folder.glob("*.cpp"), *folder.glob("emulation/*.cpp")]
    sources = [path for path in sources if path.name != "launch.cu"]
    flags = [f"-DTARFLOW_WARPS={warps}", *([] if gates else ["-DTARFLOW_NO_GATES"])]
    return build("_cuda", sources, flags, folder, optimise=folder == SOURCES)


def build(
    name: str, sources: Sequence[Path], flags: Sequence[str] = (), folder: Path = SOURCES, optimise: bool = True
) -> ModuleType:
    """Returns the pybind11 module of these sources, which include headers of the folder. It is compiled once for as
    long as all stay as they are, wherever they lie."""
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS]
    libraries = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    headers = [path for path in folder.rglob("*") if path.suffix in (".h", ".cuh")]
    files = [(path.name, path.read_bytes()) for path in sorted({*sources, *headers})]
    key = _digest(compiler, libraries, flags, optimise, sys.version, files)
    cache = Path(tempfile.gettempdir()) / f"tarflow_fast_emulation_{os.getuid()}"
    module = cache / key / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compiled(source: Path) -> Path:
        # Bindings are most of what there is to compile, and take none of the time.
        level = "-O2" if optimise and "pybind11" not in source.read_text() else "-O0"
        command = [*compiler, level, *flags, f"-I{folder}", *libraries, "-x", "c++", str(source)]
        text = _run([*command, "-E", "-P"])  # whatever of headers and macros this file does not see makes it no other
        return made_once(
            cache / "objects" / f"{_digest(compiler, level, text)}.o",
            lambda to: _run([*command, "-c", "-o", str(to)]),
        )

    def link(to: Path) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        _run([*compiler, "-shared", *map(str, objects), "-o", str(to)])

    made_once(module, link)
    # A name of its own, of which only the end counts for the module: pybind11 gives one name one module.
    spec = importlib.util.spec_from_file_location(f"{key}.{name}", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Returns the file, which the first of all threads and processes that ask for it makes while the others wait."""
    if not path.exists():
        import fcntl  # not to be had where the emulation is not

        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = path.with_suffix(".unfinished")
                make(unfinished)
                unfinished.replace(path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


IN_EMULATION = pytest.mark.skipif(
    torch.cuda.is_available() or compiler_missing() is not None,
    reason="of the emulation of CUDA, which is for machines with a compiler and no GPU",
)
