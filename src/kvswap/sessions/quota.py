"""Limits on disk: how much space sessions may take, and how much may be written for them a day.

``Quota.reserve`` is called before the files of a session grow. With a limit on disk space it removes sessions that
nobody has open: small ones first, and of each kind those used longest ago. Without a limit it never removes anything.
The file ``.usage`` in the folder of all sessions counts the bytes written, in total and on the current day. Imports no
torch; any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvswap.disk.files import free_bytes
from kvswap.disk.private_folder import PrivateFolder
from kvswap.errors import KVSwapError, StorageError
from kvswap.sessions.catalog import entries, freed_by_removal, remove, used_bytes
from kvswap.units import format_bytes

USAGE = ".usage"
RESERVE_BYTES = 256 << 20
"""Space that sessions leave free on the disk, because other programs fail when it is full."""
GRANTED_PART = 4
"""One part in so many of what is left may be written before the folders are looked through again.

Other processes write at the same time: together with three others this one stays within the quota.
"""
SMALL_PART = 64
"""A session that takes less than one part in so many of the quota is small."""
_USAGE_BYTES = 4096

_logger = logging.getLogger("kvswap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``quota_bytes`` of disk for all sessions together, ``write_bytes`` a day. None is no limit."""

    quota_bytes: int | None = None
    write_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenBytes:
    """Bytes written for all sessions of a folder: in total, and on ``day`` (local time)."""

    total_bytes: int = 0
    day: str = ""
    day_bytes: int = 0


class Quota:
    """The limits of one session. ``path`` is its folder, ``root`` the folder of all sessions."""

    def __init__(self, path: Path, limits: Limits, on_notice: Callable[[str], None]) -> None:
        self.root, self._path = path.parent, path
        self._limits, self._notice = limits, on_notice
        self._unrecorded_bytes = 0  # reserved since the last ``record``
        self._granted_bytes = 0  # may be reserved before the folders are looked through again

    def reserve(self, nbytes: int, *, planned: bool = False) -> None:
        """Check that ``nbytes`` more may be written now; under a limit on disk space, remove other sessions if needed.

        What is only ``planned`` is reserved again when it is written. Raises StorageError where it may not be.
        """
        self._check_writes(nbytes)
        if self._limits.quota_bytes is not None and (planned or nbytes > self._granted_bytes):
            left_bytes = self._left_bytes(nbytes, self._limits.quota_bytes)
            self._granted_bytes = left_bytes // GRANTED_PART + nbytes
        self._check_free(nbytes)
        if not planned:
            self._unrecorded_bytes += nbytes
            self._granted_bytes -= min(nbytes, self._granted_bytes)

    def record(self, nbytes: int) -> None:
        """Count ``nbytes`` as written, in place of what was reserved since the last call."""
        if nbytes:
            add_written_bytes(self.root, nbytes)
        self._unrecorded_bytes = 0

    def _check_writes(self, nbytes: int) -> None:
        limit_bytes = self._limits.write_bytes
        if limit_bytes is None:
            return
        written_bytes = read_written_bytes(self.root).day_bytes + self._unrecorded_bytes
        if written_bytes + nbytes > limit_bytes:
            raise StorageError(
                f"write limit: {format_bytes(written_bytes)} of {format_bytes(limit_bytes)} are written today, "
                f"{format_bytes(nbytes)} more are needed",
                hint="raise --write-limit or go on tomorrow",
            )

    def _left_bytes(self, nbytes: int, quota_bytes: int) -> int:
        """Bytes that are left under the quota after ``nbytes`` more, once closed sessions have made room for them.

        Small sessions go first, then the others, each kind least recently used first: a day of short requests does not
        cost the long context that was read in an hour. None goes where removing all of them would not be enough.
        """
        excess_bytes = used_bytes(self.root) + nbytes - quota_bytes
        if excess_bytes <= 0:
            return -excess_bytes
        others = [entry for entry in entries(self.root) if entry.path != self._path and not entry.in_use]
        closed = sorted(
            (e for e in others if e.manifest is not None),
            key=lambda e: (e.disk_bytes * SMALL_PART >= quota_bytes, e.manifest.used if e.manifest else 0),
        )
        gains_bytes = freed_by_removal([entry.path for entry in closed])
        if sum(gains_bytes) >= excess_bytes:
            for entry in closed:
                with contextlib.suppress(KVSwapError):  # another process has just opened it
                    remove(entry.path, forget=False)
                    _logger.debug("disk quota: evicted session %s", entry.name)
                    self._notice(f"disk quota: session {entry.name} made room for another and was removed")
                excess_bytes = used_bytes(self.root) + nbytes - quota_bytes
                if excess_bytes <= 0:
                    return -excess_bytes
        raise StorageError(
            f"disk quota: sessions would take {format_bytes(excess_bytes)} more than {format_bytes(quota_bytes)}",
            hint="raise --disk-quota or remove sessions (kvswap sessions rm, kvswap sessions prune --quarantine)",
        )

    def _check_free(self, nbytes: int) -> None:
        free = free_bytes(self.root)
        if free < nbytes + RESERVE_BYTES:
            raise StorageError(
                f"full disk: {self.root} has {format_bytes(free)} free; {format_bytes(nbytes)} are needed and "
                f"{format_bytes(RESERVE_BYTES)} are left for others",
                hint="free some space, remove sessions, or choose another folder with kv_dir",
            )


@contextmanager
def counted(folder: PrivateFolder) -> Iterator[None]:
    """Count what is written to the folder of a new session in the block, also where that fails."""
    try:
        yield
    finally:
        add_written_bytes(folder.path.parent, folder.written_bytes)


def read_written_bytes(root: Path) -> WrittenBytes:
    """The counts up to now. A file that cannot be read counts as zero."""
    try:
        found = json.loads((root / USAGE).read_bytes()[:_USAGE_BYTES])
        total_bytes, day, day_bytes = int(found["total_bytes"]), str(found["day"]), int(found["day_bytes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return WrittenBytes(day=_today())
    return WrittenBytes(total_bytes=total_bytes, day=_today(), day_bytes=day_bytes if day == _today() else 0)


def add_written_bytes(root: Path, nbytes: int) -> None:
    """Add to the counts, one process at a time. Where the file cannot be written, only the counts are lost."""
    with contextlib.suppress(OSError):
        fd = os.open(root / USAGE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = read_written_bytes(root)
            counts = {
                "total_bytes": before.total_bytes + nbytes,
                "day": before.day,
                "day_bytes": before.day_bytes + nbytes,
            }
            data = json.dumps(counts).encode()
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)


def _today() -> str:
    return time.strftime("%Y-%m-%d")
