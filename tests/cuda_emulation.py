"""The CUDA engine's kernel without a GPU: the same source, built by the host compiler for emulated threads."""

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
WARPS = 2  # of a block: on a GPU 8, which a step takes four times as long for here
FLAGS = (
    "-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",  # which takes a longjmp to another stack for an attack
    "-fno-gnu-unique",  # else two modules of this name in one process share what is static in them
    "-DTARFLOW_EMULATION",
)  # fmt: skip


def compiler_missing() -> str | None:
    """Why nothing can be built, or None."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    return (
        None if shutil.which(compiler) else f"the emulation of CUDA needs a C++ compiler, and {compiler} is not there"
    )


@functools.cache
def emulated(warps: int = WARPS, folder: Path = SOURCES) -> ModuleType:
    """The module `_cuda`, whose device is the CPU; from another folder, of sources that were changed, built quickly."""
    sources = [*folder.glob("*.cu"), *folder.glob("*.cpp"), *folder.glob("emulation/*.cpp")]
    sources = [path for path in sources if path.name != "launch.cu"]
    quickly = [] if folder == SOURCES else ["-O0"]
    return build("_cuda", sources, [f"-DTARFLOW_WARPS={warps}", *quickly], folder)


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), folder: Path = SOURCES) -> ModuleType:
    """The pybind11 module of these sources, which include headers of the folder; compiled once for as long as all stay
    as they are, wherever they lie."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *flags]
    libraries = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    digest = hashlib.sha256(repr((command, libraries, sys.version)).encode())
    headers = [path for path in folder.rglob("*") if path.suffix in (".h", ".cuh")]
    for path in sorted({*sources, *headers}):
        digest.update(path.name.encode() + path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"tarflow_fast_emulation_{os.getuid()}"
    module = cache / digest.hexdigest()[:16] / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            objects = [Path(scratch) / f"{path.name}.o" for path in sources]

            def compile(source: Path, to: Path) -> None:
                _run([*command, f"-I{folder}", *libraries, "-x", "c++", "-c", str(source), "-o", str(to)])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile, sources, objects))
            linked = Path(scratch) / module.name
            _run([*command, "-shared", *map(str, objects), "-o", str(linked)])
            os.replace(linked, module)  # at once: another process may be building it too
    # A name of its own, of which only the end counts for the module: pybind11 gives one name one module.
    spec = importlib.util.spec_from_file_location(f"{module.parent.name}.{name}", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")
