"""One way to make every backend and to ask it for reads, for all tests of the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvswap.disk import MemoryBackend, ReadBackend, Slab, create_backend, uring_backend
from kvswap.disk.uring_ring import CompiledRing, FailedRead, Ring
from tests.helpers.system import has_direct_io, has_io_uring

UNIT = 4096
RINGS = ("uring", "uring in numpy")
"""The ring as it is chosen, in C where that was compiled, and the one that stands in for it."""
POISON = 0xDD
"""What memory holds before a read."""
Collect = Callable[[Ring, int], tuple[int, list[FailedRead]]]
NAMES = (*RINGS, "threads", "buffered", "memory")


def make(name: str, folder: Path, depth: int = 8) -> ReadBackend:
    """A backend, or skip where this machine cannot have it."""
    if name == "memory":
        return MemoryBackend()
    if name in (*RINGS, "threads"):
        if not has_direct_io(folder):
            pytest.skip("no direct I/O here")
        if name in RINGS and not has_io_uring():
            pytest.skip("no io_uring here")
    if name == "uring in numpy":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uring_backend, "create_ring", Ring)
            return create_backend("uring", folder, depth, on_notice=lambda text: None)
    return create_backend(name, folder, depth, on_notice=lambda text: None)


def content(nbytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def write_all(backend: ReadBackend, file: int, data: NDArray[np.uint8]) -> None:
    slab = Slab(data.nbytes)
    slab.array[: data.nbytes] = data
    backend.write(file, 0, slab.array[: data.nbytes])
    slab.close()


def submit(backend: ReadBackend, rows: list[tuple[int, int, int, int]]) -> int:
    """Submit ``(file, offset, length, address)`` rows."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return backend.submit(*(np.ascontiguousarray(column) for column in columns))


def filled(backend: ReadBackend, units: int = 16) -> int:
    file = backend.open(units * UNIT)
    write_all(backend, file, content(units * UNIT))
    return file


def strike(monkeypatch: pytest.MonkeyPatch, strikes: int, result: int) -> None:
    """Let the next completions of every ring carry ``result`` instead of their own, in the shared memory."""
    left = [strikes]
    for kind in (Ring, CompiledRing):

        def collect(self: Ring, wait_for: int, real: Collect = kind.collect) -> tuple[int, list[FailedRead]]:
            code = self.enter(wait_for) if wait_for else 0
            if code:
                return code, []
            for place in range(int(self._cq_head[0]), int(self._cq_tail[0])):  # far from where counters come round
                if left[0]:
                    self._results[place % len(self._results)] = result
                    left[0] -= 1
            return real(self, 0)

        monkeypatch.setattr(kind, "collect", collect)
