"""Page-aligned memory that direct I/O can read into: anonymous, private, zero until touched.

Torch tensors are aligned to 64 bytes only, so every buffer that the disk fills is a view of a slab. A slab is not
locked: its owner decides which thread uses which part.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvswap.terms import round_up


class Slab:
    """One anonymous mapping of at least ``nbytes`` bytes.

    Attributes
    ----------
    array : uint8 ``(mapped,)``
        View of the whole mapping; it stays valid as long as somebody holds it, also after ``close``.
    address : int
        Address of the first byte, a multiple of the page size.
    nbytes : int
        Bytes that may be used and are charged to the memory ledger; the rest of ``array`` is untouched address space.

    Parameters
    ----------
    nbytes, most_bytes
        What may be used at first, and what ``grow`` may reach. Where the system has no address space for
        ``most_bytes``, the slab cannot grow.
    """

    def __init__(self, nbytes: int, most_bytes: int = 0) -> None:
        if nbytes <= 0:
            raise ValueError(f"a slab needs at least one byte, got {nbytes}")
        self.nbytes = round_up(nbytes, mmap.PAGESIZE)
        most_bytes = max(self.nbytes, round_up(most_bytes, mmap.PAGESIZE))
        # Private, not Python's default of shared: shared anonymous memory keeps its pages through MADV_DONTNEED
        # and is counted as shared memory, not as this process's own.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._map = mmap.mmap(-1, most_bytes, flags=flags)
        except OSError:
            if most_bytes == self.nbytes:
                raise
            self._map = mmap.mmap(-1, self.nbytes, flags=flags)
        self._advise()
        self.array: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self.array.ctypes.data)

    def grow(self, nbytes: int) -> None:
        """Let more of the mapping be used. Raises ValueError past its end."""
        if not self.nbytes <= nbytes <= self.array.nbytes:
            raise ValueError(f"cannot grow a slab from {self.nbytes} to {nbytes} of {self.array.nbytes} bytes")
        self.nbytes = round_up(nbytes, mmap.PAGESIZE)
        self._advise()

    def _advise(self) -> None:
        """Ask for huge pages, but for none that reaches past ``nbytes``: it would take memory that nobody counts."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        rest = len(self._map) - self.nbytes
        with contextlib.suppress(OSError):  # a kernel without them
            self._map.madvise(mmap.MADV_HUGEPAGE, 0, self.nbytes)
            if rest:
                self._map.madvise(mmap.MADV_NOHUGEPAGE, self.nbytes, rest)

    def shrink(self, nbytes: int) -> None:
        """Give the pages past ``nbytes`` back to the system. The mapping stays; what was in them is lost."""
        keep = round_up(nbytes, mmap.PAGESIZE)
        if not 0 <= keep <= self.nbytes:
            raise ValueError(f"cannot shrink a slab of {self.nbytes} bytes to {nbytes}")
        if keep < self.nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, keep, self.nbytes - keep)
        self.nbytes = keep

    def close(self) -> None:
        """Unmap; where other views are still alive, the last of them does. May be called twice."""
        self.nbytes = 0
        self.array = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


def move_within(memory: Any, source: int, target: int, count: int, at_once: int = 1 << 20) -> None:
    """Move ``count`` elements of a tensor to another place in it, ``at_once`` at a time. The places may overlap."""
    starts = range(0, count, at_once)
    for start in reversed(starts) if target > source else starts:  # never over what has not been moved
        stop = min(start + at_once, count)
        memory[target + start : target + stop] = memory[source + start : source + stop].clone()
