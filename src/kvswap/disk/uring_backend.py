"""Reads through io_uring: a submit is one system call for all of its reads, and so is a wait.

A model calls it 30 to 60 times a token with tens of reads each, so no Python loop goes over reads: the ring takes all
reads of a ticket in one call, and gives back only those that failed or came short.
``submit`` and ``wait`` take turns under one lock.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.backend import NO_PROGRESS_LIMIT, read_error
from kvswap.disk.file_backend import FileBackend
from kvswap.disk.uring_ring import BYTES, LEFT, FailedRead, Reads, create_ring
from kvswap.errors import DiskReadError

_PAUSE_S = 0.001


def probe_uring() -> tuple[bool, str]:
    """Whether a ring can be set up in this process, and why not: containers and old kernels forbid it."""
    try:
        create_ring(8).close()
    except OSError as error:
        return False, why(error)
    return True, ""


def why(error: OSError) -> str:
    """Why a ring was refused: name and text of the error."""
    return f"{errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"


class _Ticket:
    """Reads of one submit. ``row`` is its row of the ring's tickets, which counts those that are in the ring."""

    __slots__ = ("error", "reads", "row", "tries", "waiting")

    def __init__(self, row: int, reads: int) -> None:
        self.row = row
        self.reads = reads
        self.waiting = reads  # reads, or rests of reads, that are not in the ring
        self.tries: dict[
            int, tuple[int, int, int]
        ] = {}  # number of a read -> its offset, length, tries without progress
        self.error: DiskReadError | None = None


class _Batch:
    """Reads ``[4, n]`` of a ticket that wait for room in the ring; ``number`` is the number of the first."""

    __slots__ = ("number", "reads", "ticket")

    def __init__(self, ticket: _Ticket, number: int, reads: NDArray[np.int64]) -> None:
        self.ticket = ticket
        self.number = number
        self.reads = reads


class UringBackend(FileBackend):
    """At most ``depth`` reads in flight; the rest follow as completions come, from a wait or a later submit."""

    name = "uring"

    def __init__(self, directory: Path, alignment_bytes: int, depth: int) -> None:
        super().__init__(directory, alignment_bytes, direct=True)
        self._ring = create_ring(depth)
        self._depth = depth
        self._refill = max(1, depth // 8)
        self._lock = threading.Lock()
        self._tickets: dict[int, _Ticket] = {}
        self._waiting: deque[_Batch] = deque()
        self._last = 0
        self._draining = False

    def submit(
        self,
        files: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        addresses: NDArray[np.int64],
    ) -> int:
        reads = files, offsets, lengths, addresses
        with self._lock:
            if self._draining:
                self._give_up()
            ticket = _Ticket(self._ring.open_ticket(), len(files))
            self._last = number = self._last + 1
            self._tickets[number] = ticket
            if not ticket.reads:
                return number
            try:
                if self._waiting:
                    self._collect(0)
                if self._waiting or ticket.reads > self._ring.memory.room:
                    self._waiting.append(_Batch(ticket, 0, np.array(reads, dtype=np.int64)))
                    self._fill()
                else:
                    self._send(ticket, 0, reads)
            except BaseException:
                self._give_up()
                self._end(number)
                raise
            return number

    def wait(self, ticket: int) -> None:
        started = time.perf_counter()
        with self._lock:
            if self._draining:
                self._give_up()
            reads = self._tickets.get(ticket)
            if reads is None:
                raise ValueError(f"ticket {ticket} is unknown or was waited for already")
            try:
                self._collect(0)
                while (left := self._left(reads)) or reads.waiting:
                    self._fill()
                    most = self._refill if self._waiting else self._depth
                    self._collect(min(left or 1, most))
                read_bytes = int(self._ring.tickets[reads.row, BYTES])
            except BaseException:
                self._give_up()
                raise
            finally:
                self._end(ticket)
                self.counters.wait_s += time.perf_counter() - started
        if reads.error is not None:
            raise reads.error
        self.counters.reads += reads.reads
        self.counters.read_bytes += read_bytes

    def close(self) -> None:
        with self._lock:
            if self._ring.memory.fd < 0:
                return
            self._give_up()
            self._tickets.clear()
            self._ring.close()
        super().close()

    def _left(self, ticket: _Ticket) -> int:
        """How many reads of a ticket are in the ring."""
        return int(self._ring.tickets[ticket.row, LEFT])

    def _end(self, number: int) -> None:
        """Forget a ticket of which nothing is in the ring, or everything will have been given up."""
        ticket = self._tickets.pop(number)
        self._ring.end_ticket(ticket.row)

    def _send(self, ticket: _Ticket, number: int, reads: Reads) -> None:
        """Put reads into the ring, which has room for them, and hand them to the kernel."""
        self._check(self._ring.submit(ticket.row, number, self._fds, reads))
        ticket.waiting -= len(reads[0])

    def _fill(self) -> None:
        """Send what is waiting, as far as there is room."""
        while self._waiting and (room := self._ring.memory.room):
            batch = self._waiting[0]
            self._send(batch.ticket, batch.number, [*batch.reads[:, :room]])
            batch.number += room
            batch.reads = batch.reads[:, room:]
            if not batch.reads.size:
                self._waiting.popleft()

    def _collect(self, wait_for: int) -> None:
        """Account for the completions that are there, after blocking for ``wait_for`` of them where it is not 0."""
        code, failed = self._ring.collect(wait_for)
        if code:
            self._check(code)
            if wait_for and code != errno.EINTR:
                time.sleep(_PAUSE_S)
        for read in failed:
            self._send_again(read)

    def _check(self, code: int) -> None:
        # EINTR: the signal's handler has run by now. The other two: the kernel is out of memory for a moment.
        if code not in (0, errno.EINTR, errno.EAGAIN, errno.EBUSY):
            raise DiskReadError(f"io_uring_enter: {os.strerror(code)}", hint='use backend="threads"')

    def _send_again(self, read: FailedRead) -> None:
        """Queue the missing rest of a read that came short or failed, or fail its ticket."""
        ticket = next(each for each in self._tickets.values() if each.row == read.ticket)
        # Direct reads go on from an aligned place only.
        fresh = max(read.result, 0) // self.alignment_bytes * self.alignment_bytes
        if ticket.error is None:
            offset, length, stalls = ticket.tries.get(read.number, (read.offset_bytes, read.length_bytes, 0))
            stalls = 0 if fresh else stalls + 1
            ticket.tries[read.number] = offset, length, stalls
            if stalls > NO_PROGRESS_LIMIT:
                self._drop_rest(ticket, read_error(read.file, offset, length, max(-read.result, 0)))
            else:
                rest = read.file, read.offset_bytes + fresh, read.length_bytes - fresh, read.address + fresh
                self._waiting.append(_Batch(ticket, read.number, np.array(rest, dtype=np.int64)[:, None]))
                ticket.waiting += 1
                self.counters.retries += 1
        self._ring.tickets[ticket.row] += (-1, fresh)

    def _drop_rest(self, ticket: _Ticket, error: DiskReadError) -> None:
        """Send nothing more of a ticket; the first error stands."""
        ticket.error = ticket.error or error
        ticket.waiting = 0
        self._waiting = deque(batch for batch in self._waiting if batch.ticket is not ticket)

    def _give_up(self) -> None:
        """Wait for everything in flight, of all tickets: after an interruption it may be unknown whose it is.

        When this is interrupted too, the next call begins with it again.
        """
        self._draining = True
        for ticket in self._tickets.values():
            if ticket.waiting or self._left(ticket):
                self._drop_rest(ticket, DiskReadError("reads were given up when the reading thread was interrupted"))
        self._ring.drain()
        self._draining = False
