"""The facts about nvcc that setup.py, which alone imports this, needs.

They are where nvcc is, its flags, and what it is to compile for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

from setuptools.errors import ExecError

WANTED = "TARFLOW_FAST_CUDA"
ARCHITECTURES = "TARFLOW_FAST_CUDA_ARCHITECTURES"
DEFAULT = ["80", "90a", "100", "120"]
LEAST = 80  # cp.async, and bfloat16 on tensor cores
USUAL_PLACE = "/usr/local/cuda/bin"
# The runtime is linked statically, and a launch is given addresses and a stream: any torch will do.
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
LINK_FLAGS = ["-shared", "-cudart", "static", "--no-device-link"]


def wanted(environment: Mapping[str, str]) -> bool | None:
    """Returns False to leave the CUDA engine out, True if it has to be built, and None to build it if it can be.

    With None it is built for the GPUs that are here.
    """
    value = environment.get(WANTED)
    if value not in (None, "0", "1"):
        raise ValueError(f"{WANTED}: expected 0, 1 or not set, got {value!r}")
    if value is None:
        return True if ARCHITECTURES in environment else None
    return value == "1"


def architectures(environment: Mapping[str, str]) -> list[str] | None:
    """Returns the architectures that are asked for, such as 80 or 90a, each once, or None if none are."""
    value = environment.get(ARCHITECTURES)
    if value is None:
        return None
    names = value.split(";")
    for name in names:
        found = re.fullmatch(r"([1-9]\d+)[af]?", name, re.ASCII)
        if not found or int(found[1]) < LEAST:
            raise ValueError(
                f"{ARCHITECTURES}: expected compute capabilities of {LEAST} or more, such as {';'.join(DEFAULT)}, "
                f"got {value!r}"
            )
    return list(dict.fromkeys(names))


def find(environment: Mapping[str, str]) -> str:
    """Returns the nvcc to use. Raises setuptools' ExecError, which an optional extension may meet, if there is none."""
    if name := environment.get("CUDACXX"):
        if found := shutil.which(name, path=environment.get("PATH")):
            return found
        raise ExecError(f"CUDACXX: expected an nvcc that can be run, got {name!r}")
    places = [f"{home}/bin" for home in [environment.get("CUDA_HOME")] if home]
    for place in [*places, environment.get("PATH", ""), USUAL_PLACE]:
        if found := shutil.which("nvcc", path=place):
            return found
    raise ExecError(f"no nvcc: not in CUDACXX, CUDA_HOME/bin, PATH or {USUAL_PLACE}")


def gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the compute capabilities of the GPUs that are here and new enough, such as 80 or 90, each once.

    nvidia-smi is asked, which comes with every driver. libcuda would have to be loaded into the process of the build,
    where a driver that hangs or crashes could not be survived. Raises ExecError if there are none.
    """
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        raise ExecError("there is no NVIDIA driver here (no nvidia-smi)")
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ExecError(f"the NVIDIA driver does not say which GPUs are here: {error}") from error
    found = ["".join(pair) for pair in re.findall(r"^(\d+)\.(\d)\s*$", listed, re.MULTILINE)]
    names = [name for name in dict.fromkeys(found) if int(name) >= LEAST]
    if not names:
        raise ExecError(f"there is no NVIDIA GPU of compute capability {LEAST / 10} or later here")
    return names


def known(nvcc: str) -> list[str]:
    """Returns all that this nvcc compiles for, such as 80 or 90. Raises ExecError if it cannot be asked."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExecError(f"{nvcc} does not say what it compiles for: {error}") from error
    return re.findall(r"compute_(\d+)", listed)


def default(nvcc: str) -> list[str]:
    """Returns those of DEFAULT that this nvcc can compile for.

    Raises ExecError if there are none, or it cannot be asked.
    """
    able = known(nvcc)
    names = [name for name in DEFAULT if name.rstrip("a") in able]
    if not names:
        raise ExecError(f"{nvcc} is too old: it compiles for none of {', '.join(DEFAULT)}")
    return names


def fitting(nvcc: str, capabilities: list[str]) -> list[str]:
    """Returns the architectures to compile for, to serve GPUs of these compute capabilities.

    Raises ExecError as `default` does.

    A GPU that this nvcc does not know gets the lowest of `default`, whose PTX the driver compiles for it.
    """
    able, lowest = known(nvcc), default(nvcc)[0]
    names = [f"{name}a" if f"{name}a" in DEFAULT else name for name in capabilities]
    return list(dict.fromkeys(name if name.rstrip("a") in able else lowest for name in names))


def gencode(names: list[str]) -> list[str]:
    """Returns nvcc's flags for these architectures.

    Machine code for 80 runs on 8.x alone, that for 100 on 10.x (10.3 too) and that for 120 on 12.x, but that for 90a on
    9.0 alone. For GPUs that none of them fits, later ones too, the driver compiles PTX when the module is loaded, which
    takes minutes the first time. That is the PTX of the lowest architecture without a letter, since PTX for 90a is for
    9.0 alone as well.
    """
    codes = [(name, f"sm_{name}") for name in names]
    plain = [name for name in names if name.isdigit()]
    if plain:
        lowest = min(plain, key=int)
        codes.append((lowest, f"compute_{lowest}"))
    return [part for name, code in codes for part in ("-gencode", f"arch=compute_{name},code={code}")]
