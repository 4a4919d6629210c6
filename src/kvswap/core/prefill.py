"""Path one: a prompt goes through the layers, one layer at a time, in chunks of tokens.

``run_layer`` takes the whole prompt through one decoder layer before the next begins, so one layer's K, V is in memory
at a time and nothing is read back. ``Prefill`` is what happens to that layer's K, V: exact attention chunk by chunk,
then into the store (written behind), the sketch and the pinned slots. A prompt that is appended to a stored context
attends to it exactly: the layer's stored K, V stream from disk in tiles, merged by log-sum-exp.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.core.attention import TiledAttention, chunk_attention
from kvswap.core.batch_state import BatchState, not_finite
from kvswap.errors import StorageError
from kvswap.memory.budget import SKETCH_TILE_TOKENS
from kvswap.native.arrays import IntArray
from kvswap.store.layout import STREAM_TILE_TOKENS, tile_groups
from kvswap.terms import FLOAT16_MAX, ceil_div

FLOAT16_SAFE = 30_000.0  # half of what float16 holds: decode may bring larger values than the prompt did
_logger = logging.getLogger("kvswap")


def chunk_spans(tokens: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens to take through a layer. A short rest joins the last chunk, which keeps results bit-equal."""
    start = 0
    while start < tokens:
        stop = start + chunk_tokens
        if tokens - stop < chunk_tokens // 2:
            stop = tokens
        yield start, stop
        start = stop


def run_layer(
    forward: Callable[[torch.Tensor, int, int], torch.Tensor], hidden: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Take ``hidden`` ``[B, T, E]`` through one layer chunk by chunk; ``forward(chunk, start, stop)`` is the layer.

    The result is a fresh tensor: the input may be the caller's embeddings.
    """
    tokens = hidden.shape[1]
    output: torch.Tensor | None = None
    for start, stop in chunk_spans(tokens, chunk_tokens):
        piece = forward(hidden[:, start:stop], start, stop)
        if stop - start == tokens:
            return piece
        if output is None:
            output = piece.new_empty((*hidden.shape[:2], piece.shape[-1]))
        output[:, start:stop] = piece
    assert output is not None
    return output


class Prefill:
    """One prompt on its way into a state: T padded tokens, of which ``pads[b]`` on the left are padding.

    With ``recompute``, the prompt begins with everything that is stored. It is computed instead of read, and stays as
    it is on disk.
    """

    def __init__(self, state: BatchState, tokens: int, pads: NDArray[np.int64], *, recompute: bool = False) -> None:
        shape = state.shape
        self.state, self.pads, self.new_tokens = state, pads, tokens - pads - (state.tokens if recompute else 0)
        self.appending, self._recompute = bool(state.tokens.any()) and not recompute, recompute
        state.ensure_capacity(int((state.tokens + self.new_tokens).max()))
        size = (2, state.batch, shape.kv_heads, tokens, shape.head_dim)
        self._kv = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self._filled = 0

    @property
    def filled_tokens(self) -> int:
        """Padded tokens of the prompt that this layer has taken."""
        return self._filled

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a chunk's K, V ``[B, H_kv, n, d]``; returns this layer's K, V of the prompt so far, as views."""
        start, stop = self._filled, self._filled + keys.shape[2]
        self._kv[0, :, :, start:stop] = keys
        self._kv[1, :, :, start:stop] = values
        self._filled = stop
        return self._kv[0, :, :, :stop], self._kv[1, :, :, :stop]

    def attend(self, layer: int, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Exact attention of a chunk: ``[B, H_q, q, d]`` to ``[B, q, H_q, d]``."""
        keys, values = self._kv[0, :, :, : self._filled], self._kv[1, :, :, : self._filled]
        if not self.appending:
            return chunk_attention(query, keys, values, mask, self.state.shape.scaling)
        output = torch.stack([self._attend_stored(layer, b, query[b]) for b in range(len(query))])
        if not math.isfinite(float(output.sum())):
            raise not_finite(layer, "keys, values or queries are not finite, so nothing can be appended")
        return output.to(query.dtype)

    def finish(self, layer: int) -> None:
        """The layer is through: its K, V go to disk, into the sketch and into the pinned slots."""
        state = self.state
        if not state.tokens.any():  # decided once: what is stored already is read as what it was stored
            state.pool.dtypes[layer] = self._store_dtype()
        if state.pool.dtypes[layer] == torch.float16:
            self._clamp()
        for sequence in range(state.batch):
            first = int(state.flushed[layer, sequence])
            begin = first * state.window.group_tokens if self._recompute else int(self.pads[sequence])
            keys, values = self._kv[:, sequence, :, begin : self._filled]
            waiting = int(state.tokens[sequence]) - first * state.window.group_tokens
            if waiting > 0 and not self._recompute:  # tokens that had not been flushed come before the new ones
                groups = ceil_div(waiting, state.window.group_tokens)
                head = state.pool.read_pinned(layer, sequence, first, groups)[:, :, :waiting].to(keys.dtype)
                keys, values = torch.cat((head[0], keys), dim=1), torch.cat((head[1], values), dim=1)
            state.pin(layer, sequence, keys, values, first)
            tile = SKETCH_TILE_TOKENS // state.window.group_tokens * state.window.group_tokens
            for start in range(0, keys.shape[1], tile):
                cut = slice(start, start + tile)
                state.append(layer, sequence, keys[:, cut], values[:, cut])
            if not self._recompute:  # what was computed again may differ in its last bits from what is on disk
                state.pool.keep(layer, sequence, first, keys, values, most=state.pool.share(layer))
        self._filled = 0

    def done(self) -> None:
        """All layers are through."""
        self.state.tokens += self.new_tokens

    def _attend_stored(self, layer: int, sequence: int, query: torch.Tensor) -> torch.Tensor:
        attention = attend_stored(self.state, layer, sequence, query, int(self.state.tokens[sequence]))
        stop = self._filled
        positions = torch.arange(stop, device=query.device)
        causal = positions[None, :] <= positions[stop - query.shape[1] :, None]
        for start in range(0, stop, STREAM_TILE_TOKENS):
            cut = slice(start, min(start + STREAM_TILE_TOKENS, stop))
            attention.add(self._kv[0, sequence, :, cut], self._kv[1, sequence, :, cut], causal[:, cut])
        return attention.result()

    def _clamp(self) -> None:
        """Keep values within float16, which a later prompt or float16 arithmetic may exceed, as decode steps do."""
        kv = self._kv[:, :, :, : self._filled]
        low, high = torch.aminmax(kv)
        if max(-float(low), float(high)) > FLOAT16_MAX:
            _logger.warning(
                "keys or values are beyond float16, in which this context is stored; they are cut to its end"
            )
            kv.clamp_(-FLOAT16_MAX, FLOAT16_MAX)

    def _store_dtype(self) -> torch.dtype:
        """float16 unless values come near its end, then bfloat16 (when the choice is ours)."""
        requested = self.state.shape.store_dtype
        if requested != torch.float16:
            return requested
        low, high = torch.aminmax(self._kv[:, :, :, : self._filled])  # no copy, as abs() would be
        largest = max(-float(low), float(high))
        if not largest >= FLOAT16_SAFE:  # NaN, too: it is found when it is pinned
            return requested
        if self.state.config.store_dtype == "float16":
            raise StorageError(
                f"store_dtype float16: a key or value reaches {largest:.0f}, too near the end of float16",
                hint='use store_dtype="bfloat16" or "auto"',
            )
        return torch.bfloat16


def attend_stored(state: BatchState, layer: int, sequence: int, query: torch.Tensor, tokens: int) -> TiledAttention:
    """Attend with ``query`` ``[H_q, q, d]`` to the first ``tokens`` stored tokens, streamed from disk in order."""
    attention = TiledAttention(query, state.shape.kv_heads, state.shape.scaling)
    for _, keys, values in stored_tiles(state, layer, sequence, tokens):
        attention.add(keys, values)
    return attention


def stored_tiles(
    state: BatchState, layer: int, sequence: int, tokens: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The first ``tokens`` stored tokens in order: first token, K and V ``[H_kv, n, d]``, valid until the next tile.

    Nothing is read where all of them are in memory. What is read is kept in slots that are free.
    """
    group_tokens, start = state.window.group_tokens, 0
    flushed = int(state.flushed[layer, sequence])
    slots = state.resident(layer, sequence, tokens)
    tiles = _read_tiles(state, layer, sequence, flushed) if slots is None else _tiles_in_memory(state, layer, slots)
    try:
        for keys, values in tiles:
            yield start, keys, values
            start += keys.shape[1]
    finally:
        tiles.close()
    waiting = tokens - start
    if waiting > 0:
        head = state.pool.read_pinned(layer, sequence, flushed, ceil_div(waiting, group_tokens))[:, :, :waiting]
        yield start, head[0], head[1]


def _read_tiles(
    state: BatchState, layer: int, sequence: int, groups: int
) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
    """K, V ``[H_kv, n, d]`` of the first ``groups`` from disk, on the device of the model."""
    group_tokens, pool = state.window.group_tokens, state.pool
    reader = state.store.read_tiles(layer, sequence, groups, tile_groups(group_tokens), pool.dtypes[layer])
    first = 0
    try:
        for keys, values in reader:
            keys, values = keys.to(state.shape.device), values.to(state.shape.device)
            yield keys, values
            pool.keep(layer, sequence, first, keys, values, most=pool.share(layer))
            first += keys.shape[1] // group_tokens
    finally:
        reader.close()


def _tiles_in_memory(state: BatchState, layer: int, slots: IntArray) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
    """K, V of groups that are in ``slots``, in the same tiles as from disk."""
    step = tile_groups(state.window.group_tokens)
    for start in range(0, len(slots), step):
        keys, values = state.pool.gather(layer, slots[None, start : start + step], torch.float32)[:, 0]
        yield keys, values
