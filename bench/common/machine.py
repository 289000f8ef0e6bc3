"""What a result was measured on: hardware, system, versions, commit. No name and no path of the machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

from tarflow_fast.devices import usable_cores

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def cores() -> int:
    """Returns the number of logical cores that this process may use."""
    return usable_cores() or 1


def cpu_model() -> str:
    """Returns the processor's name, with family and model numbers where Linux gives them (names can be vague)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    first, *_ = cpuinfo.read_text().split("\n\n")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    family = f" (family {fields['cpu family']}, model {fields.get('model', '?')})" if "cpu family" in fields else ""
    return (fields.get("model name") or platform.machine()) + family


def system() -> str:
    """Returns the name of the operating system's release, and the machine's type."""
    if hasattr(platform, "freedesktop_os_release") and Path("/etc/os-release").is_file():
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _output(*command: str) -> str | None:
    """Returns what a program prints; None where it is not installed, or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """Returns the checkout's commit, and whether it is dirty: has changes, or new files beside results; None where that
    is not known."""
    git = ("git", "-C", str(ROOT))
    changes = _output(*git, "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": _output(*git, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def gpu(device: torch.device) -> dict[str, Any]:
    """Returns a GPU's name, size and software; its driver is None where there is no nvidia-smi."""
    found = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", f"--id=GPU-{found.uuid}", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "driver": _output(*query),
        "cuda": torch.version.cuda,
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Returns a record's "machine", which has "gpu" if `device` is one.

    load_average: how many processes wanted a core in the last minute; if others than the bench did, times are suspect.
    """
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(psutil.getloadavg()[0], 2),
        "os": system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tarflow_fast": version("tarflow_fast"),
        **commit(),
        **({"triton": version("triton"), "gpu": gpu(device)} if device.type == "cuda" else {}),
    }
