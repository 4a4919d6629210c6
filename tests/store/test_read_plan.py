"""Reads bring every wanted group to its place, and no more than that costs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvswap.store.read_plan import ReadPlan, plan_reads


@dataclass
class Wanted:
    rows: list[tuple[int, int]]
    gap_groups: int
    places: int

    def plan(self) -> ReadPlan:
        files, groups = (np.array([row[part] for row in self.rows], np.int64) for part in (0, 1))
        return plan_reads(files, groups, gap_groups=self.gap_groups, places=self.places)


@st.composite
def wanted(draw: st.DrawFn, spare: int | None = None) -> Wanted:
    rows = draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=40))
    room = draw(st.integers(0, 60)) if spare is None else spare
    return Wanted(sorted(rows), draw(st.integers(0, 6)), len(rows) + room)


def extents(plan: ReadPlan) -> list[tuple[int, int, int, int]]:
    columns = (plan.files, plan.first, plan.count, plan.staging)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(wanted())
def test_every_wanted_group_lands_at_its_place(want: Wanted) -> None:
    plan = want.plan()
    landed = {}
    for file, first, count, landing in extents(plan):
        for step in range(count):
            assert landing + step not in landed, "two groups land on one place"
            landed[landing + step] = (file, first + step)
    assert [landed[place] for place in plan.place.tolist()] == want.rows
    assert set(landed) == set(range(len(landed)))
    assert len(landed) <= want.places


@given(wanted())
def test_extents_are_sorted_disjoint_and_cover_no_more_than_needed(want: Wanted) -> None:
    found = extents(want.plan())
    for (file, first, count, _), (next_file, next_first, _, _) in itertools.pairwise(found):
        assert (file, first + count) <= (next_file, next_first)
    chosen = set(want.rows)
    for file, first, count, _ in found:
        inside = [step for step in range(count) if (file, first + step) in chosen]
        assert inside[0] == 0
        assert inside[-1] == count - 1
        assert all(later - earlier <= 1 + want.gap_groups for earlier, later in itertools.pairwise(inside))


@given(wanted(spare=10_000))
def test_with_room_every_short_gap_is_bridged(want: Wanted) -> None:
    found = extents(want.plan())
    for (file, first, count, _), (next_file, next_first, _, _) in itertools.pairwise(found):
        assert file != next_file or next_first - (first + count) > want.gap_groups


@given(wanted(spare=0))
def test_without_room_only_neighbours_are_joined(want: Wanted) -> None:
    assert sum(count for _, _, count, _ in extents(want.plan())) == len(want.rows)
    runs = sum((file, group - 1) not in want.rows for file, group in want.rows)
    assert len(extents(want.plan())) == runs


def test_scarce_room_goes_to_the_narrowest_gaps() -> None:
    want = Wanted([(0, 0), (0, 4), (0, 6), (0, 8), (0, 9)], gap_groups=4, places=5 + 2)
    assert extents(want.plan()) == [(0, 0, 1, 0), (0, 4, 6, 1)]
    assert want.plan().place.tolist() == [0, 1, 3, 5, 6]


def test_nothing_wanted() -> None:
    plan = Wanted([], 3, 0).plan()
    assert extents(plan) == []
    assert len(plan.place) == 0
