"""Path one: a prompt goes through the layers, one layer at a time, in chunks of tokens.

``run_layer`` takes the whole prompt through one decoder layer before the next begins, so one layer's K, V is in memory
at a time and nothing is read back. ``Prefill`` is what happens to that layer's K, V: exact attention chunk by chunk,
then into the store (written behind), the sketch and the pinned slots. A prompt that is appended to a stored context
attends to it exactly: the layer's stored K, V stream from disk in tiles, merged by log-sum-exp.

Tokens of a prompt attend to K, V as they are stored, rounded to the store's dtype, whether these were computed a moment
ago or come from disk. So it makes no difference how much of a prompt is stored, beyond the order of sums.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.core.attention import TiledAttention
from kvswap.core.batch_state import BatchState, not_finite
from kvswap.core.stored import StoredGroups, stored_tiles
from kvswap.errors import StorageError
from kvswap.memory.budget import SKETCH_TILE_TOKENS
from kvswap.native import loops
from kvswap.store.layout import FEW_QUERIES, STREAM_TILE_TOKENS
from kvswap.store.tiles import TileMemory
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
        self._first = not state.tokens.any()  # its values decide the stored dtype of each layer, once
        self._memory = TileMemory()
        self._begun: dict[tuple[int, int], StoredGroups] = {}  # of layer and sequence

    @property
    def filled_tokens(self) -> int:
        """Padded tokens of the prompt that this layer has taken."""
        return self._filled

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a chunk's K, V ``[B, H_kv, n, d]``; returns this layer's K, V of the prompt so far, as views.

        They are rounded to what is stored. Raises StorageError where float16 was asked for and cannot hold them.
        """
        start, stop = self._filled, self._filled + keys.shape[2]
        largest = _largest(keys, values) if self.state.shape.store_dtype.itemsize == 2 else 0.0
        if self._first:
            if start == 0:
                self.state.pool.dtypes[layer] = self.state.shape.store_dtype
            self._choose_dtype(layer, largest)
        dtype = self.state.pool.dtypes[layer]
        for part, new in enumerate((keys, values)):
            if dtype == torch.float16 and largest > FLOAT16_MAX:
                new = loops.within_float16(new)
            self._kv[part, :, :, start:stop] = new.to(dtype)
        if dtype == torch.float16 and largest > FLOAT16_MAX:
            _logger.warning(
                "keys or values are beyond float16, in which this context is stored; they are cut to its end"
            )
        self._filled = stop
        return self._kv[0, :, :, :stop], self._kv[1, :, :, :stop]

    def attend(
        self, layer: int, query: torch.Tensor, *, softcap: float = 0.0, sink_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Exact attention of a chunk that is appended: ``[B, H_q, q, d]`` to ``[B, q, H_q, d]``.

        ``softcap`` and ``sink_logits`` are those of ``TiledAttention``.
        """
        output = torch.stack([self._attend_stored(layer, b, query[b], softcap, sink_logits) for b in range(len(query))])
        if not math.isfinite(float(output.sum())):
            raise not_finite(layer, "keys, values or queries are not finite, so nothing can be appended")
        return output.to(query.dtype)

    def finish(self, layer: int) -> None:
        """The layer is through: its K, V go to disk, into the sketch and into the pinned slots."""
        state = self.state
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
        self.close()

    def close(self) -> None:
        """Wait for reads that nobody needs any more, and release their memory. May be called twice."""
        while self._begun:
            self._begun.popitem()[1].close()
        self._memory.close()

    def _attend_stored(
        self, layer: int, sequence: int, query: torch.Tensor, softcap: float, sink_logits: torch.Tensor | None
    ) -> torch.Tensor:
        state, reader = self.state, self._begin(layer, sequence)
        attention = TiledAttention(query, state.shape.kv_heads, state.shape.scaling, softcap)
        packed = (
            not softcap
            and self._kv.shape[3] <= FEW_QUERIES
            and loops.attends_here(state.pool.dtypes[layer], state.window.group_tokens, state.shape.device)
        )
        while packed and (slots := reader.next_slots()) is not None:
            self._begin_next(layer, sequence, reader)
            attention.add_groups(slots, state.layout.group_shape)
        for _, keys, values in stored_tiles(state, layer, sequence, int(state.tokens[sequence]), reader):
            self._begin_next(layer, sequence, reader)
            attention.add(keys, values)
        del self._begun[layer, sequence]
        stop = self._filled
        positions = torch.arange(stop, device=query.device)
        causal = positions[None, :] <= positions[stop - query.shape[1] :, None]
        for start in range(0, stop, STREAM_TILE_TOKENS):
            cut = slice(start, min(start + STREAM_TILE_TOKENS, stop))
            attention.add(self._kv[0, sequence, :, cut], self._kv[1, sequence, :, cut], causal[:, cut])
        return attention.result(sink_logits)

    def _begin(self, layer: int, sequence: int) -> StoredGroups:
        """What is stored of a layer and sequence; its first reads are on their way."""
        found = self._begun.get((layer, sequence))
        if found is None:
            state, queries = self.state, self._kv.shape[3]
            tokens = int(state.tokens[sequence])
            found = StoredGroups(state, layer, sequence, tokens, queries=queries, memory=self._memory)
            self._begun[layer, sequence] = found
            found.begin()
        return found

    def _begin_next(self, layer: int, sequence: int, reader: StoredGroups) -> None:
        """Behind the last read of ``reader`` begin the next one: of a sequence, the next chunk or the next layer."""
        if not reader.all_begun:
            return
        if sequence + 1 < self.state.batch:
            following = layer, sequence + 1
        else:
            following = (layer if self._filled < self._kv.shape[3] else layer + 1), 0
        if following[0] < self.state.shape.layers:
            self._begin(*following)

    def _choose_dtype(self, layer: int, largest: float) -> None:
        """Store float16 unless values come near its end, then bfloat16 (when the choice is ours)."""
        state = self.state
        if (
            state.shape.store_dtype != torch.float16 or not FLOAT16_SAFE <= largest < math.inf
        ):  # pinning refuses the rest
            return
        if state.config.store_dtype == "float16":
            raise StorageError(
                f"store_dtype float16: a key or value reaches {largest:.0f}, too near the end of float16",
                hint='use store_dtype="bfloat16" or "auto"',
            )
        state.pool.dtypes[layer] = torch.bfloat16


def _largest(*tensors: torch.Tensor) -> float:
    """The largest magnitude in any of the tensors; without a copy, as abs() would make."""
    ends = [float(end) for each in tensors for end in torch.aminmax(each)]
    return max(map(abs, ends))
