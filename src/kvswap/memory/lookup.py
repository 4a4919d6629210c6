"""What a layer is about to attend to: which of its groups are in memory, and the reads that bring the others.

Arithmetic on arrays, no reads of its own. One compiled call, or its twin in NumPy: at one token a step, calls cost more
than what they compute.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvswap.memory.slots import SlotPool
from kvswap.native import array_loops
from kvswap.store.extents import plan_reads
from kvswap.terms import IntArray


class Found(NamedTuple):
    """Where the groups of one layer are, or will be when they have been read.

    ``slots`` ``[B, n]``, 0 where there is no group. ``sequences``, ``groups`` and ``staged`` ``[m]``: those to be read,
    and the slots in which they land. ``rows``, ``first``, ``counts`` and ``addresses`` ``[reads]``: file row, first
    group, groups and address of each read, which land in the first ``landed`` places. ``wanted`` groups in all.
    """

    slots: IntArray
    sequences: IntArray
    groups: IntArray
    staged: IntArray
    rows: IntArray
    first: IntArray
    counts: IntArray
    addresses: IntArray
    landed: int
    wanted: int


def find(pool: SlotPool, layer: int, groups: IntArray, ends: IntArray, *, gap_groups: int, half: int) -> Found:
    """Look up ``groups`` ``[B, n]``, ascending, of which those before ``ends`` ``[B]`` are real, and plan the reads.

    What is read lands in staging half ``half``; gaps of up to ``gap_groups`` are read through while there is room.
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
            staging_slot=pool.landing_slot(half),
            staging_address=pool.landing_address(half),
            slot_bytes=pool.layout.slot_bytes,
        )
        return Found(*found)
    return _find(pool, layer, groups, ends, gap_groups, half)


def _find(pool: SlotPool, layer: int, groups: IntArray, ends: IntArray, gap_groups: int, half: int) -> Found:
    real = groups < ends[:, None]
    sequences = np.repeat(np.arange(pool.batch), groups.shape[1])[real.reshape(-1)]
    wanted = groups[real]
    slots = pool.lookup(layer, sequences, wanted)
    missing = slots < 0
    lacking, absent = sequences[missing], wanted[missing]
    plan = plan_reads(layer * pool.batch + lacking, absent, gap_groups=gap_groups, places=pool.staging_groups)
    slots[missing] = staged = pool.landing_slot(half) + plan.place
    everywhere = np.zeros(groups.shape, np.int64)
    everywhere[real] = slots
    addresses = pool.landing_address(half) + plan.landing * pool.layout.slot_bytes
    reads = plan.files, plan.first, plan.count, addresses
    return Found(everywhere, lacking, absent, staged, *reads, int(plan.count.sum()), len(wanted))
