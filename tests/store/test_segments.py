"""Every group of every extent is found where it was put: by the compiled loop and by its twin in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.native import array_loops
from kvswap.store.layout import GroupLayout
from kvswap.store.segments import Segments
from kvswap.terms import KVGeometry

SLOT_BYTES = 512


@dataclass
class Case:
    starts: list[list[int]]  # of each segment, by row
    stripes: list[int | None]
    extents: list[tuple[int, int, int]]  # row, first group, groups

    def segments(self) -> Segments:
        rows = len(self.starts[0])
        segments = Segments(rows)
        for number, (starts, stripe) in enumerate(zip(self.starts, self.stripes, strict=True)):
            files = 1000 * number if stripe else 1000 * number + np.arange(rows)
            segments.add(np.array(starts, np.int64), files, stripe)
        return segments

    def place(self, row: int, group: int) -> tuple[int, int]:
        """File of a group, and its place there: counted stripe by stripe, as the format says."""
        number = max(n for n, starts in enumerate(self.starts) if starts[row] <= group)
        index, stripe, rows = group - self.starts[number][row], self.stripes[number], len(self.starts[0])
        if stripe is None:
            return 1000 * number + row, index
        before = 0
        while index >= stripe:
            before, index = before + rows * stripe, index - stripe
        return 1000 * number, before + row * stripe + index


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    later = [[draw(st.integers(0, 40)) for _ in range(rows)] for _ in range(count - 1)]
    stripes = [draw(st.none() | st.integers(1, 9)) for _ in range(count)]
    extents = draw(
        st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, 60), st.integers(1, 50)), min_size=1, max_size=8)
    )
    return Case([[0] * rows, *later], stripes, extents)


@pytest.mark.parametrize("compiled", [True, False])
@given(case=cases())
def test_groups_are_where_the_format_says(compiled: bool, case: Case) -> None:
    if compiled and not array_loops.available():
        pytest.skip("nothing was compiled")
    segments = case.segments()
    rows, first, count = (np.array(column, np.int64) for column in zip(*case.extents, strict=True))
    memory = np.cumsum(count) - count  # where each extent's groups land
    locate = segments.locate if compiled else segments._locate
    found = locate(rows, first, count, memory * SLOT_BYTES, SLOT_BYTES)
    landed = {}
    for file, offset, length, address in zip(*(column.tolist() for column in found), strict=True):
        assert length > 0 and (offset | length | address) % SLOT_BYTES == 0
        for step in range(length // SLOT_BYTES):
            place = address // SLOT_BYTES + step
            assert place not in landed, "two groups land on one place"
            landed[place] = file, offset // SLOT_BYTES + step
    wanted = [case.place(row, first + step) for row, first, count in case.extents for step in range(count)]
    assert [landed[place] for place in range(len(wanted))] == wanted and len(landed) == len(wanted)


@given(case=cases())
def test_where_to_write_is_where_it_is_read(case: Case) -> None:
    segments = case.segments()
    if case.stripes[-1] is None:  # nothing is written to these
        return
    for row, start in enumerate(case.starts[-1]):
        for group in range(start, start + 25):
            file, place, room = segments.place(row, group)
            assert (file, place) == case.place(row, group)
            assert [case.place(row, group + step)[1] for step in range(room)] == list(range(place, place + room))


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_and_groups_of_no_segment_are_refused(row: int) -> None:
    if not array_loops.available():
        pytest.skip("nothing was compiled")
    segments, one = Case([[5, 5, 5]], [4], []).segments(), np.ones(1, np.int64)
    for rows, first in ((one * row, one * 9), (one, one * 4)):
        with pytest.raises(ValueError, match="no segment"):
            segments.locate(rows, first, one, one, SLOT_BYTES)


@given(
    heads=st.integers(1, 64), groups=st.integers(1, 10**6), rows=st.integers(1, 200), align=st.sampled_from([512, 4096])
)
def test_a_file_is_little_longer_than_its_groups(heads: int, groups: int, rows: int, align: int) -> None:
    geometry = KVGeometry(kv_heads=heads, head_dim=128, group_tokens=4, itemsize_bytes=2)
    layout = GroupLayout(geometry, align)
    stripe_groups = layout.stripe_groups(groups)
    assert stripe_groups * layout.slot_bytes >= 128 << 10
    unused_bytes = layout.file_bytes(rows, groups, stripe_groups) - rows * groups * layout.slot_bytes
    assert (
        0
        <= unused_bytes
        <= rows * max(groups * layout.slot_bytes // 16 + layout.slot_bytes, layout.slot_bytes + (128 << 10))
    )
