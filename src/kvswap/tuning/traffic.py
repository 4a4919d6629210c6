"""Count what decode steps would read, by feeding recorded selections to the engine's own slots and read planner.

A ranking lists, for each step and layer, the groups by their score, best first. From it ``simulate`` finds, for any
number of selected groups and of reuse slots, how many groups are in memory already and which reads the others need.
No model and no disk take part.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.memory.slots import SlotPool
from kvswap.selection.window import Window
from kvswap.store.layout import GroupLayout
from kvswap.store.read_plan import plan_reads
from kvswap.terms import KVGeometry
from kvswap.tuning.cost import Traffic

WARM_SHARE = 0.25
"""Share of the steps at the start that only fill the slots; they are not counted."""


def simulate(
    ranking: NDArray[np.int32], groups: list[int], *, reuse_slots: int, slot_bytes: int, gap_bytes: int
) -> Traffic:
    """Return the traffic of one sequence, as the mean over texts.

    Parameters
    ----------
    ranking
        Groups by score, best first: int32 ``[texts, steps, L, K]``.
    groups
        How many groups each layer selects, at most K.
    gap_bytes
        Reads are merged across gaps of at most so many bytes.
    """
    counts = np.mean([_count(text, groups, reuse_slots, slot_bytes, gap_bytes) for text in ranking], axis=0)
    return Traffic(
        selected_groups=np.array(groups, float), missed_groups=counts[0], reads=counts[1], read_bytes=counts[2]
    )


def _count(
    ranking: NDArray[np.int32], groups: list[int], reuse_slots: int, slot_bytes: int, gap_bytes: int
) -> NDArray[np.float64]:
    """Missed groups, reads and bytes per step, float64 ``[3, L]``, from one text's ranking ``[steps, L, K]``."""
    steps, layers, width = ranking.shape
    most = max(groups)
    if most > width:
        raise ValueError(f"a layer selects {most} groups of a ranking of {width}")
    window = Window(1, 0, 1, most)
    places = 2 * most
    pool = SlotPool(
        layers=layers,
        batch=1,
        layout=GroupLayout(KVGeometry(kv_heads=1, head_dim=1, group_tokens=1, itemsize_bytes=2), 2),
        window=window,
        staging_groups=places,
        reuse_slots=reuse_slots,
        capacity_groups=int(ranking.max()) + 1,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    counts = np.zeros((3, steps, layers))
    try:
        for step in range(steps):
            for layer, count in enumerate(groups):
                selected = np.sort(ranking[step, layer, :count]).astype(np.int64)
                sequences = np.zeros(count, np.int64)
                missing = pool.lookup(layer, sequences, selected) < 0
                missed = selected[missing]
                plan = plan_reads(sequences[missing], missed, gap_groups=gap_bytes // slot_bytes, places=places)
                pool.admit(layer, sequences[missing], missed, pool.staging_slot(0) + plan.place)
                counts[:, step, layer] = len(missed), len(plan.first), plan.count.sum() * slot_bytes
    finally:
        pool.close()
    found: NDArray[np.float64] = counts[:, int(steps * WARM_SHARE) :].mean(axis=1)
    return found
