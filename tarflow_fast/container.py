"""The memory and the cores that Linux's control groups (v1 and v2), and so a container, let this process have.

A group is within the limits of all its parents. What cannot be read, as on other systems, limits nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Mount(NamedTuple):
    """A mounted hierarchy of groups.

    folder: where it is mounted. within: the group that this folder shows. controllers: the names of its controllers, or
    None in version 2, which has all.
    """

    folder: Path
    within: str
    controllers: frozenset[str] | None


def free_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process may still get before a group is at its limit, or None without a limit.

    Pages of files count as free, since the kernel drops them first. root: the folder where `proc` and the mounts are.
    """
    free = []
    for group, version in _groups("memory", root):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if (limit := _number(group / name)) is not None]
        used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if limits and used is not None:
            prefix = "" if version == 2 else "total_"
            files = _table(group / "memory.stat")
            dropped = sum(files.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            free.append(max(0, min(limits) - max(0, used - dropped)))
    return min(free, default=None)


def cores(root: Path = Path("/")) -> int | None:
    """Returns how many cores' worth of time this process may take, rounded up, or None without a limit."""
    shares = []
    for group, version in _groups("cpu", root):
        if version == 2:
            quota, period = [*_text(group / "cpu.max").split(), "", ""][:2]
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:  # "max" and -1 are no limit
            shares.append(math.ceil(int(quota) / int(period)))
    return max(1, min(shares)) if shares else None


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield this process's groups of a controller and all their parents, as folders, each with its version."""
    mounts = _mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        for mount in mounts:
            if mount.controllers is None:
                if names:
                    continue
            elif controller not in mount.controllers or controller not in names.split(","):
                continue
            inside = path.removeprefix(mount.within.rstrip("/")).strip("/")
            parts = [] if ".." in inside.split("/") else [part for part in inside.split("/") if part]
            for depth in range(len(parts), -1, -1):
                yield mount.folder.joinpath(*parts[:depth]), 2 if mount.controllers is None else 1


@functools.cache
def _mounts(root: Path) -> list[_Mount]:
    """Returns the mounted hierarchies of groups.

    Lines of mountinfo read `36 35 98:0 /within /folder rw,noatime … - cgroup2 source options`.
    """
    found = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[2].split(",")) if kind[0] == "cgroup" else None
        found.append(_Mount(root / fields[4].strip("/"), fields[3], controllers))
    return found


def _text(path: Path) -> str:
    """Returns the text of a file without the space around it, or "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    """Returns the number in a file, or None where there is no such file or no limit ("max")."""
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Returns the lines of a file that have a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
