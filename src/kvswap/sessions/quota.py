"""How much disk sessions may take, and how much may be written: quota, reserve, daily limit, and the counts.

``Room`` is asked before a session's files take more space. Where a quota is set, sessions that nobody has open give
way, least recently used first, before anything is refused; without one nothing is ever removed. What was written, in
all and on the day, is in the file ``.usage`` of the folder of all sessions. Imports no torch; any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvswap.disk.files import free_bytes
from kvswap.errors import KVSwapError, StorageError
from kvswap.sessions.shelf import entries, remove, used_bytes
from kvswap.units import format_bytes

USAGE = ".usage"
RESERVE_BYTES = 256 << 20
"""What sessions leave free on the disk: a full file system harms more than the one who filled it."""
_USAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``quota_bytes`` of disk for all sessions together, ``write_bytes`` a day; None for no limit."""

    quota_bytes: int | None = None
    write_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes written for sessions: in all, and on ``day`` (local time)."""

    total_bytes: int = 0
    day: str = ""
    day_bytes: int = 0


class Room:
    """Says whether one session, ``path``, may take more disk. ``root`` is the folder of all sessions."""

    def __init__(self, path: Path, limits: Limits, on_notice: Callable[[str], None]) -> None:
        self.root, self._path = path.parent, path
        self._limits, self._notice = limits, on_notice

    def ask(self, nbytes: int) -> None:
        """Raise StorageError unless ``nbytes`` more may be written now; makes room by the quota's rule."""
        self._check_writes(nbytes)
        quota_bytes = self._limits.quota_bytes
        if quota_bytes is not None:
            excess_bytes = used_bytes(self.root) + nbytes - quota_bytes
            if excess_bytes > 0:
                self._evict(excess_bytes, quota_bytes)
        self._check_free(nbytes)

    def _check_writes(self, nbytes: int) -> None:
        limit_bytes = self._limits.write_bytes
        if limit_bytes is None:
            return
        today = read_usage(self.root)
        if today.day_bytes + nbytes > limit_bytes:
            raise StorageError(
                f"write limit: {format_bytes(today.day_bytes)} of {format_bytes(limit_bytes)} are written today, "
                f"{format_bytes(nbytes)} more are needed",
                hint="raise --write-limit or go on tomorrow",
            )

    def _evict(self, excess_bytes: int, quota_bytes: int) -> None:
        """Remove closed sessions, least recently used first, until ``excess_bytes`` are free, or nothing at all."""
        others = [entry for entry in entries(self.root) if entry.path != self._path and not entry.in_use]
        closed = sorted(
            (e for e in others if e.manifest is not None), key=lambda e: e.manifest.used if e.manifest else 0
        )
        if sum(entry.disk_bytes for entry in closed) >= excess_bytes:
            while excess_bytes > 0 and closed:
                entry = closed.pop(0)
                with contextlib.suppress(KVSwapError):  # somebody has just opened it
                    remove(entry.path)
                    excess_bytes -= entry.disk_bytes
                    self._notice(f"disk quota: session {entry.name} was used longest ago and was removed")
        if excess_bytes > 0:
            raise StorageError(
                f"disk quota: {format_bytes(excess_bytes)} more than {format_bytes(quota_bytes)} would be taken",
                hint="raise --disk-quota or remove sessions (kvswap sessions rm)",
            )

    def _check_free(self, nbytes: int) -> None:
        free = free_bytes(self.root)
        if free < nbytes + RESERVE_BYTES:
            raise StorageError(
                f"full disk: {self.root} has {format_bytes(free)} free; {format_bytes(nbytes)} are needed and "
                f"{format_bytes(RESERVE_BYTES)} are left for others",
                hint="free some space, remove sessions, or choose another folder with kv_dir",
            )


def read_usage(root: Path) -> Usage:
    """What was written up to now; a file that cannot be read counts as nothing."""
    try:
        found = json.loads((root / USAGE).read_bytes()[:_USAGE_BYTES])
        total_bytes, day, day_bytes = int(found["total_bytes"]), str(found["day"]), int(found["day_bytes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return Usage(day=_today())
    return Usage(total_bytes=total_bytes, day=_today(), day_bytes=day_bytes if day == _today() else 0)


def add_usage(root: Path, written_bytes: int) -> None:
    """Count bytes that were written; two processes take turns. A disk that refuses loses the count, nothing else."""
    with contextlib.suppress(OSError):
        fd = os.open(root / USAGE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = read_usage(root)
            counts = {
                "total_bytes": before.total_bytes + written_bytes,
                "day": before.day,
                "day_bytes": before.day_bytes + written_bytes,
            }
            data = json.dumps(counts).encode()
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)


def _today() -> str:
    return time.strftime("%Y-%m-%d")
