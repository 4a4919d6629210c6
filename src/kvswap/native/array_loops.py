"""What callers see of the compiled loops over plain arrays: looking groups up, planning reads, keeping what was read.

Each has a twin in NumPy, which is used where nothing was compiled; callers ask first (``available``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvswap.native.library import available as available
from kvswap.native.library import library
from kvswap.terms import IntArray


class SlotArrays:
    """Where the arrays of a pool of slots begin, since asking each array each time would take longer than the loops.

    ``table`` int32 ``[rows, columns]``, ``owner`` int64, ``worth`` float32 and ``seen`` int32 ``[slots]``,
    ``visits`` int32 ``[layers]`` (``memory.slots``); ``powers`` float32 ``[n]``: what is left of worth 1 after so
    many visits.
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
        self.held: tuple[NDArray[Any], ...] = table, owner, worth, seen, visits, powers
        self.rows, self.columns = table.shape
        self.slots, self.longest = len(owner), len(powers) - 1
        self.table, self.owner, self.worth, self.seen, self.visits, self.powers = [_at(each) for each in self.held]


def lookup(arrays: SlotArrays, rows: IntArray, groups: IntArray, *, first: int, visit: int) -> IntArray:
    """The slot of each group ``[n]``, or -1; those that were found gain worth.

    ``first`` is the number of the first slot that has worth, ``visit`` the number of this visit of the layer.
    """
    compiled = library()
    assert compiled is not None
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
    assert known, "rows and groups that the table does not have"
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
    landing_slot: int,
    landing_address: int,
    slot_bytes: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, int, int]:
    """``lookup`` of one layer's groups ``[B, n]`` and ``plan_reads`` of those that were not found, in one call.

    Those from ``ends`` ``[B]`` on are none. Returns the fields of ``kvswap.memory.lookup.Found``.
    """
    compiled = library()
    assert compiled is not None
    (batch, count), visits = groups.shape, arrays.held[4]
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
        landing_slot,
        landing_address,
        slot_bytes,
        _at(out),
    )
    assert reads >= 0, "groups that the table does not have, or more of them than can land"
    visits[layer] += 1
    rows = out[: 10 * size].reshape(10, size)
    wanted, missing, landed = out[10 * size :].tolist()
    slots, (sequences, absent, staged) = rows[0].reshape(batch, count), rows[1:4, :missing]
    files, begun, counts, addresses = rows[4:8, :reads]
    return slots, sequences, absent, staged, files, begun, counts, addresses, landed, wanted


def plan_reads(files: IntArray, groups: IntArray, gap_groups: int, spare: int) -> tuple[IntArray, IntArray]:
    """Extents of wanted groups (``kvswap.store.extents``).

    Returns
    -------
    ``[4, extents]``: file, first group, groups, first landing place of each; ``[n]``: landing place of each group.
    """
    compiled = library()
    assert compiled is not None
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
    """Keep groups that have been read in slots of less worth, from slot ``hand`` on; returns how many.

    ``keys`` ``[n]`` are their places in the flat table, ``staged`` ``[n]`` the slots they were read into; ``memory``
    is the address of all slots, those that have worth from number ``first`` on.
    """
    compiled = library()
    assert compiled is not None
    assert len(staged) >= len(keys) and 0 <= hand < arrays.slots >= looked
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
    assert kept >= 0, "keys that the table does not have, or slots that are not for staging"
    return kept


def _at(array: NDArray[Any]) -> int:
    """Address of the first element."""
    address: int = array.ctypes.data
    return address
