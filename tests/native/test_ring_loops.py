"""The compiled ring on memory that no kernel shares: counters that come round, and what it has to refuse."""

from __future__ import annotations

import errno
import sys

import numpy as np
import pytest

from kvswap.native import ring_loops
from tests.helpers.ring_calls import DEPTH, ENTRIES, FakeRing

pytestmark = [
    pytest.mark.skipif(not ring_loops.available(), reason="no compiled loops: there was no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="io_uring is Linux only"),
]


def test_entries_are_those_of_the_kernel_and_come_round() -> None:
    """Counters pass 2^32, and the entries the end of their table."""
    ring = FakeRing(counter=2**32 - 2)
    ring.want([(0, 4096, 512, 70_000), (1, 8192, 1024, 80_000), (0, 0, 0, 90_000)])
    assert ring_loops.submit(ring.memory, 1, 5, 3) == errno.EBADF  # there is no kernel to hand them to
    assert ring.sq_tail[0] == 1
    places = [ENTRIES - 2, ENTRIES - 1, 0]
    expected = [(7, 4096, 70_000, 512), (9, 8192, 80_000, 1024), (7, 0, 90_000, 0)]
    for place, (fd, offset, address, length) in zip(places, expected, strict=True):
        row = ring.entries[place].tolist()
        assert row[:4] == [fd << 32 | 22, offset, address, length] and row[5:] == [0, 0, 0]
    users = ring.entries[places, 4].tolist()
    assert ring.reads[users, :2].tolist() == [[1, 5], [1, 6], [1, 7]]
    assert ring.memory.room == DEPTH - 3 and ring.tickets[1].tolist() == [3, 0]
    assert set(ring.free[: DEPTH - 3].tolist()) | set(users) == set(range(DEPTH))


def test_completions_come_round() -> None:
    ring = FakeRing(counter=2**32 - 2)
    ring.want([(0, 4096, 512, 70_000), (1, 8192, 1024, 80_000), (0, 0, 2048, 90_000)])
    ring_loops.submit(ring.memory, 1, 0, 3)
    users = ring.entries[[ENTRIES - 2, ENTRIES - 1, 0], 4].tolist()
    ring.complete([(users[2], 2048), (users[0], 100), (users[1], -errno.EIO)])
    assert ring_loops.collect(ring.memory, 0) == 2
    assert ring.failed[:2].tolist() == [[1, 0, 0, 4096, 512, 70_000, 100], [1, 1, 1, 8192, 1024, 80_000, -errno.EIO]]
    assert ring.cq_head[0] == ring.cq_tail[0] == 1
    assert ring.tickets[1].tolist() == [2, 2048]
    assert sorted(ring.free.tolist()) == list(range(DEPTH)) and ring.memory.room == DEPTH
    assert ring_loops.collect(ring.memory, 0) == 0


@pytest.mark.parametrize(
    ("ticket", "count", "read"),
    [
        (-1, 1, (0, 0, 512, 0)),
        (2, 1, (0, 0, 512, 0)),
        (0, -1, (0, 0, 512, 0)),
        (0, DEPTH + 1, (0, 0, 512, 0)),
        (0, 1, (-1, 0, 512, 0)),
        (0, 1, (2, 0, 512, 0)),
        (0, 1, (0, 0, -1, 0)),
        (0, 1, (0, 0, 2**31, 0)),
    ],
)
def test_impossible_numbers_are_refused_and_nothing_is_done(
    ticket: int, count: int, read: tuple[int, int, int, int]
) -> None:
    ring = FakeRing()
    ring.want([read])
    with pytest.raises(ValueError, match="no room"):
        ring_loops.submit(ring.memory, ticket, 0, count)
    assert not ring.entries.any() and not ring.tickets.any() and ring.sq_tail[0] == 0
    assert ring.memory.room == DEPTH


def test_entries_that_the_kernel_has_not_taken_are_not_overwritten() -> None:
    ring = FakeRing()
    ring.want([(0, 0, 512, 0)] * DEPTH)
    ring.sq_tail[0] = ENTRIES - 2
    with pytest.raises(ValueError, match="no room"):
        ring_loops.submit(ring.memory, 0, 0, 3)
    assert not ring.entries.any()
    assert ring_loops.submit(ring.memory, 0, 0, 2) == errno.EBADF


@pytest.mark.parametrize("user", [0, DEPTH, 2**63 - 1, -1])
def test_completions_of_no_read_are_an_error(user: int) -> None:
    """Beyond the table, or of a place that no read has."""
    ring = FakeRing()
    ring.complete([(user, 512)])
    before = [array.copy() for array in (ring.reads, ring.free, ring.tickets)]
    assert ring_loops.collect(ring.memory, 0) == -errno.EPROTO
    assert all(map(np.array_equal, before, (ring.reads, ring.free, ring.tickets)))
    assert ring.memory.room == DEPTH


def test_a_read_completes_once() -> None:
    ring = FakeRing()
    ring.want([(0, 0, 512, 0)])
    ring_loops.submit(ring.memory, 0, 0, 1)
    user = int(ring.entries[0, 4])
    ring.complete([(user, 512), (user, 512)])
    assert ring_loops.collect(ring.memory, 0) == -errno.EPROTO
    assert ring.tickets[0].tolist() == [0, 512] and ring.memory.room == DEPTH


def test_a_ring_that_is_closed_is_refused() -> None:
    closed = ring_loops.RingMemory(fd=-1)
    with pytest.raises(ValueError, match="no such ticket"):
        ring_loops.submit(closed, 0, 0, 0)
    assert ring_loops.collect(closed, 0) == ring_loops.collect(closed, 1) == -errno.EBADF
