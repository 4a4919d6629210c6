"""Streams the stored groups of one layer of one sequence in order, tile by tile, for attention over all of them.

A prompt that is appended to a stored context reads that context once in every layer (``core/prefill.py``). So reads
are large, and ``READ_AHEAD`` of them are in flight while a tile is in use. ``begin`` starts them before anybody waits:
the first tiles of the next layer arrive while this one computes. One thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvswap.disk.slab import Slab
from kvswap.errors import DiskError
from kvswap.native import loops
from kvswap.store.layout import READ_AHEAD

if TYPE_CHECKING:
    from kvswap.store.groups import GroupStore


class TileMemory:
    """Buffers that the readers of one prompt share, one reader after another: the system clears new memory slowly.

    Two readers use them at a time, one that is iterated over and one that has begun: ``TILE_BUFFERS`` tiles at most.
    """

    def __init__(self) -> None:
        self._free: list[Slab] = []
        self._floats = torch.empty(0)

    def take(self, nbytes: int) -> Slab:
        """A slab of at least ``nbytes``, contents undefined."""
        fitting = [slab for slab in self._free if slab.nbytes >= nbytes]
        if not fitting:
            return Slab(nbytes)
        self._free.remove(fitting[-1])
        return fitting[-1]

    def give(self, slab: Slab) -> None:
        """Take back a slab that nothing reads into any more."""
        self._free.append(slab)

    def floats(self, count: int) -> torch.Tensor:
        """``[count]`` float32, contents undefined, valid until the next call."""
        if len(self._floats) < count:
            self._floats = torch.empty(0)
            self._floats = torch.empty(count)
        return self._floats[:count]

    def close(self) -> None:
        """Release everything that was given back."""
        while self._free:
            self._free.pop().close()
        self._floats = torch.empty(0)


@dataclass(frozen=True, slots=True)
class _Tile:
    """A tile on its way: the ticket to wait for, its groups, and where they arrive."""

    ticket: int
    first: int
    count: int
    slab: Slab


class TileReader:
    """Iterator over ``(K, V)`` tiles ``[H_kv, n, d]`` of groups ``[first, groups)``, each valid until the next.

    Elements of 16 bits become float32 where the compiled loops can do it; others stay as they are stored.
    """

    def __init__(
        self,
        store: GroupStore,
        row: int,
        first: int,
        groups: int,
        tile_groups: int,
        dtype: torch.dtype,
        memory: TileMemory | None = None,
    ) -> None:
        self._store, self._row, self._tile, self._dtype = store, row, tile_groups, dtype
        self._next, self._groups = first, groups
        self._memory, self._shared = memory or TileMemory(), memory is not None
        self._coming: deque[_Tile] = deque()
        self._used: Slab | None = None  # of the tile that the caller has

    @property
    def all_begun(self) -> bool:
        """Whether the last read has been started."""
        return self._next >= self._groups

    def begin(self) -> None:
        """Start the first reads."""
        while len(self._coming) < READ_AHEAD and not self.all_begun:
            self._start_read()

    def __iter__(self) -> TileReader:
        self.begin()
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.next_slots()
        if rows is None:
            raise StopIteration
        layout = self._store.layout
        if loops.converts_here(rows.dtype, torch.float32, rows.device):
            floats = self._memory.floats(len(rows) * layout.group_elements)
            keys, values = loops.gather(rows, np.arange(len(rows))[None], layout.group_shape, out=floats)[:, 0]
            return keys, values
        groups = rows[:, : layout.group_elements].unflatten(1, layout.group_shape)
        keys, values = (groups[:, part].transpose(0, 1).flatten(1, 2) for part in (0, 1))
        return keys, values

    def next_slots(self) -> torch.Tensor | None:
        """The next tile as it is stored, ``[n, slot_elements]``: groups with their padding; None after the last."""
        self._give_back()
        if not self._coming:
            return None
        started_s = time.perf_counter()
        tile = self._coming.popleft()  # a ticket is waited for once, also where its reads fail
        self._used = tile.slab
        self._store.backend.wait(tile.ticket)
        if not self.all_begun:
            self._start_read()
        layout = self._store.layout
        slots = tile.slab.array[: tile.count * layout.slot_bytes].reshape(tile.count, -1)
        rows = np.full(tile.count, self._row, np.int64)
        self._store.unseal(rows, np.arange(tile.first, tile.first + tile.count), slots)
        self._store.streamed_s += time.perf_counter() - started_s
        self._store.streamed_bytes += slots.nbytes
        raw = torch.from_numpy(tile.slab.array)[: tile.count * layout.slot_bytes].view(self._dtype)
        return raw.view(tile.count, layout.slot_elements)

    def _start_read(self) -> None:
        first, count = self._next, min(self._tile, self._groups - self._next)
        slab = self._memory.take(self._tile * self._store.layout.slot_bytes)
        one = np.ones(1, np.int64)
        try:
            ticket = self._store.submit(one * self._row, one * first, one * count, one * slab.address)
        except BaseException:
            self._memory.give(slab)
            raise
        self._next += count
        self._coming.append(_Tile(ticket, first, count, slab))

    def _give_back(self) -> None:
        if self._used is not None:
            self._memory.give(self._used)
            self._used = None

    def close(self) -> None:
        """Wait for reads in flight, whose bytes nobody needs any more, then give the memory back. Ends the iterator."""
        self._next = self._groups
        try:
            while self._coming:
                tile = self._coming.popleft()
                with contextlib.suppress(DiskError):
                    self._store.backend.wait(tile.ticket)
                self._memory.give(tile.slab)
        finally:
            self._give_back()
            if not self._shared:
                self._memory.close()
