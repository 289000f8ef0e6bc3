"""The parts of the build that pyproject.toml cannot say: where the packages lie, and the native code.

`kernels/` is a folder of its own at the top and is installed as `tarflow_fast.kernels`. The native engines are
optional: without a compiler the install goes through, says so, and `tarflow-fast info` tells what is missing.
csrc/README.md has the environment variables of the CUDA engine.
"""

import os
import platform
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

CPU, CUDA = Path("csrc/cpu"), Path("csrc/cuda")
sys.path.insert(0, str(CUDA.absolute()))  # a build in isolation has not even this folder there
import nvcc  # noqa: E402

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
# csrc/cpu/sanitize.sh sets this: which sanitizers to build with.
SANITIZERS = os.environ.get("TARFLOW_FAST_SANITIZERS")
SANITIZE = [f"-fsanitize={SANITIZERS}"] if SANITIZERS else []
if SANITIZE:  # the first finding ends the process, and says in which line it is
    FLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
# One set of hot loops, compiled for each instruction set; which of them runs is decided when it runs.
INSTRUCTION_SETS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_avx512.cpp": AVX512,
    "kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
CUDA_WANTED = nvcc.wanted(os.environ)
ARCHITECTURES = nvcc.architectures(os.environ)


class BuildNative(build_ext):
    """build_ext with flags for each source file, files compiled side by side, and nvcc."""

    def build_extension(self, ext: Extension) -> None:
        cuda = self.cuda_command() if ext.name == CUDA_ENGINE.name else []

        def compile(source: str) -> list[str]:
            return self.compile_cuda(cuda, ext, source) if source.endswith(".cu") else self.compile_host(ext, source)

        with ThreadPoolExecutor() as pool:
            objects = [name for names in pool.map(compile, ext.sources) for name in names]
        target = self.get_ext_fullpath(ext.name)
        if cuda:
            self.mkpath(str(Path(target).parent))
            self.spawn([cuda[0], *nvcc.LINK_FLAGS, *objects, "-o", target])
        else:
            self.compiler.link_shared_object(
                objects, target, extra_postargs=ext.extra_link_args, debug=self.debug, target_lang="c++"
            )

    def compile_host(self, ext: Extension, source: str) -> list[str]:
        intel = platform.machine().lower() in ("x86_64", "amd64")
        own = INSTRUCTION_SETS.get(Path(source).name, []) if intel else []
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *own],
            depends=ext.depends,
            debug=self.debug,
        )

    def cuda_command(self) -> list[str]:
        program = nvcc.find(os.environ)
        names = ARCHITECTURES or nvcc.known(program)
        if missing := [name for name in ARCHITECTURES or nvcc.DEFAULT if name not in names]:
            self.warn(f"{program} cannot compile for {', '.join(missing)}: {CUDA_ENGINE.name} is built without")
        return [program, *nvcc.FLAGS, *nvcc.gencode(names)]

    def compile_cuda(self, command: list[str], ext: Extension, source: str) -> list[str]:
        """Unless the object is there: it takes minutes. Objects of other flags lie elsewhere."""
        folder = Path(self.build_temp, f"nvcc-{zlib.crc32(repr(command).encode()):08x}")
        target = str(folder / Path(source).with_suffix(".o").name)
        if self.force or newer_group([source, *ext.depends], target):
            self.mkpath(str(folder))
            self.spawn([*command, "-c", source, "-o", target])
        return [target]


CPU_ENGINE = Extension(
    "tarflow_fast._cpu",
    sources=sorted(map(str, CPU.glob("*.cpp"))),
    depends=sorted(map(str, [*CPU.glob("*.h"), *CPU.glob("*.inl")])),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread", *SANITIZE],
    language="c++",
    optional=True,
)
CUDA_ENGINE = Extension(
    "tarflow_fast._cuda",
    sources=sorted(map(str, [*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])),
    depends=sorted(map(str, [*CUDA.glob("*.h"), *CUDA.glob("*.cuh")])),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
    language="c++",
    optional=not CUDA_WANTED,
)

setup(
    packages=[*find_packages(include=["tarflow_fast", "tarflow_fast.*"]), "tarflow_fast.kernels"],
    package_dir={"tarflow_fast": "tarflow_fast", "tarflow_fast.kernels": "kernels"},
    package_data={"tarflow_fast": ["py.typed", "pretrained/*"]},
    ext_modules=[CPU_ENGINE] if CUDA_WANTED is False else [CPU_ENGINE, CUDA_ENGINE],
    cmdclass={"build_ext": BuildNative},
)
