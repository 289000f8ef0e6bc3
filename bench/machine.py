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

ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """The processor's name, with family and model numbers where Linux gives them (names can be vague)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def system() -> str:
    if hasattr(platform, "freedesktop_os_release") and Path("/etc/os-release").is_file():
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _git(*arguments: str) -> str | None:
    """What git says in this checkout; None where there is no git or no checkout."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """commit: the checkout's; dirty: whether it has changes or new files beside results. None where unknown."""
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def gpu(device: torch.device) -> dict[str, Any]:
    """A GPU's name, size and software; driver: None where nvidia-smi is not to be had."""
    properties = torch.cuda.get_device_properties(device)
    driver = None
    if shutil.which("nvidia-smi") is not None:
        query = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        driver = done.stdout.strip() if done.returncode == 0 else None
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Of the machine; "gpu" if `device` is one.

    load_average: processes that wanted a core in the last minute; above the bench's own, the times are suspect.
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
