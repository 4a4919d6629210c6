"""Which of the groups that a layer will attend to are in memory, and a plan of reads for the others.

Arithmetic on arrays; nothing is read here. It is one compiled call, or its twin in NumPy: with one token in a step, a
call costs more than what it computes. ``core/decode.py`` calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvswap.memory.slots import SlotPool
from kvswap.native import array_loops
from kvswap.native.arrays import IntArray
from kvswap.store.read_plan import plan_reads


class Found(NamedTuple):
    """Where the groups of one layer are, or will be when they have been read.

    ``slots`` ``[B, n]``: the slot of each group, 0 where an entry is not real. ``sequences``, ``groups`` and ``staged``
    ``[m]``: the groups to read, and the staging slots that they are read into. ``rows``, ``first``, ``counts`` and
    ``addresses`` ``[reads]``: file row, first group, number of groups and memory address of each read. The reads fill
    the first ``filled`` staging slots. ``selected`` groups are real in all.
    """

    slots: IntArray
    sequences: IntArray
    groups: IntArray
    staged: IntArray
    rows: IntArray
    first: IntArray
    counts: IntArray
    addresses: IntArray
    filled: int
    selected: int


def find(pool: SlotPool, layer: int, groups: IntArray, ends: IntArray, *, gap_groups: int, half: int) -> Found:
    """Look up ``groups`` ``[B, n]``, ascending, of which those before ``ends`` ``[B]`` are real, and plan the reads.

    Groups are read into staging half ``half``. Gaps of up to ``gap_groups`` are read through while there is room.
    """
    if array_loops.available() and pool.compiled_lookup:
        found = array_loops.find(
            pool.arrays,
            groups,
            ends,
            layer=layer,
            first=pool.reuse_start,
            gap=gap_groups,
            places=pool.staging_groups,
            staging_slot=pool.staging_slot(half),
            staging_address=pool.staging_address(half),
            slot_bytes=pool.layout.slot_bytes,
        )
        return Found(*found)
    return _find(pool, layer, groups, ends, gap_groups, half)


def _find(pool: SlotPool, layer: int, groups: IntArray, ends: IntArray, gap_groups: int, half: int) -> Found:
    real = groups < ends[:, None]
    sequences = np.repeat(np.arange(pool.batch), groups.shape[1])[real.reshape(-1)]
    selected = groups[real]
    slots = pool.lookup(layer, sequences, selected)
    missing = slots < 0
    read_sequences, read_groups = sequences[missing], selected[missing]
    plan = plan_reads(
        layer * pool.batch + read_sequences, read_groups, gap_groups=gap_groups, places=pool.staging_groups
    )
    slots[missing] = staged = pool.staging_slot(half) + plan.place
    everywhere = np.zeros(groups.shape, np.int64)
    everywhere[real] = slots
    addresses = pool.staging_address(half) + plan.staging * pool.layout.slot_bytes
    reads = plan.files, plan.first, plan.count, addresses
    return Found(everywhere, read_sequences, read_groups, staged, *reads, int(plan.count.sum()), len(selected))
