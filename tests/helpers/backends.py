"""One way to make every backend and to ask it for reads, for all tests of the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvswap.disk import MemoryBackend, ReadBackend, Slab, create_backend, uring_backend
from kvswap.disk.uring_ring import Ring
from tests.helpers.system import has_direct_io, has_io_uring

UNIT = 4096
RINGS = ("uring", "uring in numpy")
"""The ring as it is chosen, in C where that was compiled, and the one that stands in for it."""
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
