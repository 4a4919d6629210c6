"""Compiled loops over NumPy arrays: look groups up, plan reads, locate them on disk, keep what was read.

``memory`` and ``store`` call them, and use NumPy where nothing was compiled; they ask ``available`` first. One thread
at a time on one pool of slots. Arguments that would reach outside the arrays raise ValueError, and nothing is done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvswap.native.arrays import IntArray
from kvswap.native.library import available as available
from kvswap.native.library import required_library

FoundArrays = tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, int, int]


class SlotArrays:
    """Addresses of the arrays of a pool of slots. Asking each array at each call would take longer than the loops.

    ``table`` int32 ``[rows, columns]``, ``owner`` int64, ``worth`` float32 and ``seen`` int32 ``[slots]``,
    ``visits`` int32 ``[layers]`` (``memory.slots``); ``powers`` float32 ``[n]``: what is left of worth 1 after
    that many visits.
    """

    def __init__(
        self,
        table: NDArray[np.int32],
        owner: IntArray,
        worth: NDArray[np.float32],
        seen: NDArray[np.int32],
        visits: NDArray[np.int32],
        powers: NDArray[np.float32],
    ) -> None:
        self.arrays: tuple[NDArray[Any], ...] = table, owner, worth, seen, visits, powers
        self.rows, self.columns = table.shape
        self.slots, self.longest = len(owner), len(powers) - 1
        self.table, self.owner, self.worth, self.seen, self.visits, self.powers = [_at(each) for each in self.arrays]


def lookup(arrays: SlotArrays, rows: IntArray, groups: IntArray, *, first: int, visit: int) -> IntArray:
    """The slot of each group ``[n]``, or -1. Slots that are found gain worth.

    ``first`` is the number of the first slot that has worth, ``visit`` the number of this visit of the layer. Raises
    ValueError.
    """
    compiled = required_library()
    found = np.empty(len(groups), np.int64)
    known = compiled.kvswap_lookup(
        arrays.table,
        arrays.rows,
        arrays.columns,
        _at(rows),
        _at(groups),
        len(groups),
        first,
        visit,
        arrays.powers,
        arrays.longest,
        arrays.worth,
        arrays.seen,
        _at(found),
    )
    if not known:
        raise ValueError("rows or groups that the table does not have")
    return found


def find(
    arrays: SlotArrays,
    groups: IntArray,
    ends: IntArray,
    *,
    layer: int,
    first: int,
    gap: int,
    places: int,
    staging_slot: int,
    staging_address: int,
    slot_bytes: int,
) -> FoundArrays:
    """``lookup`` of one layer's groups ``[B, n]`` and ``plan_reads`` of those that were not found, in one call.

    Groups from ``ends`` ``[B]`` on do not count. Returns the fields of ``kvswap.memory.lookup.Found``. Raises
    ValueError.
    """
    compiled = required_library()
    (batch, count), visits = groups.shape, arrays.arrays[4]
    size = batch * count
    groups, ends = np.ascontiguousarray(groups), np.ascontiguousarray(ends)
    out = np.empty(10 * size + 3, np.int64)
    reads = compiled.kvswap_find(
        arrays.table,
        arrays.rows,
        arrays.columns,
        layer * batch,
        _at(groups),
        batch,
        count,
        _at(ends),
        first,
        int(visits[layer]) + 1,
        arrays.powers,
        arrays.longest,
        arrays.worth,
        arrays.seen,
        gap,
        places,
        staging_slot,
        staging_address,
        slot_bytes,
        _at(out),
    )
    if reads < 0:
        raise ValueError("groups that the table does not have, or more of them than staging has room for")
    visits[layer] += 1
    return found(out, reads, batch, count)


def found(out: IntArray, reads: int, batch: int, count: int) -> FoundArrays:
    """What ``kvswap_find`` wrote to ``out``, of ``count`` groups of each of ``batch`` sequences: as ``find``."""
    size = batch * count
    rows = out[: 10 * size].reshape(10, size)
    requested, missing, filled = out[10 * size :].tolist()
    slots, (sequences, absent, staged) = rows[0].reshape(batch, count), rows[1:4, :missing]
    files, begun, counts, addresses = rows[4:8, :reads]
    return slots, sequences, absent, staged, files, begun, counts, addresses, filled, requested


def plan_reads(files: IntArray, groups: IntArray, gap_groups: int, spare: int) -> tuple[IntArray, IntArray]:
    """Extents of requested groups (``kvswap.store.read_plan``).

    Returns
    -------
    ``[4, extents]``: file, first group, groups, place in staging of the first; ``[n]``: place in staging of each group.
    """
    compiled = required_library()
    count = len(groups)
    files, groups = np.ascontiguousarray(files), np.ascontiguousarray(groups)
    joined, extents, place = np.empty(count, np.uint8), np.empty((4, count), np.int64), np.empty(count, np.int64)
    start, row_bytes = _at(extents), 8 * count
    found = compiled.kvswap_plan_reads(
        _at(files),
        _at(groups),
        count,
        gap_groups,
        spare,
        _at(joined),
        start,
        start + row_bytes,
        start + 2 * row_bytes,
        start + 3 * row_bytes,
        _at(place),
    )
    return extents[:, :found], place


class SegmentArrays:
    """Addresses of arrays of segments: ``starts``, ``files`` ``[segments, rows]``, ``stripe_groups`` ``[segments]``.

    All int64 and contiguous (``kvswap.store.segments``).
    """

    def __init__(self, starts: IntArray, files: IntArray, stripe_groups: IntArray) -> None:
        self.arrays = starts, files, stripe_groups
        self.arguments = *map(_at, self.arrays), *starts.shape


def locate(
    segments: SegmentArrays, rows: IntArray, first: IntArray, count: IntArray, addresses: IntArray, slot_bytes: int
) -> IntArray:
    """Pieces of extents of groups on disk (``kvswap.store.segments``), ``[4, pieces]``. Raises ValueError."""
    compiled, room = required_library(), 2 * len(rows)
    rows, first, count, addresses = map(np.ascontiguousarray, (rows, first, count, addresses))
    while True:
        out = np.empty((4, room), np.int64)
        pieces = compiled.kvswap_locate(
            *segments.arguments,
            _at(rows),
            _at(first),
            _at(count),
            _at(addresses),
            len(rows),
            slot_bytes,
            room,
            _at(out),
        )
        if pieces < 0:
            raise ValueError("rows or groups that are in no segment")
        if pieces <= room:
            return out[:, :pieces]
        room = pieces


def admit(
    arrays: SlotArrays,
    *,
    layer: int,
    layer_keys: int,
    hand: int,
    looked: int,
    keys: IntArray,
    staged: IntArray,
    memory: int,
    slot_bytes: int,
    first: int,
) -> int:
    """Keep groups that have been read in slots of less worth, from slot ``hand`` on. Returns how many.

    ``keys`` ``[n]`` are their places in the flat table, ``staged`` ``[n]`` the slots they were read into; ``memory``
    is the address of all slots, those that have worth from number ``first`` on. Raises ValueError.
    """
    compiled = required_library()
    if len(staged) < len(keys) or not 0 <= hand < arrays.slots >= looked:
        raise ValueError(f"{len(staged)} staged slots for {len(keys)} keys, hand {hand}, {looked} slots to look at")
    staged, scratch = np.ascontiguousarray(staged), np.empty(2 * looked, np.float32)
    kept: int = compiled.kvswap_admit(
        arrays.table,
        arrays.rows * arrays.columns,
        layer_keys,
        arrays.owner,
        arrays.worth,
        arrays.seen,
        arrays.visits,
        arrays.slots,
        hand,
        looked,
        arrays.powers,
        arrays.longest,
        layer,
        _at(keys),
        _at(staged),
        len(keys),
        _at(scratch),
        memory,
        slot_bytes,
        first,
    )
    if kept < 0:
        raise ValueError("keys that the table does not have, or slots that are not for staging")
    return kept


def _at(array: NDArray[Any]) -> int:
    """Address of the first element."""
    address: int = array.__array_interface__["data"][0]  # a third of the time of array.ctypes.data
    return address
