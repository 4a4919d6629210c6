"""The groups of all layers and sequences on disk: packed, written behind, read back.

One file for each layer and sequence, groups in order (``store/layout.py``). ``append`` returns when the groups are in
the bounded write queue; ``settle`` blocks until the writes of the named files are done, so that a read that follows
sees them. Write errors are raised by the next call. One thread; the queue's writer is the only other one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.disk.backend import ReadBackend
from kvswap.disk.slab import Slab
from kvswap.disk.write_behind import WriteBehind
from kvswap.errors import DiskError
from kvswap.store.layout import GroupLayout

Int = NDArray[np.int64]


class GroupStore:
    """Files of ``layers`` x ``batch`` sequences on one backend. ``close`` removes them."""

    def __init__(
        self, *, backend: ReadBackend, layout: GroupLayout, layers: int, batch: int, queue_bytes: int, groups: int
    ) -> None:
        self.backend, self.layout, self.batch = backend, layout, batch
        self.writer = WriteBehind(backend, queue_bytes)
        size_bytes = layout.file_bytes(groups)
        self.files: Int = np.array([backend.open(size_bytes) for _ in range(layers * batch)], np.int64)
        self._size_bytes = np.full(len(self.files), size_bytes, np.int64)
        self._last_write: Int = np.full(len(self.files), -1, np.int64)

    def row(self, layer: int, sequence: int) -> int:
        """Index into ``files``."""
        return layer * self.batch + sequence

    def append(
        self, layer: int, sequence: int, first: int, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Queue whole groups from ``first`` on: K, V ``[H_kv, n * G, d]`` of any dtype, stored as ``dtype``."""
        layout, row = self.layout, self.row(layer, sequence)
        group_tokens = layout.geometry.group_tokens
        groups = keys.shape[1] // group_tokens
        needed = (first + groups) * layout.slot_bytes
        if needed > self._size_bytes[row]:
            self._size_bytes[row] = layout.file_bytes(first + groups)
            self.backend.ensure_size(int(self.files[row]), int(self._size_bytes[row]))
        piece = max(1, self.writer.largest_bytes // layout.slot_bytes)
        for start in range(0, groups, piece):
            count = min(piece, groups - start)
            buffer = self.writer.acquire(count * layout.slot_bytes)
            tokens = slice(start * group_tokens, (start + count) * group_tokens)
            self._pack(buffer, keys[:, tokens], values[:, tokens], dtype)
            offset = (first + start) * layout.slot_bytes
            self._last_write[row] = self.writer.submit(int(self.files[row]), offset, buffer)

    def settle(self, rows: Int) -> None:
        """Block until everything queued for these files is on disk."""
        last = int(self._last_write[rows].max(initial=-1))
        if last >= 0 and not self.writer.done(last):
            self.writer.wait_for(last)

    def submit(self, rows: Int, first: Int, count: Int, addresses: Int, skip_bytes: int = 0) -> int:
        """Start reading extents of groups into memory; returns the ticket to wait for.

        ``skip_bytes`` at the start of each extent are not read, and their memory is left as it is.
        """
        self.settle(rows)
        size = self.layout.slot_bytes
        return self.backend.submit(
            self.files[rows], first * size + skip_bytes, count * size - skip_bytes, addresses + skip_bytes
        )

    def read_tiles(self, layer: int, sequence: int, groups: int, tile_groups: int, dtype: torch.dtype) -> TileReader:
        """Stream groups ``[0, groups)`` of one sequence in order."""
        return TileReader(self, self.row(layer, sequence), groups, tile_groups, dtype)

    def close(self) -> None:
        """Stop the writer and drop the files, also after an error."""
        try:
            self.writer.close()
        except DiskError:
            pass  # raised to the caller when it happened; the files are dropped anyway
        finally:
            self.backend.close()

    def _pack(self, buffer: NDArray[np.uint8], keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
        layout = self.layout
        slots = torch.from_numpy(buffer).view(dtype).view(-1, layout.slot_elements)
        groups = slots[:, : layout.group_elements].unflatten(1, layout.group_shape)
        for part, source in enumerate((keys, values)):
            groups[:, part].copy_(source.unflatten(1, (-1, layout.geometry.group_tokens)).transpose(0, 1))


class TileReader:
    """Iterator over ``(K, V)`` tiles ``[H_kv, n, d]`` of one sequence; the next tile is read while one is in use."""

    def __init__(self, store: GroupStore, row: int, groups: int, tile_groups: int, dtype: torch.dtype) -> None:
        self._store, self._row, self._groups, self._tile, self._dtype = store, row, groups, tile_groups, dtype
        self._slabs = [Slab(tile_groups * store.layout.slot_bytes) for _ in range(2)]

    def __iter__(self) -> TileReader:
        self._next = 0
        self._ticket: int | None = None
        self._start_read()
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ticket is None:
            raise StopIteration
        self._store.backend.wait(self._ticket)
        first = self._next
        count = min(self._tile, self._groups - first)
        slab = self._slabs[(first // self._tile) % 2]
        self._next += count
        self._start_read()
        layout = self._store.layout
        raw = torch.from_numpy(slab.array)[: count * layout.slot_bytes].view(self._dtype)
        groups = raw.view(count, layout.slot_elements)[:, : layout.group_elements].unflatten(1, layout.group_shape)
        keys, values = (groups[:, part].transpose(0, 1).flatten(1, 2) for part in (0, 1))
        return keys, values

    def _start_read(self) -> None:
        count = min(self._tile, self._groups - self._next)
        if count <= 0:
            self._ticket = None
            return
        slab = self._slabs[(self._next // self._tile) % 2]
        one = np.ones(1, np.int64)
        self._ticket = self._store.submit(one * self._row, one * self._next, one * count, one * slab.address)

    def close(self) -> None:
        """Wait for a read in flight, then release the tiles."""
        if self._ticket is not None:
            self._store.backend.wait(self._ticket)
            self._ticket = None
        for slab in self._slabs:
            slab.close()
