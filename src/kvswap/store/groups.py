"""The groups of all layers and sequences on disk: packed, written behind, read back.

One file for each layer and sequence, groups in order (``store/layout.py``); a session's groups may be spread over
several files (``store/segments.py``) and are sealed (``store/seal.py``), which is checked when they are read.
``append`` returns when the groups are in the bounded write queue; ``settle`` blocks until the writes of the named files
are done, so that a read that follows sees them. Write errors are raised by the next call. One thread; the queue's
writer is the only other one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvswap.disk.backend import ReadBackend
from kvswap.disk.slab import Slab
from kvswap.disk.write_behind import WriteBehind
from kvswap.errors import DamagedError, DiskError
from kvswap.native import loops
from kvswap.sessions.seal import Sealer, Seals
from kvswap.store.layout import GroupLayout
from kvswap.store.segments import Segments
from kvswap.terms import BoolArray, ByteArray, IntArray


@dataclass(slots=True, kw_only=True)
class NamedFiles:
    """The files of a session as its store takes them over.

    ``held`` int64 ``(rows,)`` counts the groups that are there, ``seals`` ``(rows, groups)`` are what ``sealer`` says
    of them; both grow with ``append``. ``begin(starts)`` makes the files of one more segment, which takes over from
    group ``starts[row]`` on; where ``appendable`` is false, or there is no segment yet, the first ``append`` calls it.
    ``grow(bytes)`` is called before files take more space, and may refuse.
    """

    segments: Segments
    held: IntArray
    seals: Seals
    sealer: Sealer
    appendable: bool
    verify: bool
    what: str
    begin: Callable[[IntArray], IntArray]
    grow: Callable[[int], None]


class GroupStore:
    """Files of ``layers`` x ``batch`` sequences on one backend. ``close`` removes them, unless they are ``named``."""

    def __init__(
        self,
        *,
        backend: ReadBackend,
        layout: GroupLayout,
        layers: int,
        batch: int,
        queue_bytes: int,
        groups: int,
        named: NamedFiles | None = None,
    ) -> None:
        self.backend, self.layout, self.batch, self.named = backend, layout, batch, named
        self.writer = WriteBehind(backend, queue_bytes)
        rows = layers * batch
        if named is None:
            size_bytes = layout.file_bytes(groups)
            files: IntArray = np.array([[backend.open(size_bytes) for _ in range(rows)]], np.int64)
            self.segments = Segments(np.zeros((1, rows), np.int64), files)
            self._size_bytes = np.full(rows, size_bytes, np.int64)
        else:
            named.sealer.begin()
            self.segments = named.segments
            begun = named.segments.starts[-1] if named.appendable else named.held
            self._size_bytes = (named.held - begun) * layout.slot_bytes
        self._last_write: IntArray = np.full(rows, -1, np.int64)
        self._changed: BoolArray = np.zeros(rows, np.bool_)
        self.streamed_bytes, self.streamed_s = 0, 0.0
        """What tile readers read, and how long they held up their caller."""

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
        begin = self._make_room(row, first, first + groups)
        file = int(self.segments.files[-1, row])
        piece = max(1, self.writer.largest_bytes // layout.slot_bytes)
        for start in range(0, groups, piece):
            count = min(piece, groups - start)
            buffer = self.writer.acquire(count * layout.slot_bytes)
            tokens = slice(start * group_tokens, (start + count) * group_tokens)
            self._pack(buffer, keys[:, tokens], values[:, tokens], dtype)
            if self.named is not None:
                self._seal(self.named, row, first + start, buffer)
            offset = (first - begin + start) * layout.slot_bytes
            self._last_write[row] = self.writer.submit(file, offset, buffer)

    def settle(self, rows: IntArray) -> None:
        """Block until everything queued for these files is on disk."""
        last = int(self._last_write[rows].max(initial=-1))
        if last >= 0 and not self.writer.done(last):
            self.writer.wait_for(last)

    def submit(self, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, skip_bytes: int = 0) -> int:
        """Start reading extents of groups into memory; returns the ticket to wait for.

        ``skip_bytes`` at the start of each extent are not read, and their memory is left as it is.
        """
        self.settle(rows)
        size = self.layout.slot_bytes
        files, offsets, lengths, addresses = self.segments.locate(rows, first, count, addresses, size)
        return self.backend.submit(files, offsets + skip_bytes, lengths - skip_bytes, addresses + skip_bytes)

    @property
    def sealed(self) -> bool:
        """Whether ``unseal`` has anything to do."""
        return self.named is not None and (self.named.verify or self.named.sealer.encrypts)

    def unseal(self, rows: IntArray, groups: IntArray, slots: ByteArray, places: IntArray | None = None) -> None:
        """See that groups that have been read are what was written, and decrypt them in place.

        They are the rows ``places`` of ``slots`` uint8 ``(n, slot_bytes)``, or all. Nothing where ``sealed`` is false.
        Raises DamagedError.
        """
        named = self.named
        if named is None or not self.sealed or not len(rows):
            return
        used = slots[:, : self.layout.geometry.group_bytes]
        wrong = ~named.sealer.unseal(rows // self.batch, groups, used, named.seals[rows, groups], places)
        if wrong.any():
            row, group = int(rows[wrong][0]), int(groups[wrong][0])
            raise DamagedError(
                f"{named.what} is damaged: group {group} of layer {row // self.batch} is not what was written",
                hint=f"kvswap sessions repair {named.what.split()[-1]} keeps the context before it",
            )

    def sync(self) -> None:
        """Make everything appended so far durable, in named files."""
        self.writer.flush()
        for row in np.flatnonzero(self._changed):
            self.backend.sync(int(self.segments.files[-1, row]))
        self._changed[:] = False

    def read_tiles(
        self, layer: int, sequence: int, groups: int, tile_groups: int, dtype: torch.dtype, first: int = 0
    ) -> TileReader:
        """Stream groups ``[first, groups)`` of one sequence in order."""
        return TileReader(self, self.row(layer, sequence), first, groups, tile_groups, dtype)

    def close(self) -> None:
        """Stop the writer and drop the files, also after an error."""
        try:
            self.writer.close()
        except DiskError:
            pass  # raised to the caller when it happened; the files are dropped anyway
        finally:
            self.backend.close()

    def _make_room(self, row: int, first: int, end: int) -> int:
        """See that groups up to ``end`` fit the row's last file; the group with which that file begins."""
        named = self.named
        if named is not None and not named.appendable:
            starts = named.held.copy()
            self.segments.add(starts, named.begin(starts))
            self._size_bytes[:] = 0
            named.appendable = True
        begin = int(self.segments.starts[-1, row])
        needed = (end - begin) * self.layout.slot_bytes
        if needed > self._size_bytes[row]:
            size_bytes = self.layout.file_bytes(end - begin, fine=named is not None)
            if named is not None:
                named.grow(size_bytes - int(self._size_bytes[row]))
            self.backend.ensure_size(int(self.segments.files[-1, row]), size_bytes)
            self._size_bytes[row] = size_bytes
        return begin

    def _seal(self, named: NamedFiles, row: int, first: int, buffer: ByteArray) -> None:
        """Zero the padding of packed groups, which would be somebody's old bytes, and seal them."""
        slots = buffer.reshape(-1, self.layout.slot_bytes)
        used_bytes = self.layout.geometry.group_bytes
        slots[:, used_bytes:] = 0
        end = first + len(slots)
        if end > named.seals.shape[1]:
            wider = np.zeros((len(named.seals), max(end, named.seals.shape[1] * 5 // 4)), named.seals.dtype)
            wider[:, : named.seals.shape[1]] = named.seals
            named.seals = wider
        named.seals[row, first:end] = named.sealer.seal(row // self.batch, first, slots[:, :used_bytes])
        named.held[row] = end
        self._changed[row] = True

    def _pack(self, buffer: ByteArray, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
        layout = self.layout
        slots = torch.from_numpy(buffer).view(dtype).view(-1, layout.slot_elements)
        groups = slots[:, : layout.group_elements].unflatten(1, layout.group_shape)
        for part, source in enumerate((keys, values)):
            groups[:, part].copy_(source.unflatten(1, (-1, layout.geometry.group_tokens)).transpose(0, 1))


class TileReader:
    """Iterator over ``(K, V)`` tiles ``[H_kv, n, d]`` of one sequence; the next tile is read while one is in use."""

    def __init__(
        self, store: GroupStore, row: int, first: int, groups: int, tile_groups: int, dtype: torch.dtype
    ) -> None:
        self._store, self._row, self._tile, self._dtype = store, row, tile_groups, dtype
        self._first, self._groups = first, groups
        self._slabs = [Slab(tile_groups * store.layout.slot_bytes) for _ in range(2)]

    def __iter__(self) -> TileReader:
        self._next = self._first
        self._ticket: int | None = None
        self._start_read()
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ticket is None:
            raise StopIteration
        started_s = time.perf_counter()
        self._store.backend.wait(self._ticket)
        first = self._next
        count = min(self._tile, self._groups - first)
        slab = self._slabs[(first - self._first) // self._tile % 2]
        self._next += count
        self._start_read()
        layout = self._store.layout
        slots = slab.array[: count * layout.slot_bytes].reshape(count, -1)
        self._store.unseal(np.full(count, self._row, np.int64), np.arange(first, first + count), slots)
        self._store.streamed_s += time.perf_counter() - started_s
        self._store.streamed_bytes += slots.nbytes
        raw = torch.from_numpy(slab.array)[: count * layout.slot_bytes].view(self._dtype)
        rows = raw.view(count, layout.slot_elements)
        if loops.converts_here(rows.dtype, torch.float32, rows.device):
            keys, values = loops.gather(rows, np.arange(count)[None], layout.group_shape)[:, 0]
            return keys, values
        groups = rows[:, : layout.group_elements].unflatten(1, layout.group_shape)
        keys, values = (groups[:, part].transpose(0, 1).flatten(1, 2) for part in (0, 1))
        return keys, values

    def _start_read(self) -> None:
        count = min(self._tile, self._groups - self._next)
        if count <= 0:
            self._ticket = None
            return
        slab = self._slabs[(self._next - self._first) // self._tile % 2]
        one = np.ones(1, np.int64)
        self._ticket = self._store.submit(one * self._row, one * self._next, one * count, one * slab.address)

    def close(self) -> None:
        """Wait for a read in flight, then release the tiles."""
        if self._ticket is not None:
            self._store.backend.wait(self._ticket)
            self._ticket = None
        for slab in self._slabs:
            slab.close()
