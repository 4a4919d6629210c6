"""The groups of all layers and sequences on disk: packed, written behind, read back.

``GroupStore`` keeps one unnamed file for each layer and sequence, with the groups in order (``store/layout.py``). The
files are gone when it is closed. ``store/persistent.py`` keeps those of a session instead. ``append`` returns when the
groups are in the bounded write queue. ``settle`` blocks until the writes to the given files are done, so that a read
that follows sees them. The next call raises what a write failed with. One thread calls; the queue's writer is the only
other one.
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
    """Files of ``layers`` x ``batch`` sequences on one backend, made for ``groups`` groups each.

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
        group_tokens = layout.geometry.group_tokens
        groups = keys.shape[1] // group_tokens
        begin = self._make_room(row, first, first + groups)
        file = int(self.segments.files[-1, row])
        piece = max(1, self.writer.largest_bytes // layout.slot_bytes)
        for start in range(0, groups, piece):
            count = min(piece, groups - start)
            buffer = self.writer.acquire(count * layout.slot_bytes)
            tokens = slice(start * group_tokens, (start + count) * group_tokens)
            self._pack(buffer, keys[:, tokens], values[:, tokens], dtype)
            self._before_write(row, first + start, buffer)
            offset = (first - begin + start) * layout.slot_bytes
            self._last_write[row] = self.writer.submit(file, offset, buffer)

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

    def _open(self, rows: int, groups: int) -> tuple[Segments, IntArray]:
        """Open the files; returns where groups are, and the size in bytes of each row's last file."""
        size_bytes = self.layout.file_bytes(groups)
        files: IntArray = np.array([[self.backend.open(size_bytes) for _ in range(rows)]], np.int64)
        return Segments(np.zeros((1, rows), np.int64), files), np.full(rows, size_bytes, np.int64)

    def _before_write(self, row: int, first: int, buffer: ByteArray) -> None:
        """Called with packed groups of ``row`` from ``first`` on, before they are queued."""

    def _file_bytes(self, row: int, groups: int) -> int:
        """The size that the row's last file is given for ``groups`` groups."""
        return self.layout.file_bytes(groups)

    def _make_room(self, row: int, first: int, end: int) -> int:
        """Give the row's last file room for groups up to ``end``; returns the group with which that file begins."""
        begin = int(self.segments.starts[-1, row])
        if (end - begin) * self.layout.slot_bytes > self._size_bytes[row]:
            size_bytes = self._file_bytes(row, end - begin)
            self.backend.ensure_size(int(self.segments.files[-1, row]), size_bytes)
            self._size_bytes[row] = size_bytes
        return begin

    def _pack(self, buffer: ByteArray, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
        layout = self.layout
        slots = torch.from_numpy(buffer).view(dtype).view(-1, layout.slot_elements)
        groups = slots[:, : layout.group_elements].unflatten(1, layout.group_shape)
        for part, source in enumerate((keys, values)):
            groups[:, part].copy_(source.unflatten(1, (-1, layout.geometry.group_tokens)).transpose(0, 1))
