"""How fast random reads are over their size and how many are asked for at once: what a disk's part of a profile is.

A decode step asks for all reads of a layer at once and then waits for all of them, so that is what is measured: bursts
of ``depth`` reads, one burst after the other, and again with pauses between them, as computing makes them. As in
``disk_test`` a nameless file of random bytes is written first, and reads are direct where the backend is. No torch in
here.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvswap.disk import ReadBackend, Slab, create_backend
from kvswap.disk.files import free_bytes
from kvswap.errors import StorageError
from kvswap.terms import round_up
from kvswap.tuning.cost import BurstRate, DiskCosts
from kvswap.tuning.disk_test import write_file
from kvswap.units import KIB, MIB

SIZES = (512, 2 * KIB, 8 * KIB, 32 * KIB, 128 * KIB, MIB)
DEPTHS = (1, 4, 16, 64, 128)
FILE_BYTES = 256 * MIB
POINT_S = 0.3
PACED_SIZES = SIZES[:-1]
_LEAST_BURSTS = 3
_LAYER_S = 0.003
"""A pause at least, about what a layer of a small model computes."""
_LANDING_BYTES = 16 * MIB
"""Memory that reads land in, also on top of each other: nobody looks at them."""
_PAUSE_S = 0.01

Progress = Callable[[str, int, int], None]


def measure_disk(
    kv_dir: Path, *, point_s: float = POINT_S, file_bytes: int = FILE_BYTES, on_progress: Progress | None = None
) -> list[DiskCosts]:
    """Curves of every backend that works in a folder, the one that ``backend="auto"`` takes first.

    Raises StorageError and DiskError.
    """
    best = create_backend("auto", kv_dir, max(DEPTHS), on_notice=lambda text: None)
    backends = [best]
    if best.name == "uring":
        backends.append(create_backend("threads", kv_dir, max(DEPTHS), on_notice=lambda text: None))
    if free_bytes(kv_dir) < 2 * file_bytes:
        for backend in backends:
            backend.close()
        raise StorageError(
            f"full disk: {kv_dir} has no room for a file of {file_bytes // MIB} MiB to read",
            hint="free some space or choose another folder with --kv-dir",
        )
    steps = len(backends) * len(SIZES) * len(DEPTHS)
    found = []
    for number, backend in enumerate(backends):

        def report(done: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress("disk", number * len(SIZES) * len(DEPTHS) + done, steps)

        found.append(_measure(backend, file_bytes, point_s, number == 0, report))
    return found


def _measure(
    backend: ReadBackend, file_bytes: int, point_s: float, with_paced: bool, report: Callable[[int], None]
) -> DiskCosts:
    """All of one backend, which is closed at the end, also after an error."""
    slab = Slab(_LANDING_BYTES)
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
        paced = [
            dataclasses.replace(point, burst_s=bursts.paced_s(point, point_s / 2))
            for point in points
            if point.read_bytes <= max(PACED_SIZES) and with_paced
        ]
        return DiskCosts(
            backend=backend.name,
            direct_io=backend.direct,
            alignment_bytes=backend.alignment_bytes,
            write_bytes_per_s=written_bytes / elapsed_s,
            collect_s=bursts.collect_s(sizes[1]),
            latency_us=latencies,
            bursts=points,
            paced=paced,
        )
    finally:
        backend.close()  # no read may be in flight when its memory goes
        slab.close()


class _Bursts:
    def __init__(self, backend: ReadBackend, file: int, slab: Slab, size_bytes: int) -> None:
        self._backend, self._file, self._slab, self._size_bytes = backend, file, slab, size_bytes
        self._random = np.random.default_rng(0)

    def repeat(self, read_bytes: int, depth: int, seconds: float, least: int = _LEAST_BURSTS) -> list[float]:
        """Times of bursts, from the asking to the last byte, for about ``seconds``."""
        times_s: list[float] = []
        started_s = time.perf_counter()
        while len(times_s) < least or time.perf_counter() - started_s < seconds:
            arguments = self._arguments(read_bytes, depth)
            begin_s = time.perf_counter()
            self._backend.wait(self._backend.submit(*arguments))
            times_s.append(time.perf_counter() - begin_s)
        return times_s

    def paced_s(self, point: BurstRate, seconds: float) -> float:
        """Mean time of bursts like ``point`` when each comes after a pause, for about ``seconds``."""
        times_s: list[float] = []
        pause_s = max(_LAYER_S, point.burst_s)
        started_s = time.perf_counter()
        while len(times_s) < _LEAST_BURSTS or time.perf_counter() - started_s < seconds:
            _stay_awake(pause_s)
            times_s += self.repeat(point.read_bytes, point.depth, 0.0, least=1)
        return statistics.fmean(times_s)

    def collect_s(self, read_bytes: int) -> float:
        """What a wait costs when everything has arrived already."""
        times_s = []
        for _ in range(20):
            ticket = self._backend.submit(*self._arguments(read_bytes, 16))
            _stay_awake(_PAUSE_S)
            begin_s = time.perf_counter()
            self._backend.wait(ticket)
            times_s.append(time.perf_counter() - begin_s)
        return statistics.median(times_s)

    def _arguments(self, read_bytes: int, depth: int) -> tuple[np.ndarray, ...]:
        """Files, offsets, lengths and addresses of reads at random multiples of their size."""
        offsets = self._random.integers(0, self._size_bytes // read_bytes, depth) * read_bytes
        addresses = self._slab.address + np.arange(depth) * read_bytes % (_LANDING_BYTES - read_bytes + 1)
        addresses -= addresses % self._backend.alignment_bytes
        whole = np.full(depth, read_bytes, np.int64)
        return np.full(depth, self._file, np.int64), offsets, whole, addresses


def _stay_awake(seconds: float) -> None:
    """Let time pass as in decode: the processor does not go to sleep, other threads may run."""
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < seconds:
        time.sleep(0)
