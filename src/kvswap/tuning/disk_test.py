"""How fast random reads are in a folder, through the backend that kvswap would use there. Takes about five seconds.

A nameless file of random bytes is written first, for two seconds at most, and only what was written is read: reserved
but unwritten space would be answered without the disk. Reads are direct where the backend is; where it is not, the
file lies in memory and the numbers say nothing about the disk, which ``ReadTest.page_cache`` tells.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from kvswap.disk import ReadBackend, Slab
from kvswap.terms import round_up
from kvswap.units import KIB, MIB

DEPTH = 64
FILE_BYTES = 256 * MIB
WRITE_S = 2.0
READ_S = 3.0
SMALL_BYTES, LARGE_BYTES = 16 * KIB, 64 * KIB
_PIECE_BYTES = MIB
_TICKETS = 8
"""Submits in flight, DEPTH / 8 reads each, so that the disk never waits for the last read of a large batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRate:
    """Random reads of one size at one depth. Latencies, of single reads, are measured at depth 1 only."""

    read_bytes: int
    depth: int
    reads: int
    elapsed_s: float
    latency_p50_us: float | None = None
    latency_p99_us: float | None = None

    @property
    def reads_per_s(self) -> float:
        """Reads that arrived in a second."""
        return self.reads / self.elapsed_s

    @property
    def bytes_per_s(self) -> float:
        """Bytes that arrived in a second."""
        return self.reads_per_s * self.read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTest:
    """Results. ``page_cache`` means that the reads came from memory and are not the disk's.

    ``write_bytes_per_s``: one writer, pieces of 1 MiB, in order.
    """

    file_bytes: int
    page_cache: bool
    write_bytes_per_s: float
    small: ReadRate
    large: ReadRate
    single: ReadRate


def measure_reads(backend: ReadBackend, *, file_bytes: int = FILE_BYTES, read_s: float = READ_S) -> ReadTest:
    """Write a file and read it at random; closes the backend at the end, also after an error.

    Raises DiskError when the disk fails, StorageError or DiskFullError when there is no room.
    """
    slab = Slab(DEPTH * round_up(LARGE_BYTES, backend.alignment_bytes))
    try:
        file = backend.open(file_bytes)
        written_bytes, elapsed_s = write_file(backend, file, slab, file_bytes)
        reader = _Reader(backend, file, slab, written_bytes)
        return ReadTest(
            file_bytes=written_bytes,
            page_cache=not backend.direct,
            write_bytes_per_s=written_bytes / elapsed_s,
            small=reader.deep(SMALL_BYTES, 0.4 * read_s),
            large=reader.deep(LARGE_BYTES, 0.4 * read_s),
            single=reader.single(SMALL_BYTES, 0.2 * read_s),
        )
    finally:
        backend.close()  # no read may be in flight when its memory goes
        slab.close()


def write_file(backend: ReadBackend, file: int, slab: Slab, file_bytes: int) -> tuple[int, float]:
    """Bytes written from the start of the file, at least one piece, and the time the disk took for them."""
    random = np.random.default_rng()
    piece = slab.array[:_PIECE_BYTES]
    done_bytes, elapsed_s, started = 0, 0.0, time.perf_counter()
    while done_bytes < file_bytes and time.perf_counter() - started < WRITE_S:
        piece[:] = np.frombuffer(random.bytes(_PIECE_BYTES), dtype=np.uint8)
        before = time.perf_counter()
        backend.write(file, done_bytes, piece)
        elapsed_s += time.perf_counter() - before
        done_bytes += _PIECE_BYTES
    return done_bytes, elapsed_s


class _Reader:
    def __init__(self, backend: ReadBackend, file: int, slab: Slab, size_bytes: int) -> None:
        self._backend, self._file, self._slab, self._size_bytes = backend, file, slab, size_bytes
        self._random = np.random.default_rng()

    def deep(self, read_bytes: int, seconds: float) -> ReadRate:
        """Always about DEPTH reads in flight."""
        count, read_bytes = DEPTH // _TICKETS, self._aligned(read_bytes)
        flying: deque[int] = deque()
        reads, turn, started = 0, 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            if len(flying) == _TICKETS:
                self._backend.wait(flying.popleft())
                reads += count
            flying.append(self._submit(count, turn % _TICKETS, read_bytes))
            turn += 1
        while flying:
            self._backend.wait(flying.popleft())
            reads += count
        elapsed_s = time.perf_counter() - started
        return ReadRate(read_bytes=read_bytes, depth=DEPTH, reads=reads, elapsed_s=elapsed_s)

    def single(self, read_bytes: int, seconds: float) -> ReadRate:
        """One read after the other."""
        times, read_bytes = [], self._aligned(read_bytes)
        started = before = time.perf_counter()
        while before - started < seconds:
            self._backend.wait(self._submit(1, 0, read_bytes))
            now = time.perf_counter()
            times.append(now - before)
            before = now
        p50, p99 = (float(value) * 1e6 for value in np.percentile(times, (50, 99)))
        return ReadRate(
            read_bytes=read_bytes,
            depth=1,
            reads=len(times),
            elapsed_s=before - started,
            latency_p50_us=p50,
            latency_p99_us=p99,
        )

    def _aligned(self, read_bytes: int) -> int:
        return round_up(read_bytes, self._backend.alignment_bytes)

    def _submit(self, count: int, place: int, read_bytes: int) -> int:
        """Start reads at random multiples of their size, into the ``place``-th part of the memory."""
        whole = np.full(count, read_bytes, np.int64)
        offsets = self._random.integers(0, self._size_bytes // read_bytes, count) * read_bytes
        addresses = self._slab.address + (place * count + np.arange(count)) * read_bytes
        return self._backend.submit(np.full(count, self._file, np.int64), offsets, whole, addresses)
