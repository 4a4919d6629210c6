"""Locates groups when those of a row are spread over several files. Arithmetic on arrays.

A row is one layer of one sequence. Segment s of a row begins at group ``starts[s, row]``. A group is in the last
segment that begins at or before it, and there ``group - start`` groups after the row's first one. A segment is one file
in stripes (``store/layout.py``), or one file a row, which is as if its first stripe never ended.
"""

from __future__ import annotations

import numpy as np

from kvswap.native import array_loops
from kvswap.native.arrays import IntArray
from kvswap.store.layout import place_in_file

_ENDLESS = 1 << 40
"""Groups in a stripe that no file fills."""


class Segments:
    """``starts`` and ``files`` are int64 ``(segments, rows)``, ``stripe_groups`` int64 ``(segments,)``: 0 is none."""

    def __init__(self, rows: int) -> None:
        self.starts: IntArray = np.empty((0, rows), np.int64)
        self.files: IntArray = np.empty((0, rows), np.int64)
        self.stripe_groups: IntArray = np.empty(0, np.int64)
        self._arrays = array_loops.SegmentArrays(self.starts, self.files, self.stripe_groups)

    def add(self, starts: IntArray, files: IntArray | int, stripe_groups: int | None) -> None:
        """Append a segment with groups from ``starts[row]`` on, in one file, or without stripes in ``files[row]``."""
        self.starts = np.vstack([self.starts, starts])
        self.files = np.vstack([self.files, np.broadcast_to(files, len(starts))])
        self.stripe_groups = np.append(self.stripe_groups, stripe_groups or 0)
        self._arrays = array_loops.SegmentArrays(self.starts, self.files, self.stripe_groups)

    def place(self, row: int, group: int) -> tuple[int, int, int]:
        """Of a group of the last segment: its file, its place there in groups, and how many of its row go on there."""
        starts, stripe_groups = self.starts[-1], int(self.stripe_groups[-1])
        index = group - int(starts[row])
        place = place_in_file(row, index, len(starts), stripe_groups)
        return int(self.files[-1, row]), place, stripe_groups - index % stripe_groups

    def locate(
        self, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, slot_bytes: int
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Files, offsets and lengths in bytes, and addresses, of extents of groups, in any order.

        An extent is split where it goes from a segment to the next or from a stripe to the next.
        """
        if array_loops.available():
            files, offsets, lengths, places = array_loops.locate(
                self._arrays, rows, first, count, addresses, slot_bytes
            )
            return files, offsets, lengths, places
        return self._locate(rows, first, count, addresses, slot_bytes)

    def _locate(
        self, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, slot_bytes: int
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        for starts in self.starts[1:]:
            rows, first, count, addresses = _split(rows, first, count, addresses, starts[rows], slot_bytes)
        segment = np.zeros(len(rows), np.int64)
        for number in range(1, len(self.starts)):
            segment[self.starts[number, rows] <= first] = number
        index = first - self.starts[segment, rows]
        width = np.where(self.stripe_groups, self.stripe_groups, _ENDLESS)
        pieces = (index + count - 1) // width[segment] - index // width[segment] + 1
        extent = np.repeat(np.arange(len(rows)), pieces)
        rows, segment = rows[extent], segment[extent]
        width = width[segment]
        stripe = index[extent] // width + np.arange(len(extent)) - (np.cumsum(pieces) - pieces)[extent]
        begin = np.maximum(index[extent], stripe * width)
        end = np.minimum((index + count)[extent], (stripe + 1) * width)
        stripe_groups = self.stripe_groups[segment]
        place = begin + (stripe * (self.starts.shape[1] - 1) + rows) * stripe_groups
        addresses = addresses[extent] + (begin - index[extent]) * slot_bytes
        return self.files[segment, rows], place * slot_bytes, (end - begin) * slot_bytes, addresses


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
