"""Files in memory with a chosen latency and faults, for tests of everything above the disk.

Bytes are copied inside ``wait``, so that code that reads its memory too early finds the old bytes.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.backend import NO_PROGRESS_LIMIT, ReadBackend, ReadCounters, check_aligned, read_error
from kvswap.disk.files import full_error


@dataclass(slots=True, kw_only=True)
class Faults:
    """Faults still to come. Each try that fails takes one off its count; counts may be set again at any time."""

    fail_reads: int = 0
    """Next tries of a read that fail with ``read_errno``."""
    read_errno: int = errno.EIO
    short_reads: int = 0
    """Next tries of a read that deliver half of what is asked, rounded down to the alignment."""
    lost_reads: int = 0
    """Next tries of a read that end without an error and leave the memory as it was."""
    full_at_write: int = 0
    """The n-th write from now, and all after it, fail with ENOSPC; 0 is never."""

    def next_write_is_full(self) -> bool:
        """Count one write; whether the disk is full for it."""
        if self.full_at_write > 1:
            self.full_at_write -= 1
            return False
        return self.full_at_write == 1


@dataclass(slots=True)
class _Ticket:
    rows: list[tuple[int, int, int, int]]
    ready_at_s: float


class MemoryBackend(ReadBackend):
    """Every ticket is ready ``latency_s`` after its submit. Alignment is checked as strictly as by direct I/O."""

    name = "memory"
    direct = False

    def __init__(self, *, latency_s: float = 0.0, faults: Faults | None = None, alignment_bytes: int = 512) -> None:
        self.alignment_bytes = alignment_bytes
        self.counters = ReadCounters()
        self.latency_s = latency_s
        self.faults = faults or Faults()
        self._files: list[NDArray[np.uint8]] = []
        self._numbers = itertools.count(1)
        self._tickets: dict[int, _Ticket] = {}
        self._lock = threading.RLock()

    def open(self, size_bytes: int) -> int:
        with self._lock:
            self._files.append(np.zeros(size_bytes, dtype=np.uint8))
            return len(self._files) - 1

    def ensure_size(self, file: int, size_bytes: int) -> None:
        with self._lock:
            old = self._files[file]
            if size_bytes > old.nbytes:
                self._files[file] = np.concatenate([old, np.zeros(size_bytes - old.nbytes, dtype=np.uint8)])

    def write(self, file: int, offset_bytes: int, data: NDArray[np.uint8]) -> None:
        check_aligned(self, offset_bytes, data)
        with self._lock:
            if self.faults.next_write_is_full():
                error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise full_error(f"write of {data.nbytes} bytes at offset {offset_bytes} of KV file {file}", error)
            self.ensure_size(file, offset_bytes + data.nbytes)
            self._files[file][offset_bytes : offset_bytes + data.nbytes] = data.reshape(-1)
            self.counters.writes += 1
            self.counters.write_bytes += data.nbytes

    def submit(
        self,
        files: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        addresses: NDArray[np.int64],
    ) -> int:
        columns = (files, offsets, lengths, addresses)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        for row in rows:
            if any(value % self.alignment_bytes for value in row[1:]):
                raise ValueError(f"read {row}: not multiples of {self.alignment_bytes}")
        number = next(self._numbers)
        self._tickets[number] = _Ticket(rows, time.perf_counter() + self.latency_s)
        return number

    def wait(self, ticket: int) -> None:
        reads = self._tickets.pop(ticket, None)
        if reads is None:
            raise ValueError(f"ticket {ticket} is unknown or was waited for already")
        blocked_s = max(0.0, reads.ready_at_s - time.perf_counter())
        if blocked_s:
            time.sleep(blocked_s)
        self.counters.wait_s += blocked_s
        with self._lock:
            for row in reads.rows:
                self._read(*row)
        self.counters.reads += len(reads.rows)
        self.counters.read_bytes += sum(row[2] for row in reads.rows)

    def close(self) -> None:
        self._tickets.clear()
        self._files.clear()

    def _read(self, file: int, offset: int, length: int, address: int) -> None:
        done, stalls = 0, 0
        while done < length:
            fresh, code = self._try(file, offset + done, length - done, address + done)
            done += fresh
            if done < length:
                stalls = 0 if fresh else stalls + 1
                if stalls > NO_PROGRESS_LIMIT:
                    raise read_error(file, offset, length, code)
                self.counters.retries += 1

    def _try(self, file: int, offset: int, length: int, address: int) -> tuple[int, int]:
        """One try as a disk would answer it: bytes delivered and errno."""
        faults = self.faults
        if faults.fail_reads:
            faults.fail_reads -= 1
            return 0, faults.read_errno
        if faults.lost_reads:
            faults.lost_reads -= 1
            return 0, 0
        if faults.short_reads:
            faults.short_reads -= 1
            length = length // 2 // self.alignment_bytes * self.alignment_bytes
        source = self._files[file][offset : offset + length]
        ctypes.memmove(address, source.ctypes.data, source.nbytes)
        return source.nbytes, 0
