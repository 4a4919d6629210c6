"""The stored K, V of one layer of one sequence, in order, for exact attention over all of them.

A prompt that is appended to a stored context streams it once in every layer (``prefill``), and so do quality meters
and methods that read everything. Groups come from slots where all of them are in memory, else from disk; what is read
goes into slots that are free. Either way the tiles and their elements are the same. One thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvswap.core.attention import TiledAttention
from kvswap.core.batch_state import BatchState
from kvswap.native.arrays import IntArray
from kvswap.store.layout import FEW_QUERIES, tile_groups
from kvswap.store.tiles import TileMemory, TileReader
from kvswap.terms import ceil_div

MANY_QUERIES = FEW_QUERIES + 1


class StoredGroups:
    """All groups of one layer of one sequence that are flushed, tile by tile.

    ``queries`` is how many tokens attend to them. With ``memory``, several readers share their buffers.
    """

    def __init__(
        self,
        state: BatchState,
        layer: int,
        sequence: int,
        tokens: int,
        *,
        queries: int = MANY_QUERIES,
        memory: TileMemory | None = None,
    ) -> None:
        self._state, self._layer, self._sequence = state, layer, sequence
        slot_bytes, group_tokens = state.layout.slot_bytes, state.window.group_tokens
        self._tile = tile_groups(slot_bytes, group_tokens, queries=queries)
        self._slots = state.resident(layer, sequence, tokens)
        self._reader: TileReader | None = None
        self._next = 0
        if self._slots is None:
            groups, dtype = int(state.flushed[layer, sequence]), state.pool.dtypes[layer]
            self._reader = state.store.read_tiles(layer, sequence, groups, self._tile, dtype, memory=memory)

    @property
    def all_begun(self) -> bool:
        """Whether the last read has been started."""
        return self._reader is None or self._reader.all_begun

    def begin(self) -> None:
        """Start the first reads."""
        if self._reader is not None:
            self._reader.begin()

    def next_slots(self) -> torch.Tensor | None:
        """The next tile as it is stored, ``[n, slot_elements]`` on the CPU; None after the last."""
        if self._reader is None:
            slots = self._take()
            return None if slots is None else self._state.pool.rows(self._layer)[torch.from_numpy(slots)]
        rows = self._reader.next_slots()
        if rows is not None:
            first = self._next
            self._next += len(rows)
            if self._state.pool.share(self._layer):
                shape = self._state.layout.group_shape
                groups = rows[:, : self._state.layout.group_elements].unflatten(1, shape)
                self._keep(first, *(groups[:, part].transpose(0, 1).flatten(1, 2) for part in (0, 1)))
        return rows

    def next_tile(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K, V ``[H_kv, n, d]`` of the next tile on the device, valid until the next one; None after the last."""
        state = self._state
        if self._reader is None:
            slots = self._take()
            if slots is None:
                return None
            keys, values = state.pool.gather(self._layer, slots[None], torch.float32)[:, 0]
            return keys, values
        tile = next(self._reader, None)
        if tile is None:
            return None
        keys, values = (each.to(state.shape.device) for each in tile)
        first = self._next
        self._next += keys.shape[1] // state.window.group_tokens
        self._keep(first, keys, values)
        return keys, values

    def close(self) -> None:
        """Wait for reads in flight, whose bytes nobody needs any more, and release their memory."""
        if self._reader is not None:
            self._reader.close()

    def _take(self) -> IntArray | None:
        """Slots of the next tile; None after the last."""
        assert self._slots is not None
        slots = self._slots[self._next : self._next + self._tile]
        self._next += len(slots)
        return slots if len(slots) else None

    def _keep(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        pool = self._state.pool
        pool.keep(self._layer, self._sequence, first, keys, values, most=pool.share(self._layer))


def stored_tiles(
    state: BatchState, layer: int, sequence: int, tokens: int, groups: StoredGroups | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The first ``tokens`` stored tokens in order: first token, K and V ``[H_kv, n, d]``, valid until the next tile.

    ``groups`` may have begun already, and tiles that it has given stay out; it is closed at the end.
    """
    window, flushed = state.window, int(state.flushed[layer, sequence])
    groups = groups or StoredGroups(state, layer, sequence, tokens)
    groups.begin()
    start = 0
    try:
        while (tile := groups.next_tile()) is not None:
            yield start, *tile
            start += tile[0].shape[1]
    finally:
        groups.close()
    start = flushed * window.group_tokens
    if tokens > start:
        waiting = tokens - start
        head = state.pool.read_pinned(layer, sequence, flushed, ceil_div(waiting, window.group_tokens))
        yield start, head[0, :, :waiting], head[1, :, :waiting]


def attend_stored(state: BatchState, layer: int, sequence: int, query: torch.Tensor, tokens: int) -> TiledAttention:
    """Attend with ``query`` ``[H_q, q, d]`` to the first ``tokens`` stored tokens, in order."""
    attention = TiledAttention(query, state.shape.kv_heads, state.shape.scaling)
    for _, keys, values in stored_tiles(state, layer, sequence, tokens):
        attention.add(keys, values)
    return attention
