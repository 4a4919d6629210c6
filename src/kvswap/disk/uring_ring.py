"""The rings shared with the kernel: reads go in by ``submit`` and are accounted for by ``collect``.

A read in the ring has a row in the table ``reads``; the number of the row is its user data. A ticket has a row in the
table ``tickets``, which counts its reads in the ring and the bytes of those that are complete. What to do about a read
that failed, and about reads for which there is no room, is the business of ``uring_backend``.

``CompiledRing`` does the work in C. ``Ring`` does it in NumPy where nothing was compiled. It also has what both share:
the memory, tickets, draining and closing.
Not locked: one thread at a time.

Memory order in NumPy. Submission: the kernel reads our entries and our tail inside ``io_uring_enter``, called by the
thread that wrote them, so program order is enough. Completion: the kernel publishes an entry, then the tail. On x86
loads are not reordered with loads, so entries up to a tail that we read are whole. On ARM64 they may be; there
``_take`` makes a foreign call between the two. That call releases the interpreter lock and takes it again: a
store-release followed by a load-acquire, which later loads do not pass. Our own head needs no barrier: the completion
ring has twice the entries that can be in flight, so the kernel never overwrites one that is still being read. C has
atomic loads and stores for all four counters.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.uring_setup import COMPLETION_WORDS, ENTRY_WORDS, map_memory, set_up, system_calls
from kvswap.native import ring_loops
from kvswap.native.arrays import IntArray
from kvswap.native.ring_loops import RingMemory

ENTER, OP_READ = 426, 22
LEFT, BYTES = range(2)
"""Columns of ``tickets``: reads in the ring, bytes of reads that are complete."""
Reads = Sequence[IntArray]
"""Reads to start, four times int64 ``[n]``: file, offset in bytes, length in bytes, memory address."""
_GETEVENTS = 1
_WORDS = 5  # of an entry: opcode and descriptor, offset, address, length, user data; the rest stays zero
_TICKET, _NUMBER, _FILE, _OFFSET, _LENGTH, _ADDRESS, _RESULT = range(7)  # columns of ``reads``
_NOBODY = -1
_TICKETS = 64
_PAUSE_S = 0.001
_WEAK_ORDER = platform.machine().lower() not in ("x86_64", "amd64", "i686")


class FailedRead(NamedTuple):
    """A read that failed or came short, a row of ``reads``. ``result`` is the bytes that came or a negative errno."""

    ticket: int
    number: int
    file: int
    offset_bytes: int
    length_bytes: int
    address: int
    result: int


class Ring:
    """One io_uring for at most ``depth`` reads in flight. The constructor raises OSError where it is not allowed.

    Attributes
    ----------
    memory : RingMemory
        What C knows of the ring; ``fd`` is -1 after ``close``, and ``room`` is how many more reads may go in.
    tickets : int64 ``[tickets, 2]``
        Columns ``LEFT`` and ``BYTES``.
    """

    tickets: IntArray
    _tail: int  # submissions pushed so far, modulo 2^32 as in the rings
    _head: int  # completions taken so far
    _rows: list[int]  # of tickets, those that are free

    def __init__(self, depth: int) -> None:
        self._libc = system_calls()
        fd, params = set_up(depth)
        try:
            self.memory = RingMemory(fd=fd, depth=depth, room=depth)
            self._share(*map_memory(fd, params), params)
            self._make_tables(depth)
        except BaseException:
            os.close(fd)
            raise

    def open_ticket(self) -> int:
        """The row of ``tickets`` of a new ticket, which has no reads yet."""
        if not self._rows:
            self._add_tickets(len(self.tickets))
        row = self._rows.pop()
        self.tickets[row] = 0
        return row

    def end_ticket(self, row: int) -> None:
        """Give the row of a ticket back; none of its reads is in the ring."""
        self._rows.append(row)

    def submit(self, ticket: int, number: int, fds: IntArray, reads: Reads) -> int:
        """Start ``reads``; ``fds`` has the descriptor of each file.

        They are numbers ``number`` and on of the reads of ``ticket``. Returns 0 or the errno of handing them over:
        they are in the ring then, and the next call hands them over. Raises ValueError where there is no room for them
        all, IndexError where one has no file.
        """
        files, offsets, lengths, addresses = reads
        count, room = len(files), self.memory.room
        heads = fds[files] << 32 | OP_READ
        if count > room:
            raise ValueError(f"{count} reads, and the ring has room for {room}")
        places = self._free[room - count : room]
        rows, entries = np.empty((count, 7), dtype=np.int64), np.empty((count, _WORDS), dtype=np.int64)
        rows[:, _TICKET], rows[:, _NUMBER], rows[:, _RESULT] = ticket, np.arange(number, number + count), 0
        rows[:, _FILE], rows[:, _OFFSET], rows[:, _LENGTH], rows[:, _ADDRESS] = reads
        self._reads[places] = rows
        for word, column in enumerate((heads, offsets, addresses, lengths, places)):
            entries[:, word] = column
        self.memory.room -= count
        self.tickets[ticket, LEFT] += count
        self._push(entries)
        return self.enter(0)

    def collect(self, wait_for: int) -> tuple[int, list[FailedRead]]:
        """Block for ``wait_for`` completions, where it is not 0, then account for all that are there.

        Returns 0 and the reads that failed or came short, or the errno of blocking. Tickets still count a failed read
        as being in the ring, so that no ticket looks complete while nobody has seen to it.
        """
        code = self.enter(wait_for) if wait_for else 0
        done = None if code else self._take()
        if done is None:
            return code, []
        places, results = done
        rows = self._reads[places]
        rows[:, _RESULT] = results
        whole = results == rows[:, _LENGTH]
        for column, change in ((BYTES, rows[whole, _LENGTH]), (LEFT, -1)):
            np.add.at(self.tickets[:, column], rows[whole, _TICKET], change)
        self._free[self.memory.room : self.memory.room + len(places)] = places
        self.memory.room += len(places)
        return 0, [FailedRead(*row) for row in rows[~whole].tolist()]

    def enter(self, wait_for: int) -> int:
        """Hand what was pushed to the kernel and block for ``wait_for`` completions that were not taken yet.

        Returns 0 or the errno. EINTR, EAGAIN and EBUSY leave the rest in the ring: call again.
        """
        pushed = (int(self._sq_tail[0]) - int(self._sq_head[0])) & 0xFFFFFFFF
        flags = _GETEVENTS if wait_for else 0
        if self._libc.syscall(ENTER, self.memory.fd, pushed, wait_for, flags, 0, 0) >= 0:
            return 0
        return ctypes.get_errno()

    def drain(self) -> None:
        """Return when nothing is in flight, whatever was lost on the way; all completions are dropped.

        It goes by the kernel's counters alone, so it holds also after an exception in the middle of anything. No
        ticket has reads in the ring afterwards.
        """
        self._tail = int(self._sq_head[0])  # what was not handed over never will be
        self._sq_tail[0] = self._tail
        while True:
            self._head = int(self._cq_tail[0])
            self._cq_head[0] = self._head
            left = (self._tail - self._head) & 0xFFFFFFFF
            if not left:
                break
            if self.enter(left):
                time.sleep(_PAUSE_S)
        self._reads[:, _TICKET] = _NOBODY
        self._free[:] = np.arange(len(self._free))
        self.tickets[:, LEFT] = 0
        self.memory.room = self.memory.depth

    def close(self) -> None:
        """Drain, then give the rings back. May be called twice."""
        if self.memory.fd >= 0:
            self.drain()
            os.close(self.memory.fd)
            # Python's mmap holds a duplicate of the descriptor: the ring lives until the views are gone.
            vars(self).clear()
            self.memory = RingMemory(fd=-1)

    def _push(self, entries: IntArray) -> None:
        """Put entries ``[n, WORDS]`` behind those in the ring; ``enter`` hands them over."""
        count = len(entries)
        slot = self._tail & (len(self._entries) - 1)
        first = min(count, len(self._entries) - slot)
        self._entries[slot : slot + first] = entries[:first]
        if first < count:
            self._entries[: count - first] = entries[first:]
        self._tail = (self._tail + count) & 0xFFFFFFFF
        self._sq_tail[0] = self._tail

    def _take(self) -> tuple[IntArray, NDArray[np.int32]] | None:
        """User data and results, ``(count,)`` each, of reads that ended since the last call, or None."""
        tail = int(self._cq_tail[0])
        count = (tail - self._head) & 0xFFFFFFFF
        if not count:
            return None
        if _WEAK_ORDER:
            self._libc.getpid()
        mask = len(self._users) - 1
        slots = np.arange(self._head, self._head + count) & mask
        done = self._users[slots], self._results[slots]
        self._head = tail
        self._cq_head[0] = tail
        return done

    def _share(self, rings: Any, entries: Any, params: Any) -> None:
        """Views of the memory that the kernel shares, and its addresses for C."""
        sq, cq, memory = params.sq, params.cq, self.memory

        def counter(offset: int) -> NDArray[np.uint32]:
            return np.frombuffer(rings, dtype=np.uint32, count=1, offset=offset)

        self._sq_head, self._sq_tail = counter(sq.head), counter(sq.tail)
        self._cq_head, self._cq_tail = counter(cq.head), counter(cq.tail)
        self._tail, self._head = int(self._sq_tail[0]), int(self._cq_head[0])
        memory.entries_count, memory.completions_count = params.sq_entries, params.cq_entries
        np.frombuffer(rings, dtype=np.uint32, count=params.sq_entries, offset=sq.array)[:] = np.arange(
            params.sq_entries
        )
        table = np.frombuffer(entries, dtype=np.int64, count=ENTRY_WORDS * params.sq_entries)
        self._entries = table.reshape(-1, ENTRY_WORDS)[:, :_WORDS]
        done = np.frombuffer(rings, dtype=np.int64, count=COMPLETION_WORDS * params.cq_entries, offset=cq.cqes)
        self._users = done[::2]
        self._results = done.view(np.int32)[2::4]
        memory.sq_head, memory.sq_tail = self._sq_head.ctypes.data, self._sq_tail.ctypes.data
        memory.cq_head, memory.cq_tail = self._cq_head.ctypes.data, self._cq_tail.ctypes.data
        memory.entries, memory.completions = table.ctypes.data, done.ctypes.data

    def _make_tables(self, depth: int) -> None:
        self._reads = np.full((depth, 7), _NOBODY, dtype=np.int64)
        self._free = np.arange(depth)  # rows of ``reads`` that are not in use, the first ``room`` of them
        self.memory.reads, self.memory.free = self._reads.ctypes.data, self._free.ctypes.data
        self.tickets, self._rows = np.zeros((0, 2), dtype=np.int64), []
        self._add_tickets(_TICKETS)

    def _add_tickets(self, more: int) -> None:
        known = len(self.tickets)
        self.tickets = np.vstack([self.tickets, np.zeros((more, 2), dtype=np.int64)])
        self._rows = list(range(known, known + more))
        self.memory.tickets, self.memory.tickets_count = self.tickets.ctypes.data, known + more


class CompiledRing(Ring):
    """The same by ``native/ring.c``: one call for a submit, and one to collect."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        # Asking new arrays for their addresses would take longer than copying them to where C looks for them.
        self._fds: IntArray = np.empty(0, dtype=np.int64)
        self._wanted = np.empty((4, depth), dtype=np.int64)
        self._failed = np.empty((depth, 7), dtype=np.int64)
        self.memory.wanted, self.memory.failed = self._wanted.ctypes.data, self._failed.ctypes.data

    def submit(self, ticket: int, number: int, fds: IntArray, reads: Reads) -> int:
        if fds is not self._fds:
            self._fds, self.memory.fds, self.memory.files = fds, fds.ctypes.data, len(fds)
        count = len(reads[0])
        self._wanted[0, :count], self._wanted[1, :count], self._wanted[2, :count], self._wanted[3, :count] = reads
        return ring_loops.submit(self.memory, ticket, number, count)

    def collect(self, wait_for: int) -> tuple[int, list[FailedRead]]:
        found = ring_loops.collect(self.memory, wait_for)
        if found < 0:
            return -found, []
        return 0, [FailedRead(*row) for row in self._failed[:found].tolist()] if found else []


def create_ring(depth: int) -> Ring:
    """A ring for at most ``depth`` reads in flight, in C where it was compiled. Raises OSError where not allowed."""
    return CompiledRing(depth) if ring_loops.available() else Ring(depth)
