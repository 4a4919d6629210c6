"""Traffic of rankings, counted by the engine's slots and read planner."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.tuning.traffic import simulate

SLOT = {"slot_bytes": 4096, "gap_bytes": 0}


def rankings(steps: int = 12, layers: int = 3, width: int = 20, spread: int = 1000, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = [random.choice(spread, width, replace=False) for _ in range(steps * layers)]
    return np.array(rows, np.int32).reshape(1, steps, layers, width)


def test_without_slots_everything_is_read() -> None:
    found = simulate(rankings(), [20, 10, 5], reuse_slots=0, **SLOT)
    assert found.missed_groups.tolist() == found.selected_groups.tolist() == [20, 10, 5]
    assert found.reuse_rate == 0
    assert (found.reads <= found.missed_groups).all() and found.read_bytes.tolist() == [20 * 4096, 10 * 4096, 5 * 4096]


def test_neighbours_are_one_read_and_reads_merge_across_gaps() -> None:
    row = np.array([4, 5, 6, 7, 20, 22], np.int32)
    ranking = np.tile(row, (1, 4, 1, 1))
    plain = simulate(ranking, [6], reuse_slots=0, **SLOT)
    assert (plain.reads[0], plain.read_bytes[0]) == (3, 6 * 4096)
    bridged = simulate(ranking, [6], reuse_slots=0, slot_bytes=4096, gap_bytes=4096)
    assert (bridged.reads[0], bridged.read_bytes[0]) == (2, 7 * 4096)


def test_groups_that_are_selected_again_are_reused() -> None:
    ranking = np.repeat(rankings(steps=1), 8, axis=1)
    found = simulate(ranking, [20, 20, 20], reuse_slots=60, **SLOT)
    assert found.reuse_rate == 1 and found.reads.sum() == 0


@pytest.mark.parametrize("spread", [40, 200])
def test_more_slots_never_make_more_misses(spread: int) -> None:
    ranking = rankings(spread=spread)
    missed = [
        simulate(ranking, [20, 20, 20], reuse_slots=count, **SLOT).missed_groups.sum()
        for count in (0, 30, 90, 3 * spread)
    ]
    assert missed == sorted(missed, reverse=True) and missed[-1] < 0.5 * missed[0]


def test_texts_begin_with_empty_slots() -> None:
    ranking = rankings(spread=40)
    one, two, joined = (
        simulate(each, [20, 20, 20], reuse_slots=60, **SLOT)
        for each in (ranking, np.concatenate((ranking, ranking)), np.concatenate((ranking, ranking), axis=1))
    )
    assert two.missed_groups.tolist() == one.missed_groups.tolist() != joined.missed_groups.tolist()
