"""Checksums and sketch of the groups on disk, and the state beside them, as bytes (docs/file-format.md).

An index is a run of batches, a batch is a header and a safetensors payload. Decoding raises DamagedError for anything
that is not what ``encode`` makes, and takes no more memory than a small multiple of the bytes given. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from kvswap.errors import DamagedError
from kvswap.store.manifest import Counts, Layout

MAGIC = b"KVSWIDX1"
_HEADER = struct.Struct("<8sQQ")

Arrays = dict[str, NDArray[np.generic]]


@dataclass(slots=True)
class LayerIndex:
    """One layer's groups in order: ``sums`` uint64 ``(n,)``, ``codes`` uint8 ``(rows, n * G)``, ``scales`` uint16
    ``(2, n * G)``, the bits of float16."""

    sums: NDArray[np.uint64]
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint16]


def empty_index(layout: Layout) -> list[LayerIndex]:
    """No groups in any layer."""
    return [
        LayerIndex(np.empty(0, np.uint64), np.empty((layout.code_rows, 0), np.uint8), np.empty((2, 0), np.uint16))
        for _ in range(layout.layers)
    ]


def encode_batch(first: Counts, layers: Sequence[LayerIndex]) -> bytes:
    """A batch with new groups of every layer, which begin at ``first``."""
    payload = encode_arrays(
        {
            "first": np.array(first, np.int64),
            "count": np.array([len(layer.sums) for layer in layers], np.int64),
            "sums": np.concatenate([layer.sums for layer in layers]),
            "codes": np.concatenate([layer.codes.reshape(-1) for layer in layers]),
            "scales": np.concatenate([layer.scales.reshape(-1) for layer in layers]),
        }
    )
    return _HEADER.pack(MAGIC, len(payload), xxhash.xxh3_64_intdigest(payload)) + payload


def decode_index(data: bytes, layout: Layout, start: Counts, ends: Counts, what: str) -> list[LayerIndex]:
    """Groups ``start`` up to ``ends`` of every layer from all batches of a segment's index."""
    pieces: list[list[LayerIndex]] = [[] for _ in range(layout.layers)]
    reached, offset = list(start), 0
    while offset < len(data):
        head = data[offset : offset + _HEADER.size]
        if len(head) < _HEADER.size:
            raise _damaged(what, "a batch ends too early")
        magic, length, expected = _HEADER.unpack(head)
        payload = data[offset + _HEADER.size : offset + _HEADER.size + length]
        if magic != MAGIC or len(payload) != length or xxhash.xxh3_64_intdigest(payload) != expected:
            raise _damaged(what, f"its batch at byte {offset:,} is not what was written")
        offset += _HEADER.size + length
        for number, piece in enumerate(_split(decode_arrays(payload, what), layout, reached, what)):
            pieces[number].append(piece)
            reached[number] += len(piece.sums)
    if any(count < end for count, end in zip(reached, ends, strict=True)):
        raise _damaged(what, "groups are missing")
    return [
        _cut(_join(found), end - first, layout.group_tokens) if found else empty
        for found, first, end, empty in zip(pieces, start, ends, empty_index(layout), strict=True)
    ]


def join_indexes(parts: Sequence[list[LayerIndex]]) -> list[LayerIndex]:
    """The indexes of consecutive segments as one."""
    return [_join(list(layer)) for layer in zip(*parts, strict=True)]


def encode_arrays(arrays: Arrays) -> bytes:
    """A safetensors file."""
    data: bytes = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def decode_arrays(data: bytes, what: str) -> Arrays:
    """The arrays of a safetensors file. Raises DamagedError."""
    try:
        found: Arrays = safetensors.numpy.load(data)
        return found
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(what, str(error)) from error


def take(arrays: Arrays, name: str, dtype: type, what: str, size: int | None = None) -> NDArray[np.generic]:
    """One array, which must be there with that dtype, one dimension and ``size`` elements. Raises DamagedError."""
    found = arrays.get(name)
    if found is None or found.dtype != np.dtype(dtype) or found.ndim != 1 or (size is not None and found.size != size):
        raise _damaged(what, f"{name} is missing or of another size")
    return found


def _split(arrays: Arrays, layout: Layout, reached: list[int], what: str) -> list[LayerIndex]:
    tokens, rows = layout.group_tokens, layout.code_rows
    first, count = (take(arrays, name, np.int64, what, layout.layers) for name in ("first", "count"))
    sums = take(arrays, "sums", np.uint64, what)
    counts = [int(each) for each in count]
    # checked before anything is multiplied or cut by them
    if any(not 0 <= each <= sums.size for each in counts) or sum(counts) != sums.size or first.tolist() != reached:
        raise _damaged(what, "the groups of a batch do not join those before")
    codes = take(arrays, "codes", np.uint8, what, sums.size * tokens * rows)
    scales = take(arrays, "scales", np.uint16, what, sums.size * tokens * 2)
    layers, at = [], 0
    for number in counts:
        stop = at + number
        layers.append(
            LayerIndex(
                sums[at:stop].astype(np.uint64, copy=False),
                codes[at * tokens * rows : stop * tokens * rows].reshape(rows, -1).view(np.uint8),
                scales[at * tokens * 2 : stop * tokens * 2].reshape(2, -1).view(np.uint16),
            )
        )
        at = stop
    return layers


def _join(pieces: list[LayerIndex]) -> LayerIndex:
    if len(pieces) == 1:
        return pieces[0]
    return LayerIndex(
        np.concatenate([piece.sums for piece in pieces]),
        np.concatenate([piece.codes for piece in pieces], axis=1),
        np.concatenate([piece.scales for piece in pieces], axis=1),
    )


def _cut(layer: LayerIndex, groups: int, group_tokens: int) -> LayerIndex:
    tokens = groups * group_tokens
    return LayerIndex(layer.sums[:groups], layer.codes[:, :tokens], layer.scales[:, :tokens])


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", hint="try: kvswap sessions repair")
