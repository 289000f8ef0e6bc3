"""The parts of the build that pyproject.toml cannot say: where the packages lie, and the native code.

`kernels/` is a folder of its own at the top and is installed as `tarflow_fast.kernels`. The CPU engine is optional:
without a compiler the install goes through, says so, and `tarflow-fast info` tells what is missing.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
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


class BuildNative(build_ext):
    """build_ext with flags for each source file, and files compiled side by side."""

    def build_extension(self, ext: Extension) -> None:
        intel = platform.machine().lower() in ("x86_64", "amd64")

        def compile(source: str) -> list[str]:
            own = INSTRUCTION_SETS.get(Path(source).name, []) if intel else []
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *own],
                depends=ext.depends,
                debug=self.debug,
            )

        with ThreadPoolExecutor() as pool:
            objects = [name for names in pool.map(compile, ext.sources) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=ext.extra_link_args,
            debug=self.debug,
            target_lang="c++",
        )


setup(
    packages=[*find_packages(include=["tarflow_fast", "tarflow_fast.*"]), "tarflow_fast.kernels"],
    package_dir={"tarflow_fast": "tarflow_fast", "tarflow_fast.kernels": "kernels"},
    package_data={"tarflow_fast": ["py.typed", "pretrained/*"]},
    ext_modules=[
        Extension(
            "tarflow_fast._cpu",
            sources=sorted(map(str, CPU.glob("*.cpp"))),
            depends=sorted(map(str, [*CPU.glob("*.h"), *CPU.glob("*.inl")])),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", *SANITIZE],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
