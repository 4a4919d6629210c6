"""Sliding windows of layers that stay in memory, as compiled decode steps keep them.

A window of W tokens is a ring buffer: token t of a sequence, padding not counted, has place ``t % W``, where the token
that leaves the window was. Attention does not depend on the order of tokens, since RoPE has been applied. Places lie in
slots of at most ``LARGEST_GROUP_TOKENS``, so that compiled attention reads them as it reads groups. Used by the cache,
in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvswap.native.arrays import BoolArray, IntArray
from kvswap.native.run_loops import Window
from kvswap.native.step_loops import TYPES, Slots
from kvswap.terms import ceil_div

LARGEST_GROUP_TOKENS = 64
_GROWTH_TOKENS = 512


class WindowStep:
    """Where layers with a window of ``window`` tokens put and find tokens in a step.

    ``tokens`` ``[B]`` are the tokens of each sequence before the step. The newest ones go to place ``offset`` of slots
    ``newest``; the layers attend to slots ``index`` ``[B, n]``, of which those in ``valid`` are real, None: all. The
    last real one holds tokens up to place ``last``. ``struct`` has all of it for compiled code.
    """

    def __init__(self, window: int, tokens: IntArray) -> None:
        self.group_tokens = next(size for size in range(min(window, LARGEST_GROUP_TOKENS), 0, -1) if window % size == 0)
        room = min(window, ceil_div(int(tokens.max()) + 1, _GROWTH_TOKENS) * _GROWTH_TOKENS)
        self.groups, batch = ceil_div(room, self.group_tokens), len(tokens)
        place, full = tokens % window, tokens >= window - 1
        first: IntArray = np.arange(batch, dtype=np.int64) * self.groups
        self.newest: IntArray = first + place // self.group_tokens
        self.offset: IntArray = place % self.group_tokens
        self.last: IntArray = np.where(full, self.group_tokens - 1, self.offset)
        self.index: IntArray = first[:, None] + np.arange(self.groups)
        self.valid: BoolArray | None = None
        if not full.all():
            self.valid = full[:, None] | (self.index <= self.newest[:, None])
        given = self.newest, self.offset, self.index, self.valid
        addresses = [None if each is None else each.ctypes.data for each in given]
        self.struct = Window(*addresses, self.groups, self.last.ctypes.data)


class _RingBuffer:
    """The places of one layer's window: ``data`` ``[B, groups, 2, H_kv, group_tokens, d]`` of the model's dtype.

    ``tokens`` have been put, padding included, of which ``padding`` ``[B]`` come before each sequence's own.
    """

    def __init__(self, window: int, padding: IntArray, tokens: int, data: torch.Tensor) -> None:
        self.window, self.padding, self.tokens, self.data = window, padding, tokens, data
        group_tokens, slot_bytes = data.shape[4], data[0, 0].nbytes
        count = data.shape[0] * data.shape[1]
        self.slots = Slots(data.data_ptr(), count, slot_bytes, TYPES[data.dtype], group_tokens)

    def grown(self, groups: int) -> _RingBuffer:
        """The same tokens in a ring buffer of ``groups`` groups."""
        batch, held, *rest = self.data.shape
        more = self.data.new_zeros(batch, groups - held, *rest)
        return _RingBuffer(self.window, self.padding, self.tokens, torch.cat((self.data, more), 1))

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take K, V ``[B, H_kv, n, d]`` of the last ``n`` of the tokens."""
        for b, (first, group, offset) in enumerate(self._places(keys.shape[2])):
            both = torch.stack((keys[b, :, first:], values[b, :, first:]))
            self.data[b][group, :, :, offset] = both.permute(2, 0, 1, 3)

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V ``[B, H_kv, n, d]`` of the last tokens, at most W - 1; 0 in padding."""
        count = min(self.tokens, self.window - 1)
        batch, _, _, heads, _, head_dim = self.data.shape
        found = self.data.new_zeros(2, batch, heads, count, head_dim)
        for b, (first, group, offset) in enumerate(self._places(count)):
            found[:, b, :, first:] = self.data[b][group, :, :, offset].permute(1, 2, 0, 3)
        return found[0], found[1]

    def _places(self, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """How many of the last ``count`` tokens of each sequence are padding; groups and offsets of the others."""
        start, stop, group_tokens = self.tokens - count, self.tokens, self.data.shape[4]
        for padding in self.padding.tolist():
            first = min(max(start, padding), stop)
            place = (torch.arange(first, stop) - padding) % self.window
            yield first - start, place // group_tokens, place % group_tokens


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc] # transformers is not typed
    """transformers' layer with a sliding window. While compiled steps run, its tensors lie in a ring buffer."""

    _buffer: _RingBuffer | None = None
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """K ``[B, H_kv, n, d]`` of the last tokens, at most W - 1; reading it ends the ring buffer."""
        self._end_buffer()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._end_buffer()
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        """V, like ``keys``."""
        self._end_buffer()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._end_buffer()
        self._values = values

    @property
    def size_bytes(self) -> int:
        """Memory of K and V."""
        if self._buffer is not None:
            return int(self._buffer.data.nbytes)
        return sum(each.nbytes for each in (self._keys, self._values) if each is not None)

    def slots(self, step: WindowStep, padding: IntArray) -> Slots:
        """The places of the window as slots for ``step``. ``padding`` ``[B]`` tokens come before each sequence."""
        buffer = self._buffer
        if buffer is None:
            assert self._keys is not None and self._values is not None
            batch, heads, _, head_dim = self._keys.shape
            shape = batch, step.groups, 2, heads, step.group_tokens, head_dim
            buffer = _RingBuffer(self.sliding_window, padding, self.cumulative_length, self._keys.new_zeros(shape))
            buffer.put(self._keys, self._values)
            self._keys = self._values = None
        elif step.groups > buffer.data.shape[1]:
            buffer = buffer.grown(step.groups)
        self._buffer = buffer
        return buffer.slots

    def advance(self) -> None:
        """The newest token of each sequence is in its place."""
        assert self._buffer is not None
        self._buffer.tokens += 1
        self.cumulative_length += 1

    def take_over(self, source: Any) -> None:
        """Hold what ``source`` holds, a layer of the same window. The tensors are shared: they are never written to."""
        self.lazy_initialization(source.keys, source.values)
        self.keys, self.values, self.cumulative_length = source.keys, source.values, source.cumulative_length

    def __copy__(self) -> WindowLayer:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        if self._buffer is not None:  # which later steps write to
            buffer = self._buffer
            other._buffer = _RingBuffer(buffer.window, buffer.padding, buffer.tokens, buffer.data.clone())
        return other

    def _end_buffer(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._keys, self._values = buffer.get()
