"""The index of a segment: seals and sketch of the groups on disk, as bytes (docs/file-format.md).

An index is a sequence of batches, one for each commit that brought new groups. A batch is a header and a safetensors
payload. Decoding raises DamagedError for anything that ``encode_batch`` would not have written. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvswap.sessions.arrays import Arrays, damaged, decode_arrays, encode_arrays, take
from kvswap.sessions.manifest import Counts, Layout
from kvswap.sessions.seal import Sealer
from kvswap.store.group_seals import Seals

MAGIC = b"KVSWIDX1"
_HEADER = struct.Struct("<8sQQ")


@dataclass(slots=True)
class LayerIndex:
    """One layer's groups in order.

    ``seals`` has one entry a group, ``[n]``. ``codes`` is uint8 ``[code_rows, n * group_tokens]``. ``scales`` is uint16
    ``[2 or 0, n * group_tokens]``: the bits of float16 numbers.
    """

    seals: Seals
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint16]


def empty_index(layout: Layout, sealer: Sealer) -> list[LayerIndex]:
    """No groups in any layer."""
    codes, scales = np.empty((layout.code_rows, 0), np.uint8), np.empty((layout.scale_rows, 0), np.uint16)
    return [LayerIndex(np.empty(0, sealer.dtype), codes, scales) for _ in range(layout.layers)]


def batch_name(segment: int, offset_bytes: int) -> str:
    """The name that an encrypted batch is bound to: its file and its place in it."""
    return f"index-{segment} {offset_bytes}"


def encode_batch(first: Counts, layers: Sequence[LayerIndex], sealer: Sealer, name: str) -> bytes:
    """A batch with the new groups of every layer, from ``first[layer]`` on; ``name`` is that of ``batch_name``."""
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
    data: bytes, layout: Layout, sealer: Sealer, segment: int, start: Counts, ends: Counts, label: str
) -> list[LayerIndex]:
    """Groups ``start`` up to ``ends`` of every layer from all batches of a segment's index. Raises DamagedError."""
    pieces: list[list[LayerIndex]] = [[] for _ in range(layout.layers)]
    reached, offset = list(start), 0
    while offset < len(data):
        head = data[offset : offset + _HEADER.size]
        if len(head) < _HEADER.size:
            raise damaged(label, "a batch ends too early")
        magic, length, expected = _HEADER.unpack(head)
        payload = data[offset + _HEADER.size : offset + _HEADER.size + length]
        if magic != MAGIC or len(payload) != length or xxhash.xxh3_64_intdigest(payload) != expected:
            raise damaged(label, f"its batch at byte {offset:,} is not what was written")
        payload = sealer.unwrap(payload, batch_name(segment, offset), label)
        offset += _HEADER.size + length
        for number, piece in enumerate(_split(decode_arrays(payload, label), layout, sealer, reached, label)):
            pieces[number].append(piece)
            reached[number] += len(piece.seals)
    if any(count < end for count, end in zip(reached, ends, strict=True)):
        raise damaged(label, "groups are missing")
    return [
        _shorten(_join(found), end - first, layout.group_tokens) if found else empty
        for found, first, end, empty in zip(pieces, start, ends, empty_index(layout, sealer), strict=True)
    ]


def join_indexes(parts: Sequence[list[LayerIndex]]) -> list[LayerIndex]:
    """The indexes of consecutive segments as one."""
    return [_join(list(layer)) for layer in zip(*parts, strict=True)]


def _split(arrays: Arrays, layout: Layout, sealer: Sealer, reached: list[int], label: str) -> list[LayerIndex]:
    """The layers of one batch, which must continue at the groups ``reached``."""
    tokens, rows = layout.group_tokens, layout.code_rows
    first, count = (take(arrays, name, np.int64, label, layout.layers) for name in ("first", "count"))
    seals = sealer.unpack(arrays, label)
    counts = [int(each) for each in count]
    # Checked before anything is multiplied or sliced by these numbers.
    if any(not 0 <= each <= seals.size for each in counts) or sum(counts) != seals.size or first.tolist() != reached:
        raise damaged(label, "the groups of a batch do not continue those before")
    codes = take(arrays, "codes", np.uint8, label, seals.size * tokens * rows)
    scales, width = _scales(arrays, layout, seals.size * tokens, label), layout.scale_rows * tokens
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


def _scales(arrays: Arrays, layout: Layout, tokens: int, label: str) -> NDArray[np.uint16]:
    found = take(arrays, "scales", np.uint16, label)
    if not layout.scale_rows and found.size == 2 * tokens:  # version 1 wrote zeros for sketches without scales
        found = found[:0]
    if found.size != layout.scale_rows * tokens:
        raise damaged(label, "scales have another size")
    return found.view(np.uint16)


def _join(pieces: list[LayerIndex]) -> LayerIndex:
    if len(pieces) == 1:
        return pieces[0]
    return LayerIndex(
        np.concatenate([piece.seals for piece in pieces]),
        np.concatenate([piece.codes for piece in pieces], axis=1),
        np.concatenate([piece.scales for piece in pieces], axis=1),
    )


def _shorten(layer: LayerIndex, groups: int, group_tokens: int) -> LayerIndex:
    tokens = groups * group_tokens
    return LayerIndex(layer.seals[:groups], layer.codes[:, :tokens], layer.scales[:, :tokens])
