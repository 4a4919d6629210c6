"""Locates groups when those of a row are spread over several files. Arithmetic on arrays.

A row is one layer of one sequence. Segment s of a row begins at group ``starts[s, row]``. A group is in the last
segment that begins at or before it, ``group - start`` slots into that segment's file.
"""

from __future__ import annotations

import numpy as np

from kvswap.native.arrays import IntArray


class Segments:
    """``starts`` and ``files`` are int64 ``(segments, rows)``."""

    def __init__(self, starts: IntArray, files: IntArray) -> None:
        self.starts, self.files = starts, files

    def add(self, starts: IntArray, files: IntArray) -> None:
        """Append a segment that holds groups from ``starts[row]`` on."""
        self.starts = np.vstack([self.starts, starts])
        self.files = np.vstack([self.files, files])

    def locate(
        self, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, slot_bytes: int
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Files, offsets and lengths in bytes, and addresses, of extents of groups; split where one spans segments."""
        if len(self.starts) == 1:
            return self.files[0, rows], (first - self.starts[0, rows]) * slot_bytes, count * slot_bytes, addresses
        for starts in self.starts[1:]:
            rows, first, count, addresses = _split(rows, first, count, addresses, starts[rows], slot_bytes)
        segment = np.zeros(len(rows), np.int64)
        for number in range(1, len(self.starts)):
            segment[self.starts[number, rows] <= first] = number
        offsets = (first - self.starts[segment, rows]) * slot_bytes
        return self.files[segment, rows], offsets, count * slot_bytes, addresses


def _split(
    rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, at: IntArray, slot_bytes: int
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Split extents at group ``at`` where it lies inside them."""
    cut = np.flatnonzero((first < at) & (at < first + count))
    if not len(cut):
        return rows, first, count, addresses
    before = at[cut] - first[cut]
    rest = count[cut] - before
    count = count.copy()
    count[cut] = before
    return (
        np.concatenate([rows, rows[cut]]),
        np.concatenate([first, at[cut]]),
        np.concatenate([count, rest]),
        np.concatenate([addresses, addresses[cut] + before * slot_bytes]),
    )
