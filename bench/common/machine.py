"""What a result was measured on: hardware, system, versions, commit. No name and no path of the machine."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    text = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.is_file() else ""
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.*?)\s*$", text, re.MULTILINE))
    family = f" (family {fields['cpu family']}, model {fields.get('model', '?')})" if "cpu family" in fields else ""
    return (fields.get("model name") or platform.processor() or platform.machine()) + family


def system() -> str:
    """Returns the name of the operating system's release, and the machine's type."""
    name = f"{platform.system()} {platform.release()}"
    if hasattr(platform, "freedesktop_os_release") and Path("/etc/os-release").is_file():
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{name}, {platform.machine()}"


def _output(*command: str) -> str | None:
    """Returns what a program prints; None where it is not installed, or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> dict[str, Any]:
    """Returns the checkout's commit, and whether it has changes or new files beside results; None where not known."""
    git = ("git", "-C", str(ROOT))
    changes = _output(*git, "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": _output(*git, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def describe(device: torch.device) -> dict[str, Any]:
    """Returns a record's "machine", which has "gpu" if `device` is one. load_average is that of the last minute: if
    others than the bench wanted a core, times are suspect."""
    found = {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(psutil.getloadavg()[0], 2),
        "os": system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tarflow_fast": version("tarflow_fast"),
        **commit(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", f"--id=GPU-{gpu.uuid}", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"triton": version("triton"), "cuda": torch.version.cuda, "driver": _output(*query)}
        found["gpu"] = {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}"}
    return found
