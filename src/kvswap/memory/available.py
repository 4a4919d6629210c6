"""How much memory this process may still take: what the system has free, and what its control group allows.

Limits of containers and service managers are read from cgroup version 1 and 2. A process sits in a folder of the
hierarchy and every folder above it may have a limit as well: the smallest applies.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes a huge number for no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """``used_bytes`` is what the group holds now, less file cache, which the kernel drops when it has to."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemMemory:
    """Memory of this machine as this process sees it; ``limit_bytes`` is None where no limit is below the total.

    ``available_bytes`` can still be taken without swapping or being killed; file cache counts as free.
    """

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None


def system_memory() -> SystemMemory:
    """What the system has, and what the limit on this process leaves of it."""
    memory, limit = psutil.virtual_memory(), memory_limit()
    total_bytes, free_bytes = int(memory.total), int(memory.available)
    if limit is None or limit.limit_bytes >= total_bytes:
        return SystemMemory(total_bytes=total_bytes, available_bytes=free_bytes, limit_bytes=None)
    left_bytes = max(0, min(free_bytes, limit.limit_bytes - limit.used_bytes))
    return SystemMemory(total_bytes=total_bytes, available_bytes=left_bytes, limit_bytes=limit.limit_bytes)


def available_bytes() -> int:
    """Memory that can still be taken without swapping or being killed; file cache counts as free."""
    return system_memory().available_bytes


def device_available_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device that this process can still take, PyTorch's own reserve included; None for others."""
    import torch  # late: the command line asks for the memory of the system before anything is loaded

    if device.type != "cuda":
        return None
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def memory_limit(proc: str | Path = "/proc") -> MemoryLimit | None:
    """The smallest limit on this process, or None where there is none or the system does not say."""
    try:
        groups = Path(proc, "self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = Path(proc, "self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found = []
    for folder in _folders(groups, mounts):
        with contextlib.suppress(OSError, ValueError):  # a folder that has no limit file, or the word "max" in it
            limit = _read(folder)
            if limit.limit_bytes < _UNLIMITED_BYTES:
                found.append(limit)
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


def _folders(groups: list[str], mounts: list[str]) -> Iterator[Path]:
    """Every folder of a hierarchy with memory limits from this process's own up to the mount."""
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        second = kinds[0] == "cgroup2"
        if not second and not (kinds[0] == "cgroup" and "memory" in kinds[2].split(",")):
            continue
        path = _path_of(groups, second)
        if path is None:
            continue
        mount = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        # In a container the mount may show only a part of the hierarchy, and the path may lie outside of it.
        inside = PurePosixPath(path).is_relative_to(fields[3])
        own = mount / PurePosixPath(path).relative_to(fields[3]) if inside else mount
        yield own
        if own != mount:
            yield from (folder for folder in own.parents if folder == mount or mount in folder.parents)


def _path_of(groups: list[str], second: bool) -> str | None:
    """Path of this process in the hierarchy of version 2, or in that of version 1 with the memory controller."""
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if second else "memory" in controllers.split(","):
            return path
    return None


def _read(folder: Path) -> MemoryLimit:
    """Raises OSError or ValueError where the folder has no limit."""
    second = (folder / "memory.max").exists()
    limit_bytes = int((folder / ("memory.max" if second else "memory.limit_in_bytes")).read_text())
    used_bytes = int((folder / ("memory.current" if second else "memory.usage_in_bytes")).read_text())
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    prefix = "" if second else "total_"
    cached = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return MemoryLimit(limit_bytes=limit_bytes, used_bytes=max(0, used_bytes - cached))


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, weights included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
