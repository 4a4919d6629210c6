"""Seals and sketch of the groups on disk, and the state beside them, as bytes (docs/file-format.md).

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
from kvswap.sessions.manifest import Counts, Layout
from kvswap.sessions.seal import Sealer, Seals

MAGIC = b"KVSWIDX1"
_HEADER = struct.Struct("<8sQQ")

Arrays = dict[str, NDArray[np.generic]]


@dataclass(slots=True)
class LayerIndex:
    """One layer's groups in order: ``seals`` ``(n,)``, ``codes`` uint8 ``(rows, n * G)``, ``scales`` uint16
    ``(2 or 0, n * G)``, the bits of float16."""

    seals: Seals
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint16]


def empty_index(layout: Layout, sealer: Sealer) -> list[LayerIndex]:
    """No groups in any layer."""
    codes, scales = np.empty((layout.code_rows, 0), np.uint8), np.empty((layout.scale_rows, 0), np.uint16)
    return [LayerIndex(np.empty(0, sealer.dtype), codes, scales) for _ in range(layout.layers)]


def batch_name(segment: int, offset_bytes: int) -> str:
    """What a batch is wrapped for: where it stands."""
    return f"index-{segment} {offset_bytes}"


def encode_batch(first: Counts, layers: Sequence[LayerIndex], sealer: Sealer, name: str) -> bytes:
    """A batch with new groups of every layer, which begin at ``first``; ``name`` is that of ``batch_name``."""
    payload = encode_arrays(
        {
            "first": np.array(first, np.int64),
            "count": np.array([len(layer.seals) for layer in layers], np.int64),
            **sealer.pack(np.concatenate([layer.seals for layer in layers])),
            "codes": np.concatenate([layer.codes.reshape(-1) for layer in layers]),
            "scales": np.concatenate([layer.scales.reshape(-1) for layer in layers]),
        }
    )
    payload = sealer.wrap(payload, name)
    return _HEADER.pack(MAGIC, len(payload), xxhash.xxh3_64_intdigest(payload)) + payload


def decode_index(
    data: bytes, layout: Layout, sealer: Sealer, segment: int, start: Counts, ends: Counts, what: str
) -> list[LayerIndex]:
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
        payload = sealer.unwrap(payload, batch_name(segment, offset), what)
        offset += _HEADER.size + length
        for number, piece in enumerate(_split(decode_arrays(payload, what), layout, sealer, reached, what)):
            pieces[number].append(piece)
            reached[number] += len(piece.seals)
    if any(count < end for count, end in zip(reached, ends, strict=True)):
        raise _damaged(what, "groups are missing")
    return [
        _cut(_join(found), end - first, layout.group_tokens) if found else empty
        for found, first, end, empty in zip(pieces, start, ends, empty_index(layout, sealer), strict=True)
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


def _split(arrays: Arrays, layout: Layout, sealer: Sealer, reached: list[int], what: str) -> list[LayerIndex]:
    tokens, rows = layout.group_tokens, layout.code_rows
    first, count = (take(arrays, name, np.int64, what, layout.layers) for name in ("first", "count"))
    seals = sealer.unpack(arrays, what)
    counts = [int(each) for each in count]
    # checked before anything is multiplied or cut by them
    if any(not 0 <= each <= seals.size for each in counts) or sum(counts) != seals.size or first.tolist() != reached:
        raise _damaged(what, "the groups of a batch do not join those before")
    codes = take(arrays, "codes", np.uint8, what, seals.size * tokens * rows)
    scales, width = _scales(arrays, layout, seals.size * tokens, what), layout.scale_rows * tokens
    layers, at = [], 0
    for number in counts:
        stop = at + number
        layers.append(
            LayerIndex(
                seals[at:stop],
                codes[at * tokens * rows : stop * tokens * rows].reshape(rows, -1).view(np.uint8),
                scales[at * width : stop * width].reshape(layout.scale_rows, number * tokens),
            )
        )
        at = stop
    return layers


def _scales(arrays: Arrays, layout: Layout, tokens: int, what: str) -> NDArray[np.uint16]:
    found = take(arrays, "scales", np.uint16, what)
    if not layout.scale_rows and found.size == 2 * tokens:  # version 1 wrote zeros where a sketch has none
        found = found[:0]
    if found.size != layout.scale_rows * tokens:
        raise _damaged(what, "scales are of another size")
    return found.view(np.uint16)


def _join(pieces: list[LayerIndex]) -> LayerIndex:
    if len(pieces) == 1:
        return pieces[0]
    return LayerIndex(
        np.concatenate([piece.seals for piece in pieces]),
        np.concatenate([piece.codes for piece in pieces], axis=1),
        np.concatenate([piece.scales for piece in pieces], axis=1),
    )


def _cut(layer: LayerIndex, groups: int, group_tokens: int) -> LayerIndex:
    tokens = groups * group_tokens
    return LayerIndex(layer.seals[:groups], layer.codes[:, :tokens], layer.scales[:, :tokens])


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", hint="try: kvswap sessions repair")
