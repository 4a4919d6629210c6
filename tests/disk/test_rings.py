"""Both rings, in C and in NumPy: what goes in comes out, whatever the order, and what failed is said."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvswap.disk import Slab
from kvswap.disk.uring_ring import BYTES, LEFT, CompiledRing, FailedRead, Ring, create_ring
from kvswap.native import ring_loops
from tests.helpers.backends import UNIT, content
from tests.helpers.system import has_io_uring

DEPTH, UNITS = 8, 64
KINDS = {"C": CompiledRing, "NumPy": Ring}

pytestmark = pytest.mark.skipif(not has_io_uring(), reason="no io_uring here")


@pytest.fixture(params=KINDS)
def ring(request: pytest.FixtureRequest) -> Iterator[Ring]:
    if request.param == "C" and not ring_loops.available():
        pytest.skip("no compiled loops: there was no C compiler")
    made = KINDS[request.param](DEPTH)
    yield made
    made.close()


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(UNITS * UNIT)
    made.array[:] = 0xDD
    yield made
    made.close()


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[np.ndarray]:
    """Descriptors of two files of ``UNITS`` units."""
    found = []
    for seed in (0, 1):
        path = tmp_path / str(seed)
        path.write_bytes(content(UNITS * UNIT, seed).tobytes())
        found.append(os.open(path, os.O_RDONLY))
    yield np.array(found)
    for fd in found:
        os.close(fd)


def reads(rows: list[tuple[int, int, int, int]]) -> list[np.ndarray]:
    """Columns of ``(file, offset, length, address)``."""
    return [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]


def finish(ring: Ring, ticket: int) -> list[FailedRead]:
    """Collect until nothing of a ticket is in the ring but what failed, which is returned."""
    failed: list[FailedRead] = []
    while ring.tickets[ticket, LEFT] > len(failed):
        code, more = ring.collect(1)
        assert code in (0, errno.EINTR)
        failed += more
    return failed


def test_ring_comes_round_at_every_place(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    """Counts that no size of a ring is a multiple of: batches begin and break off at every place of it."""
    dice = random.Random(0)
    for turn in range(200):
        ticket = ring.open_ticket()
        file, units = turn % 2, [dice.randrange(UNITS) for _ in range(dice.choice((1, 3, 5, 7, 8)))]
        rows = [(file, unit * UNIT, UNIT, slab.address + place * UNIT) for place, unit in enumerate(units)]
        assert ring.submit(ticket, 0, fds, reads(rows)) == 0
        assert finish(ring, ticket) == []
        assert ring.tickets[ticket].tolist() == [0, len(units) * UNIT]
        assert ring.memory.room == DEPTH
        ring.end_ticket(ticket)
        for place, unit in enumerate(units):
            expected = content(UNITS * UNIT, file)[unit * UNIT :][:UNIT]
            assert np.array_equal(slab.array[place * UNIT :][:UNIT], expected)


def test_full_ring_takes_no_more(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    ticket, rows = ring.open_ticket(), [(0, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(DEPTH + 1)]
    with pytest.raises(ValueError, match=r"room|could not broadcast"):  # more than there are places, in C's own array
        ring.submit(ticket, 0, fds, reads(rows))
    assert ring.memory.room == DEPTH and ring.tickets[ticket, LEFT] == 0
    assert ring.submit(ticket, 0, fds, reads(rows[:DEPTH])) == 0
    assert ring.memory.room == 0
    with pytest.raises(ValueError, match="room"):
        ring.submit(ticket, DEPTH, fds, reads(rows[DEPTH:]))
    assert ring.tickets[ticket, LEFT] == DEPTH
    assert finish(ring, ticket) == []
    assert ring.submit(ticket, DEPTH, fds, reads(rows[DEPTH:])) == 0
    assert finish(ring, ticket) == []
    assert np.array_equal(slab.array[: len(rows) * UNIT], content(UNITS * UNIT)[: len(rows) * UNIT])


def test_failed_and_short_reads_are_said_and_stay_counted(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    """One behind the end, one across it, one to memory that may not be written, among good ones."""
    ticket, end = ring.open_ticket(), UNITS * UNIT
    with mmap.mmap(-1, UNIT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ) as closed:
        forbidden = int(np.frombuffer(closed, dtype=np.uint8).ctypes.data)
        rows = [(0, 0, UNIT, slab.address), (0, end, UNIT, slab.address + UNIT)]
        rows += [(1, end - 1024, UNIT, slab.address + 2 * UNIT), (0, UNIT, UNIT, forbidden)]
        rows += [(1, 0, UNIT, slab.address + 4 * UNIT)]
        assert ring.submit(ticket, 10, fds, reads(rows)) == 0
        failed: list[FailedRead] = []
        while ring.memory.room < DEPTH:
            failed += ring.collect(1)[1]
    results = {1: 0, 2: 1024, 3: -errno.EFAULT}
    assert sorted(failed) == [FailedRead(ticket, 10 + place, *rows[place], result) for place, result in results.items()]
    assert ring.tickets[ticket].tolist() == [3, 2 * UNIT]
    assert np.array_equal(slab.array[:UNIT], content(UNITS * UNIT)[:UNIT])
    assert np.array_equal(slab.array[4 * UNIT : 5 * UNIT], content(UNITS * UNIT, 1)[:UNIT])


def test_completions_come_in_any_order(ring: Ring, slab: Slab) -> None:
    """A read of an empty pipe ends long after those that were started behind it, whose places are used again."""
    data = memoryview(content(UNITS * UNIT))
    slow, into = os.pipe()
    quick = os.memfd_create("quick")
    os.write(quick, data)
    fds, late, rest = np.array([slow, quick]), ring.open_ticket(), ring.open_ticket()
    assert ring.submit(late, 0, fds, reads([(0, 0, 512, slab.address)])) == 0
    for turn in range(3 * DEPTH):
        rows = [(1, turn * UNIT, UNIT, slab.address + place * UNIT) for place in range(1, DEPTH)]
        assert ring.submit(rest, turn * DEPTH, fds, reads(rows)) == 0
        assert ring.memory.room == 0
        assert finish(ring, rest) == []
        assert np.array_equal(slab.array[UNIT : 2 * UNIT], data[turn * UNIT : (turn + 1) * UNIT])
        assert ring.tickets[late].tolist() == [1, 0]
    os.write(into, b"x" * 512)
    assert finish(ring, late) == []
    assert ring.tickets[late].tolist() == [0, 512]
    assert ring.tickets[rest, BYTES] == 3 * DEPTH * (DEPTH - 1) * UNIT
    assert (slab.array[:512] == ord("x")).all()
    for fd in (slow, into, quick):
        os.close(fd)


def test_many_tickets(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    """More tickets than there were rows for are open at once, and each has its own count."""
    tickets = [ring.open_ticket() for _ in range(300)]
    assert len(set(tickets)) == 300
    for number, ticket in enumerate(tickets):
        rows = [(0, place * UNIT, 512 * (number % 8 + 1), slab.address) for place in range(number % DEPTH)]
        if rows:
            assert ring.submit(ticket, 0, fds, reads(rows)) == 0
        while ring.memory.room < DEPTH:
            assert ring.collect(1) == (0, [])
    for number, ticket in enumerate(tickets):
        assert ring.tickets[ticket].tolist() == [0, number % DEPTH * 512 * (number % 8 + 1)]
        ring.end_ticket(ticket)
    assert ring.open_ticket() == tickets[-1]
    assert ring.tickets[tickets[-1]].tolist() == [0, 0]


def test_reads_of_no_file_are_refused(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    ticket = ring.open_ticket()
    with pytest.raises((ValueError, IndexError)):
        ring.submit(ticket, 0, fds, reads([(0, 0, UNIT, slab.address), (2, 0, UNIT, slab.address)]))
    assert ring.memory.room == DEPTH and ring.tickets[ticket, LEFT] == 0
    more = np.append(fds, fds[0])  # as a backend that has adopted one
    assert ring.submit(ticket, 0, more, reads([(2, 0, UNIT, slab.address)])) == 0
    assert finish(ring, ticket) == []


def test_nothing_is_in_flight_after_draining(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    ticket = ring.open_ticket()
    rows = [(0, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(DEPTH)]
    assert ring.submit(ticket, 0, fds, reads(rows)) == 0
    ring.drain()
    slab.array[:] = 0xDD
    assert ring.memory.room == DEPTH and ring.tickets[ticket, LEFT] == 0
    assert ring.collect(0) == (0, [])
    assert (slab.array == 0xDD).all()


def test_what_was_not_handed_over_is_taken_back(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    """The kernel refuses; after draining the ring works, and the old reads never happen."""
    ticket = ring.open_ticket()
    fd, ring.memory.fd = ring.memory.fd, -1
    rows = [(0, unit * UNIT, UNIT, slab.address + unit * UNIT) for unit in range(DEPTH)]
    assert ring.submit(ticket, 0, fds, reads(rows)) == errno.EBADF
    assert ring.collect(1) == (errno.EBADF, [])
    assert ring.tickets[ticket, LEFT] == DEPTH
    ring.memory.fd = fd
    ring.drain()
    assert ring.submit(ticket, 0, fds, reads([(1, 0, UNIT, slab.address + 20 * UNIT)])) == 0
    assert finish(ring, ticket) == []
    assert (slab.array[: DEPTH * UNIT] == 0xDD).all()


def test_reads_that_were_refused_go_with_the_next_call(ring: Ring, slab: Slab, fds: np.ndarray) -> None:
    ticket = ring.open_ticket()
    fd, ring.memory.fd = ring.memory.fd, -1
    assert ring.submit(ticket, 0, fds, reads([(0, 0, UNIT, slab.address)])) == errno.EBADF
    ring.memory.fd = fd
    assert finish(ring, ticket) == []
    assert np.array_equal(slab.array[:UNIT], content(UNITS * UNIT)[:UNIT])


def test_ring_is_in_c_where_it_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = create_ring(DEPTH)
    assert isinstance(ring, CompiledRing) == ring_loops.available()
    ring.close()
    ring.close()
    monkeypatch.setattr(ring_loops, "available", lambda: False)
    ring = create_ring(DEPTH)
    assert type(ring) is Ring
    ring.close()
