"""What setup.py, which alone imports this, needs to know of nvcc: whether it is wanted, where it is, and its flags."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

from setuptools.errors import ExecError

WANTED = "TARFLOW_FAST_CUDA"
ARCHITECTURES = "TARFLOW_FAST_CUDA_ARCHITECTURES"
DEFAULT = ["80", "90a", "100a"]
LEAST = 80  # cp.async, and bfloat16 on tensor cores
USUAL_PLACE = "/usr/local/cuda/bin"
# The runtime is linked statically, and a launch is given addresses and a stream: any torch will do.
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
LINK_FLAGS = ["-shared", "-cudart", "static", "--no-device-link"]


def wanted(environment: Mapping[str, str]) -> bool | None:
    """False: leave the CUDA engine out; True: it has to be built; None: where that goes well."""
    value = environment.get(WANTED)
    if value not in (None, "0", "1"):
        raise ValueError(f"{WANTED}: expected 0, 1 or not set, got {value!r}")
    return None if value is None else value == "1"


def architectures(environment: Mapping[str, str]) -> list[str] | None:
    """Those that are asked for, such as 80 or 90a, each once; None if none are."""
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
    """The nvcc to use. Raises setuptools' ExecError, which an optional extension may meet, if there is none."""
    if name := environment.get("CUDACXX"):
        if found := shutil.which(name, path=environment.get("PATH")):
            return found
        raise ExecError(f"CUDACXX: expected an nvcc that can be run, got {name!r}")
    places = [f"{home}/bin" for home in [environment.get("CUDA_HOME")] if home]
    for place in [*places, environment.get("PATH", ""), USUAL_PLACE]:
        if found := shutil.which("nvcc", path=place):
            return found
    raise ExecError(f"no nvcc: not in CUDACXX, CUDA_HOME/bin, PATH or {USUAL_PLACE}")


def known(nvcc: str) -> list[str]:
    """Those of DEFAULT that this nvcc can compile for. Raises ExecError if there are none, or it cannot be asked."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExecError(f"{nvcc} does not say what it compiles for: {error}") from error
    names = [name for name in DEFAULT if f"compute_{name.rstrip('a')}" in listed]
    if not names:
        raise ExecError(f"{nvcc} is too old: it compiles for none of {', '.join(DEFAULT)}")
    return names


def gencode(names: list[str]) -> list[str]:
    """nvcc's flags for these architectures.

    Machine code for 80 runs on 8.x alone, and that for 90a or 100a on 9.0 or 10.0 alone. For GPUs that none of them
    fits, later ones too, the driver compiles PTX when the module is loaded: that of the lowest architecture without a
    letter, since PTX for 90a or 100a is for these alone as well.
    """
    codes = [(name, f"sm_{name}") for name in names]
    plain = [name for name in names if name.isdigit()]
    if plain:
        lowest = min(plain, key=int)
        codes.append((lowest, f"compute_{lowest}"))
    return [part for name, code in codes for part in ("-gencode", f"arch=compute_{name},code={code}")]
