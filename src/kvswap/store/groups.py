"""The groups of all layers and sequences on disk: packed, written behind, read back.

``GroupStore`` keeps one unnamed file (``store/layout.py``), which is gone when it is closed. ``store/persistent.py``
keeps the files of a session instead. ``append`` returns when the groups are in the bounded write queue. ``settle``
blocks until the writes to the given rows are done, so that a read that follows sees them. The next call raises what a
write failed with. One thread calls; the queue's writer is the only other one.
"""

from __future__ import annotations

import numpy as np
import torch

from kvswap.disk.backend import ReadBackend
from kvswap.disk.write_behind import WriteBehind
from kvswap.errors import DiskError
from kvswap.native.arrays import ByteArray, IntArray
from kvswap.store.layout import GroupLayout
from kvswap.store.segments import Segments
from kvswap.store.tiles import TileMemory, TileReader


class GroupStore:
    """Groups of ``layers`` x ``batch`` sequences on one backend, made for ``groups`` groups each.

    A row is one layer of one sequence.
    """

    checked = False
    """Whether ``unseal`` has to be called for what was read."""

    def __init__(
        self, *, backend: ReadBackend, layout: GroupLayout, layers: int, batch: int, queue_bytes: int, groups: int
    ) -> None:
        self.backend, self.layout, self.batch = backend, layout, batch
        self.writer = WriteBehind(backend, queue_bytes)
        self.segments, self._size_bytes = self._open(layers * batch, groups)
        self._last_write: IntArray = np.full(layers * batch, -1, np.int64)
        self.streamed_bytes, self.streamed_s = 0, 0.0
        """What tile readers have read, and how long their caller waited for it."""

    def row(self, layer: int, sequence: int) -> int:
        """The row of a layer and sequence."""
        return layer * self.batch + sequence

    def append(
        self, layer: int, sequence: int, first: int, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Queue whole groups from ``first`` on: K, V ``[H_kv, n * G, d]`` of any dtype, stored as ``dtype``."""
        layout, row = self.layout, self.row(layer, sequence)
        slot_bytes, group_tokens = layout.slot_bytes, layout.geometry.group_tokens
        groups, start = keys.shape[1] // group_tokens, 0
        self._make_room(row, first + groups)
        most = max(1, self.writer.largest_bytes // slot_bytes)
        while start < groups:
            file, place, room = self.segments.place(row, first + start)
            count = min(most, room, groups - start)
            buffer = self.writer.acquire(count * slot_bytes)
            tokens = slice(start * group_tokens, (start + count) * group_tokens)
            self._pack(buffer, keys[:, tokens], values[:, tokens], dtype)
            self._before_write(row, first + start, buffer)
            self._last_write[row] = self.writer.submit(file, place * slot_bytes, buffer)
            start += count

    def settle(self, rows: IntArray) -> None:
        """Block until everything queued for these rows is written."""
        last = int(self._last_write[rows].max(initial=-1))
        if last >= 0 and not self.writer.done(last):
            self.writer.wait_for(last)

    def submit(self, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray) -> int:
        """Start reading extents of groups to memory addresses; returns the ticket to wait for."""
        self.settle(rows)
        return self.backend.submit(*self.segments.locate(rows, first, count, addresses, self.layout.slot_bytes))

    def unseal(self, rows: IntArray, groups: IntArray, slots: ByteArray, places: IntArray | None = None) -> None:
        """Check groups that were read, and decrypt them in place. Unnamed files have nothing to check.

        The groups are the rows ``places`` of ``slots`` uint8 ``(n, slot_bytes)``, or all of them. Raises DamagedError.
        """

    def read_tiles(
        self,
        layer: int,
        sequence: int,
        groups: int,
        tile_groups: int,
        dtype: torch.dtype,
        first: int = 0,
        memory: TileMemory | None = None,
    ) -> TileReader:
        """Stream groups ``[first, groups)`` of one sequence in order, through buffers of its own or of ``memory``."""
        return TileReader(self, self.row(layer, sequence), first, groups, tile_groups, dtype, memory)

    def close(self) -> None:
        """Stop the writer and close the files, also after an error."""
        try:
            self.writer.close()
        except DiskError:
            pass  # raised to the caller when it happened; the files are closed anyway
        finally:
            self.backend.close()

    # ---- what a persistent store does in another way

    def _open(self, rows: int, groups: int) -> tuple[Segments, int]:
        """Open the files; returns where groups are, and the size in bytes of the last file."""
        stripe_groups = self.layout.stripe_groups(groups)
        size_bytes, segments = self.layout.file_bytes(rows, groups, stripe_groups), Segments(rows)
        segments.add(np.zeros(rows, np.int64), self.backend.open(size_bytes), stripe_groups)
        return segments, size_bytes

    def _before_write(self, row: int, first: int, buffer: ByteArray) -> None:
        """Called with packed groups of ``row`` from ``first`` on, before they are queued."""

    def _before_growth(self, nbytes: int) -> None:
        """Called before the last file takes ``nbytes`` more."""

    def _make_room(self, row: int, end: int) -> None:
        """Give the last file room for groups of the row up to ``end``, by whole stripes."""
        file, place, _ = self.segments.place(row, end - 1)
        if (place + 1) * self.layout.slot_bytes > self._size_bytes:
            groups = end - int(self.segments.starts[-1, row])
            stripe_groups = int(self.segments.stripe_groups[-1])
            size_bytes = self.layout.file_bytes(len(self._last_write), groups, stripe_groups)
            self._before_growth(size_bytes - self._size_bytes)
            self.backend.ensure_size(file, size_bytes)
            self._size_bytes = size_bytes

    def _pack(self, buffer: ByteArray, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
        layout = self.layout
        slots = torch.from_numpy(buffer).view(dtype).view(-1, layout.slot_elements)
        groups = slots[:, : layout.group_elements].unflatten(1, layout.group_shape)
        for part, source in enumerate((keys, values)):
            groups[:, part].copy_(source.unflatten(1, (-1, layout.geometry.group_tokens)).transpose(0, 1))
