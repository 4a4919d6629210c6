"""A ring in plain memory, as the kernel would share it, for the compiled functions that fill and empty it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvswap.native.ring_loops import RingMemory
from tests.helpers.kernel_calls import Call, Scratch, Struct

DEPTH, ENTRIES, COMPLETIONS = 6, 8, 16


class FakeRing:
    """Two tickets, two files with descriptors 7 and 9, and all four counters at ``counter``."""

    def __init__(self, counter: int = 0) -> None:
        self.sq_head, self.sq_tail, self.cq_head, self.cq_tail = (np.array([counter], np.uint32) for _ in range(4))
        self.entries = np.zeros((ENTRIES, 8), np.int64)
        self.completions = np.zeros((COMPLETIONS, 2), np.int64)
        self.reads, self.failed = np.full((DEPTH, 7), -1, np.int64), np.zeros((DEPTH, 7), np.int64)
        self.free, self.tickets = np.arange(DEPTH), np.zeros((2, 2), np.int64)
        self.fds, self.wanted = np.array([7, 9]), np.zeros((4, DEPTH), np.int64)
        self.arrays: dict[str, np.ndarray | Scratch] = {
            name: getattr(self, name) for name, kind in RingMemory._fields_ if hasattr(self, name)
        }
        addresses = {name: array.ctypes.data for name, array in self.arrays.items() if isinstance(array, np.ndarray)}
        self.memory = RingMemory(**addresses, fd=-1, entries_count=ENTRIES, completions_count=COMPLETIONS)
        self.memory.depth, self.memory.room, self.memory.tickets_count, self.memory.files = DEPTH, DEPTH, 2, 2

    def want(self, rows: list[tuple[int, int, int, int]]) -> None:
        """File, offset, length and address of reads to start."""
        self.wanted[:, : len(rows)] = np.array(rows).T

    def complete(self, done: list[tuple[int, int]]) -> None:
        """What the kernel does for user data and result of each read."""
        for user, result in done:
            place = int(self.cq_tail[0]) % COMPLETIONS
            self.completions[place] = user, result & 0xFFFFFFFF
            self.cq_tail += np.uint32(1)

    def struct(self) -> Struct:
        """The ring for another build of the functions."""
        return Struct(self.memory, {getattr(RingMemory, name).offset: array for name, array in self.arrays.items()})


def ring_calls() -> Iterator[Call]:
    """A submit over the end of the ring, then completions of which two came short; and reads that are refused."""
    ring = FakeRing(2**32 - 2)
    ring.want([(0, 4096, 512, 70_000), (1, 8192, 1024, 80_000), (0, 0, 2048, 90_000)])
    places = [DEPTH - 1, DEPTH - 2, DEPTH - 3]  # the free ones are given out from the end
    ring.complete([(places[2], 2048), (places[0], 100), (places[1], -5)])
    memory = ring.struct()
    yield Call("ring_submit", [memory, 1, 5, 3], then=[("ring_collect", [memory, 0]), ("ring_collect", [memory, 1])])
    yield Call("ring_submit", [FakeRing().struct(), 0, 0, DEPTH + 1])
