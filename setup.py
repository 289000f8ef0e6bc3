"""The parts of the build that pyproject.toml cannot say: where the packages lie, and the native code.

`kernels/` is a folder of its own at the top and is installed as `tarflow_fast.kernels`. The native modules are
optional: what cannot be built is left out, which one line of the build and `tarflow-fast info` tell, and the install
goes through. csrc/README.md has the compilers and the environment variables.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, ExecError

CPU, CUDA, PNG = Path("csrc/cpu"), Path("csrc/cuda"), Path("csrc/png")
sys.path.insert(0, str(CUDA.absolute()))  # a build in isolation has not even this folder there
import nvcc  # noqa: E402

# Objects stay here from build to build; setuptools' own folders are new each time.
OBJECTS = Path("build", "objects", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
WINDOWS = sys.platform == "win32"
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CALLS = ["-O1"]  # after FLAGS, for what only hands calls on: pybind11's templates take half the compiler's time at -O3
# csrc/cpu/sanitize.sh sets this: which sanitizers to build with.
SANITIZERS = os.environ.get("TARFLOW_FAST_SANITIZERS")
SANITIZE = [f"-fsanitize={SANITIZERS}"] if SANITIZERS else []
if SANITIZE:  # the first finding ends the process, and says in which line it is
    FLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
    FLAGS += ["-O2"]  # of what -O3 does nothing is to be looked at, and compilers take twice as long for it
    CALLS = ["-O0"]
# Hot loops are compiled for each instruction set, after which their source is named; which runs is decided at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
ARM = {"neon_bf16": ["-march=armv8.2-a+bf16"]}
INSTRUCTION_SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine().lower(), {})

CUDA_WANTED = nvcc.wanted(os.environ)
ARCHITECTURES = nvcc.architectures(os.environ)
COMPILER = "LLVM (clang-cl) beside Visual Studio's build tools" if WINDOWS else "a C++17 compiler (g++ or clang++)"
AGAIN = "and install tarflow_fast again"
MENDS = {
    "tarflow_fast._cpu": f"backend 'torch' serves in its place; to have it, install {COMPILER} {AGAIN}",
    "tarflow_fast._png": f"Pillow serves in its place; to have it, install {COMPILER} and zlib's headers {AGAIN}",
    "tarflow_fast._cuda": f"to have it, install the CUDA toolkit, {AGAIN} with {nvcc.WANTED}=1",
}


def instruction_set(source: str) -> str:
    """What a source is named after: of kernels_avx512_bf16.cpp avx512_bf16."""
    return Path(source).stem.partition("_")[2]


def is_bindings(source: str) -> bool:
    return Path(source).stem == "bindings"


def longest_first(sources: list[str]) -> list[str]:
    """pybind11's templates take longest, and then what is compiled for each instruction set."""
    return sorted(sources, key=lambda source: (not is_bindings(source), instruction_set(source) == ""))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def answer(compiler: str, *question: str) -> str:
    """What a compiler says of itself. Raises ExecError if it cannot be run."""
    try:
        return subprocess.run([compiler, *question], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExecError(f"no compiler: {compiler} cannot be run ({error})") from error


def flags_of(compiler: list[str], source: str) -> list[str]:
    """The flags of a source's instruction set: none where the compiler is too old for it, so that it is left out."""
    flags = INSTRUCTION_SETS.get(instruction_set(source), [])
    try:
        if flags and not WINDOWS:  # clang-cl, which has another command line, is new enough
            answer(*compiler, *flags, "-E", "-x", "c++", os.devnull)
    except ExecError:
        return []
    return flags


class BuildNative(build_ext):
    """build_ext with flags for each source file, files compiled side by side, objects that are kept, and nvcc."""

    def run(self) -> None:
        if self.inplace:  # what an earlier install has built must not outlive one that leaves it out
            for name in MENDS:
                Path(self.get_ext_filename(name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == CUDA_ENGINE.name:
                self.build_cuda(ext)
            else:
                self.build_host(ext)
        except (BaseError, CCompilerError) as reason:
            if not ext.optional:
                raise
            self.warn(f"{ext.name} was left out: {reason}; {MENDS[ext.name]}")

    def build_host(self, ext: Extension) -> None:
        runtime = self.use_clang_cl() if WINDOWS else []
        self.compile_all(ext, self.compile_host)
        self.compiler.link_shared_object(
            [*(str(self.object_of(ext, source)) for source in ext.sources), *runtime],
            self.get_ext_fullpath(ext.name),
            libraries=ext.libraries,
            extra_postargs=ext.extra_link_args,
            export_symbols=self.get_export_symbols(ext),
            debug=self.debug,
            target_lang="c++",
        )

    def use_clang_cl(self) -> list[str]:
        """The sources use vectors of GCC and Clang, which Microsoft's own compiler does not have. Returns what
        Microsoft's linker has to be told of: Clang's runtime, which knows the processor's instruction sets."""
        usual = Path(os.environ.get("PROGRAMFILES", "C:/Program Files"), "LLVM", "bin")
        program = shutil.which("clang-cl") or shutil.which("clang-cl", path=str(usual))
        if program is None:
            raise ExecError(f"no clang-cl, neither on the PATH nor in {usual}")
        self.compiler.initialize()
        self.compiler.cc = program
        return [answer(program, "/clang:--rtlib=compiler-rt", "/clang:--print-libgcc-file-name").strip()]

    def build_cuda(self, ext: Extension) -> None:
        if CUDA_WANTED is False:
            raise ExecError(f"{nvcc.WANTED}=0 says so")
        if WINDOWS:
            raise ExecError("it has not been ported to Windows")
        capabilities = [] if CUDA_WANTED else nvcc.gpus(os.environ)
        program = nvcc.find(os.environ)
        names = ARCHITECTURES or (nvcc.fitting(program, capabilities) if capabilities else nvcc.default(program))
        if CUDA_WANTED and not ARCHITECTURES and (missing := [name for name in nvcc.DEFAULT if name not in names]):
            self.warn(f"{program} cannot compile for {', '.join(missing)}: {ext.name} is built without")
        command = [program, *nvcc.FLAGS, *nvcc.gencode(names)]

        def compile(ext: Extension, source: str) -> None:
            if not source.endswith(".cu"):
                self.compile_host(ext, source)
                return
            line = [*command, "-c", source, "-o", str(self.object_of(ext, source))]
            self.keep(ext, source, [program], line, lambda: self.spawn(line))

        self.compile_all(ext, compile)
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(target).parent))
        objects = [str(self.object_of(ext, source)) for source in ext.sources]
        self.spawn([program, *nvcc.LINK_FLAGS, *objects, "-o", target])

    def compile_all(self, ext: Extension, compile: Callable[[Extension, str], None]) -> None:
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(functools.partial(compile, ext), longest_first(ext.sources)))

    def compile_host(self, ext: Extension, source: str) -> None:
        compiler = [self.compiler.cc] if WINDOWS else self.compiler.compiler_so_cxx
        flags = [*ext.extra_compile_args, *flags_of(compiler, source), *(CALLS if is_bindings(source) else [])]
        flags = ["/std:c++17", *(f"/clang:{flag}" for flag in flags)] if WINDOWS else ["-std=c++17", *flags]

        def compile() -> None:
            self.compiler.compile(
                [source],
                output_dir=str(OBJECTS / ext.name),
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
                debug=self.debug,
            )

        self.keep(ext, source, compiler, [*compiler, *flags, f"debug={self.debug}"], compile)

    def object_of(self, ext: Extension, source: str) -> Path:
        return Path(OBJECTS, ext.name, source).with_suffix(self.compiler.obj_extension or ".o")

    def keep(
        self, ext: Extension, source: str, compiler: list[str], line: list[str], compile: Callable[[], None]
    ) -> None:
        """Compiles a source, unless its object is there and was made of the same: this source, these headers, this
        command line, and these versions of the compiler, Python and pybind11."""
        made_of = hashlib.sha256(
            repr((line, answer(*compiler, "--version"), sys.version, EXT_SUFFIX, pybind11.__version__)).encode()
        )
        for name in [source, *ext.depends]:
            made_of.update(name.encode() + b"\0" + Path(name).read_bytes())
        target = self.object_of(ext, source)
        record = target.with_suffix(".sha256")
        if not self.force and target.exists() and record.exists() and record.read_text() == made_of.hexdigest():
            return
        record.unlink(missing_ok=True)  # a compilation that is interrupted must leave none behind
        target.parent.mkdir(parents=True, exist_ok=True)
        compile()
        record.write_text(made_of.hexdigest())


CPU_ENGINE = Extension(
    "tarflow_fast._cpu",
    sources=sorted(map(str, CPU.glob("*.cpp"))),
    depends=sorted(map(str, [*CPU.glob("*.h"), *CPU.glob("*.inl")])),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=FLAGS,
    extra_link_args=[] if WINDOWS else ["-pthread", *SANITIZE],
    language="c++",
    optional=True,
)
PNG_READER = Extension(
    "tarflow_fast._png",
    sources=sorted(map(str, PNG.glob("*.cpp"))),
    depends=sorted(map(str, PNG.glob("*.h"))),
    include_dirs=[pybind11.get_include()],
    libraries=["zlib" if WINDOWS else "z"],
    extra_compile_args=FLAGS,
    extra_link_args=SANITIZE,
    language="c++",
    optional=True,
)
CUDA_ENGINE = Extension(
    "tarflow_fast._cuda",
    sources=sorted(map(str, [*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])),
    depends=sorted(map(str, [*CUDA.glob("*.h"), *CUDA.glob("*.cuh")])),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=["-O2", "-g0", "-fvisibility=hidden"],
    language="c++",
    optional=not CUDA_WANTED,
)

setup(
    packages=[
        *find_packages(include=["tarflow_fast", "tarflow_fast.*"]),
        "tarflow_fast.kernels",
        "tarflow_fast.pretrained",  # data alone
    ],
    package_dir={"tarflow_fast": "tarflow_fast", "tarflow_fast.kernels": "kernels"},
    package_data={"tarflow_fast": ["py.typed"], "tarflow_fast.pretrained": ["*"]},
    ext_modules=[CPU_ENGINE, PNG_READER, CUDA_ENGINE],
    cmdclass={"build_ext": BuildNative},
)
