"""Where groups lie when a row's groups are spread over several files: arithmetic on arrays, no input or output.

A row is one layer of one sequence. Segment s of a row begins at group ``starts[s, row]``; a group is in the last
segment that begins at or before it, and group g of a segment is ``g - start`` slots into its file.
"""

from __future__ import annotations

import numpy as np

from kvswap.terms import IntArray


class Segments:
    """``starts`` and ``files`` int64 ``(segments, rows)``; ``add`` puts one more behind."""

    def __init__(self, starts: IntArray, files: IntArray) -> None:
        self.starts, self.files = starts, files

    def add(self, starts: IntArray, files: IntArray) -> None:
        """A segment that takes over from ``starts[row]`` on."""
        self.starts = np.vstack([self.starts, starts])
        self.files = np.vstack([self.files, files])

    def locate(
        self, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, slot_bytes: int
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Files, offsets, lengths and addresses of extents of groups; one that spans segments becomes several."""
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
    """Cut extents in two where group ``at`` lies inside them."""
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
