"""Measure how fast a folder's disk answers random reads, through the backends that kvswap uses there.

Two measurements share this file:

* ``measure_reads`` takes about five seconds. ``kvswap doctor`` and ``kvswap bench`` show its rates.
* ``measure_disk`` takes about 25 seconds. It measures many read sizes and depths for the profile that ``kvswap tune``
  works with. A decode step submits all reads of a layer together and then waits for all of them, so the measured unit
  is a *burst*: ``depth`` reads submitted together, timed until the last one has arrived.

Both first write a nameless file of random bytes, for at most two seconds, and read only what was written. Reserved but
unwritten space would be answered without touching the disk. Reads bypass the page cache where the backend uses direct
I/O. Where it does not, the file lies in memory and the numbers say nothing about the disk; results carry that as
``page_cache`` or ``direct_io``.

Nothing remains on the disk. This module runs in one thread and loads no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvswap.disk import ReadBackend, Slab, create_backend
from kvswap.disk.files import free_bytes
from kvswap.errors import StorageError
from kvswap.terms import round_up
from kvswap.tuning.cost import BurstRate, DiskCosts
from kvswap.units import KIB, MIB, format_rate

FILE_BYTES = 256 * MIB
WRITE_S = 2.0

# The short test.
DEPTH = 64
READ_S = 3.0
SMALL_BYTES, LARGE_BYTES = 16 * KIB, 64 * KIB

# The profile.
SIZES = (512, 2 * KIB, 8 * KIB, 32 * KIB, 128 * KIB, MIB)
DEPTHS = (1, 4, 16, 64, 128)
POINT_S = 0.3
PACED_SIZES = SIZES[:-1]

_PIECE_BYTES = MIB
_TICKETS = 8
"""Submissions in flight, each with DEPTH / 8 reads. The disk then never waits for the last read of a large batch."""
_LEAST_BURSTS = 3
_LAYER_S = 0.003
"""The shortest pause between paced bursts: about what a layer of a small model computes."""
_TARGET_BYTES = 16 * MIB
"""Memory that bursts read into. Reads may overwrite each other, because nobody looks at the bytes."""
_COLLECT_PAUSE_S = 0.01

Progress = Callable[[str, int, int], None]
"""Called with (stage, units done, units in all)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRate:
    """Random reads of one size at one depth. Latencies are those of single reads, so only depth 1 has them."""

    read_bytes: int
    depth: int
    reads: int
    elapsed_s: float
    latency_p50_us: float | None = None
    latency_p99_us: float | None = None

    @property
    def reads_per_s(self) -> float:
        """Completed reads per second."""
        return self.reads / self.elapsed_s

    @property
    def bytes_per_s(self) -> float:
        """Bytes read per second."""
        return self.reads_per_s * self.read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTest:
    """Result of the short test.

    ``page_cache`` means that reads were answered from memory, so the rates are not the disk's.
    ``write_bytes_per_s`` is the rate of one writer that writes pieces of 1 MiB in order.
    """

    file_bytes: int
    page_cache: bool
    write_bytes_per_s: float
    small: ReadRate
    large: ReadRate
    single: ReadRate


def measure_reads(backend: ReadBackend, *, file_bytes: int = FILE_BYTES, read_s: float = READ_S) -> ReadTest:
    """Write a file, read it at random for ``read_s`` seconds, and return the rates.

    Closes ``backend`` at the end, also after an error. Raises DiskError when the disk fails, and StorageError or
    DiskFullError when the file does not fit.
    """
    slab = Slab(DEPTH * round_up(LARGE_BYTES, backend.alignment_bytes))
    try:
        file = backend.open(file_bytes)
        written_bytes, elapsed_s = write_file(backend, file, slab, file_bytes)
        reader = _RateReader(backend, file, slab, written_bytes)
        return ReadTest(
            file_bytes=written_bytes,
            page_cache=not backend.direct,
            write_bytes_per_s=written_bytes / elapsed_s,
            small=reader.deep(SMALL_BYTES, 0.4 * read_s),
            large=reader.deep(LARGE_BYTES, 0.4 * read_s),
            single=reader.single(SMALL_BYTES, 0.2 * read_s),
        )
    finally:
        backend.close()  # before the slab: no read may be in flight when its memory goes
        slab.close()


def measure_disk(
    kv_dir: Path, *, point_s: float = POINT_S, file_bytes: int = FILE_BYTES, on_progress: Progress | None = None
) -> list[DiskCosts]:
    """Measure every backend that works in a folder; the one that ``backend="auto"`` chooses comes first.

    Each combination of size and depth is measured for ``point_s`` seconds. ``on_progress`` is called with stage
    ``"disk"``. Raises StorageError when the folder has no room for the file, and DiskError when the disk fails.
    """
    best = create_backend("auto", kv_dir, max(DEPTHS), on_notice=lambda text: None)
    backends = [best]
    if best.name == "uring":
        backends.append(create_backend("threads", kv_dir, max(DEPTHS), on_notice=lambda text: None))
    if free_bytes(kv_dir) < 2 * file_bytes:
        for backend in backends:
            backend.close()
        raise StorageError(
            f"full disk: {kv_dir} has no room for a test file of {file_bytes // MIB} MiB",
            hint="free some space or choose another folder with --kv-dir",
        )
    points = len(SIZES) * len(DEPTHS)
    found = []
    for number, backend in enumerate(backends):

        def report(done: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress("disk", number * points + done, len(backends) * points)

        found.append(_measure_backend(backend, file_bytes, point_s, paced=number == 0, report=report))
        logger.debug(
            "measured %s in %s: reads of %d bytes are the smallest at 80%% of the best rate, %s",
            found[-1].backend,
            kv_dir,
            found[-1].read_size_bytes(),
            format_rate(max(rate for _, rate in found[-1].peak_rates())),
        )
    return found


def write_file(backend: ReadBackend, file: int, slab: Slab, file_bytes: int) -> tuple[int, float]:
    """Write random bytes from the start of the file, for at most two seconds but at least one piece of 1 MiB.

    Returns the bytes written and the seconds that the disk took for them.
    """
    random = np.random.default_rng()
    piece = slab.array[:_PIECE_BYTES]
    done_bytes, elapsed_s, started_s = 0, 0.0, time.perf_counter()
    while done_bytes < file_bytes and time.perf_counter() - started_s < WRITE_S:
        piece[:] = np.frombuffer(random.bytes(_PIECE_BYTES), dtype=np.uint8)
        before_s = time.perf_counter()
        backend.write(file, done_bytes, piece)
        elapsed_s += time.perf_counter() - before_s
        done_bytes += _PIECE_BYTES
    return done_bytes, elapsed_s


class _RateReader:
    """Random reads of a file for the short test, into disjoint parts of a slab."""

    def __init__(self, backend: ReadBackend, file: int, slab: Slab, size_bytes: int) -> None:
        self._backend, self._file, self._slab, self._size_bytes = backend, file, slab, size_bytes
        self._random = np.random.default_rng()

    def deep(self, read_bytes: int, seconds: float) -> ReadRate:
        """Keep about DEPTH reads in flight for ``seconds``."""
        count, read_bytes = DEPTH // _TICKETS, self._aligned(read_bytes)
        in_flight: deque[int] = deque()
        reads, number, started_s = 0, 0, time.perf_counter()
        while time.perf_counter() - started_s < seconds:
            if len(in_flight) == _TICKETS:
                self._backend.wait(in_flight.popleft())
                reads += count
            in_flight.append(self._submit(count, number % _TICKETS, read_bytes))
            number += 1
        while in_flight:
            self._backend.wait(in_flight.popleft())
            reads += count
        elapsed_s = time.perf_counter() - started_s
        return ReadRate(read_bytes=read_bytes, depth=DEPTH, reads=reads, elapsed_s=elapsed_s)

    def single(self, read_bytes: int, seconds: float) -> ReadRate:
        """Read one block after the other for ``seconds``."""
        times_s, read_bytes = [], self._aligned(read_bytes)
        started_s = before_s = time.perf_counter()
        while before_s - started_s < seconds:
            self._backend.wait(self._submit(1, 0, read_bytes))
            now_s = time.perf_counter()
            times_s.append(now_s - before_s)
            before_s = now_s
        p50, p99 = (float(value) * 1e6 for value in np.percentile(times_s, (50, 99)))
        return ReadRate(
            read_bytes=read_bytes,
            depth=1,
            reads=len(times_s),
            elapsed_s=before_s - started_s,
            latency_p50_us=p50,
            latency_p99_us=p99,
        )

    def _aligned(self, read_bytes: int) -> int:
        return round_up(read_bytes, self._backend.alignment_bytes)

    def _submit(self, count: int, part: int, read_bytes: int) -> int:
        """Submit reads at random multiples of their size, into part number ``part`` of the slab."""
        lengths = np.full(count, read_bytes, np.int64)
        offsets = self._random.integers(0, self._size_bytes // read_bytes, count) * read_bytes
        addresses = self._slab.address + (part * count + np.arange(count)) * read_bytes
        return self._backend.submit(np.full(count, self._file, np.int64), offsets, lengths, addresses)


def _measure_backend(
    backend: ReadBackend, file_bytes: int, point_s: float, *, paced: bool, report: Callable[[int], None]
) -> DiskCosts:
    """Measure all sizes and depths of one backend, and close it at the end, also after an error."""
    slab = Slab(_TARGET_BYTES)
    try:
        file = backend.open(file_bytes)
        written_bytes, elapsed_s = write_file(backend, file, slab, file_bytes)
        bursts = _Bursts(backend, file, slab, written_bytes)
        sizes = sorted({round_up(size, backend.alignment_bytes) for size in SIZES})
        points, latencies = [], {}
        for size in sizes:
            for depth in DEPTHS:
                times_s = bursts.repeat(size, depth, point_s)
                points.append(BurstRate(read_bytes=size, depth=depth, burst_s=statistics.fmean(times_s)))
                if depth == 1:
                    latencies[str(size)] = [1e6 * float(value) for value in np.percentile(times_s, (50, 99))]
                report(len(points))
        paced_points = [
            dataclasses.replace(point, burst_s=bursts.paced_s(point, point_s / 2))
            for point in points
            if point.read_bytes <= max(PACED_SIZES) and paced
        ]
        return DiskCosts(
            backend=backend.name,
            direct_io=backend.direct,
            alignment_bytes=backend.alignment_bytes,
            write_bytes_per_s=written_bytes / elapsed_s,
            collect_s=bursts.collect_s(sizes[1]),
            latency_us=latencies,
            bursts=points,
            paced=paced_points,
        )
    finally:
        backend.close()  # before the slab: no read may be in flight when its memory goes
        slab.close()


class _Bursts:
    """Bursts of random reads of one file, timed from the submission to the last byte."""

    def __init__(self, backend: ReadBackend, file: int, slab: Slab, size_bytes: int) -> None:
        self._backend, self._file, self._slab, self._size_bytes = backend, file, slab, size_bytes
        self._random = np.random.default_rng(0)

    def repeat(self, read_bytes: int, depth: int, seconds: float, least: int = _LEAST_BURSTS) -> list[float]:
        """Seconds of each burst; bursts follow one another for about ``seconds``, at least ``least`` of them."""
        times_s: list[float] = []
        started_s = time.perf_counter()
        while len(times_s) < least or time.perf_counter() - started_s < seconds:
            arguments = self._arguments(read_bytes, depth)
            begin_s = time.perf_counter()
            self._backend.wait(self._backend.submit(*arguments))
            times_s.append(time.perf_counter() - begin_s)
        return times_s

    def paced_s(self, point: BurstRate, seconds: float) -> float:
        """Mean seconds of a burst like ``point`` when a pause precedes each one, over about ``seconds``."""
        times_s: list[float] = []
        pause_s = max(_LAYER_S, point.burst_s)
        started_s = time.perf_counter()
        while len(times_s) < _LEAST_BURSTS or time.perf_counter() - started_s < seconds:
            _busy_wait(pause_s)
            times_s += self.repeat(point.read_bytes, point.depth, 0.0, least=1)
        return statistics.fmean(times_s)

    def collect_s(self, read_bytes: int) -> float:
        """Median seconds of a wait whose reads have all arrived before it."""
        times_s = []
        for _ in range(20):
            ticket = self._backend.submit(*self._arguments(read_bytes, 16))
            _busy_wait(_COLLECT_PAUSE_S)
            begin_s = time.perf_counter()
            self._backend.wait(ticket)
            times_s.append(time.perf_counter() - begin_s)
        return statistics.median(times_s)

    def _arguments(self, read_bytes: int, depth: int) -> tuple[np.ndarray, ...]:
        """Files, offsets, lengths and addresses (int64 ``[depth]`` each) of reads at random multiples of their size."""
        offsets = self._random.integers(0, self._size_bytes // read_bytes, depth) * read_bytes
        addresses = self._slab.address + np.arange(depth) * read_bytes % (_TARGET_BYTES - read_bytes + 1)
        addresses -= addresses % self._backend.alignment_bytes
        lengths = np.full(depth, read_bytes, np.int64)
        return np.full(depth, self._file, np.int64), offsets, lengths, addresses


def _busy_wait(seconds: float) -> None:
    """Let time pass as in decode: the processor stays awake, and other threads may run."""
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < seconds:
        time.sleep(0)
