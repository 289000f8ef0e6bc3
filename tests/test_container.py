"""What a container grants: its limits of memory and time, read from folders made to look like Linux's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarflow_fast import Sampler, container, devices
from tarflow_fast.errors import OutOfMemoryError

MIB = 2**20
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "31 23 0:27 {within} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}"


def system(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_with_a_tighter_parent(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": f"{30 * MIB}\n",
        "a/memory.max": f"{500 * MIB}",
        "a/memory.high": f"{400 * MIB}",
        "a/memory.current": f"{350 * MIB}",
        "a/memory.stat": f"anon 5\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\n",
        "a/b/cpu.max": "max 100000",
        "a/cpu.max": "150000 100000",
    }
    root = system(tmp_path, "0::/a/b\n", V2, files)
    assert container.free_memory(root) == 80 * MIB
    assert container.cores(root) == 2


@pytest.mark.parametrize(("within", "path"), [("/", "/box"), ("/docker/7", "/docker/7/box")])
def test_version_1(tmp_path: Path, within: str, path: str) -> None:
    files = {
        "memory/box/memory.limit_in_bytes": f"{700 * MIB}",
        "memory/box/memory.usage_in_bytes": f"{100 * MIB}",
        "memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file 0\n",
        "memory/memory.limit_in_bytes": f"{2**63 - 4096}",
        "memory/memory.usage_in_bytes": f"{900 * MIB}",
        "cpu/box/cpu.cfs_quota_us": "50000",
        "cpu/box/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    mounts = "\n".join(V1.format(name=name, within=within) for name in ("memory", "cpu"))
    root = system(tmp_path, f"4:memory:{path}\n1:cpu:{path}\n0::/\n", mounts, files)
    assert container.free_memory(root) == 601 * MIB
    assert container.cores(root) == 1


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = {"memory.max": "100", "memory.current": "200"}
    assert container.free_memory(system(tmp_path, "0::/", V2, files)) == 0


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files"),
    [
        ("", "", {}),
        ("0::/", V2, {}),
        ("0::/a", V2, {"a/memory.max": "max", "a/memory.current": "5", "a/cpu.max": "max 100000"}),
        ("nonsense", "36 35", {}),
        ("0::/../..", V2, {"memory.max": "many"}),
    ],
)
def test_no_limit(tmp_path: Path, cgroup: str, mounts: str, files: dict[str, str]) -> None:
    root = system(tmp_path, cgroup, mounts, files)
    assert container.free_memory(root) is None
    assert container.cores(root) is None


def test_a_batch_is_what_the_container_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from cases import random_model

    sampler = Sampler(random_model())
    each = sampler.engines[-1].bytes_per_sample(False)
    monkeypatch.setattr(container, "free_memory", lambda: 5 * each)
    assert sampler.sample(9).report.batch_size == 4
    monkeypatch.setattr(container, "free_memory", lambda: each)
    with pytest.raises(OutOfMemoryError):
        sampler.sample(1)


def test_threads_are_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(devices, "usable_cores", lambda: 3)
    assert devices.default_threads() == 3
    monkeypatch.setattr(devices, "usable_cores", lambda: None)
    assert devices.default_threads() == 64


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_limit_of_the_address_space() -> None:
    script = """
import resource, psutil, torch
from tarflow_fast.devices import free_memory
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
assert free_memory(torch.device("cpu")) <= 2**28, free_memory(torch.device("cpu"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
