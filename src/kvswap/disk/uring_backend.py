"""Reads through io_uring: a submit is one system call for all of its reads, and so is a wait.

A model calls it 30 to 60 times a token with tens of reads each, so no Python loop goes over reads. A ticket is a table
of submission entries, filled column by column and copied into the ring in one assignment.
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
from kvswap.disk.uring_ring import OP_READ, WORDS, Ring
from kvswap.errors import DiskReadError

_PAUSE_S = 0.001
_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
# Words of a table row, see uring_ring.WORDS.
_HEAD, _OFFSET, _ADDRESS, _LENGTH, _USER = range(WORDS)


def probe_uring() -> tuple[bool, str]:
    """Whether a ring can be set up in this process, and why not: containers and old kernels forbid it."""
    try:
        Ring(8).close()
    except OSError as error:
        return False, why(error)
    return True, ""


def why(error: OSError) -> str:
    """Why a ring was refused: name and text of the error."""
    return f"{errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"


class _Ticket:
    """Reads of one submit: rows int64 ``(reads, WORDS)`` as they go into the ring, those sent again at the end."""

    __slots__ = ("error", "flying", "next", "number", "reads", "roots", "table")

    def __init__(self, number: int, table: NDArray[np.int64]) -> None:
        self.number = number
        self.table = table
        self.reads = len(table)
        self.next = 0  # first row that is not in the ring yet
        self.flying = 0  # rows in the ring or with the kernel
        self.roots: dict[int, tuple[int, int]] = {}  # row sent again -> row of the whole read, tries without progress
        self.error: DiskReadError | None = None

    def drop_rest(self, error: DiskReadError) -> None:
        """Send nothing more; the first error stands."""
        self.error = self.error or error
        self.next = len(self.table)


class UringBackend(FileBackend):
    """At most ``depth`` reads in flight; the rest follow as completions come, from a wait or a later submit."""

    name = "uring"

    def __init__(self, directory: Path, alignment_bytes: int, depth: int) -> None:
        super().__init__(directory, alignment_bytes, direct=True)
        self._ring = Ring(depth)
        self._depth = depth
        self._refill = max(1, depth // 8)
        self._lock = threading.Lock()
        self._tickets: dict[int, _Ticket] = {}
        self._waiting: deque[_Ticket] = deque()  # tickets with rows that are not in the ring yet
        self._flying = 0
        self._last = 0
        self._draining = False
        self._heads: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # first word of a row, by file
        self._indices: NDArray[np.int64] = np.arange(depth)

    def adopt(self, fd: int) -> int:
        file = super().adopt(fd)
        self._heads = self._fds << 32 | OP_READ
        return file

    def submit(
        self,
        files: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        addresses: NDArray[np.int64],
    ) -> int:
        count = len(files)
        if count > len(self._indices):
            self._indices = np.arange(2 * count)
        table = np.empty((count, WORDS), dtype=np.int64)
        table[:, _HEAD] = self._heads[files]
        table[:, _OFFSET] = offsets
        table[:, _ADDRESS] = addresses
        table[:, _LENGTH] = lengths
        with self._lock:
            if self._draining:
                self._give_up()
            # Fits the upper half of a signed word; the numbers come round after some weeks.
            self._last = number = self._last % 0x7FFFFFFF + 1
            np.add(self._indices[:count], number << _INDEX_BITS, out=table[:, _USER])
            reads = self._tickets[number] = _Ticket(number, table)
            if not count:
                return number
            try:
                if self._waiting:
                    self._collect()
                self._waiting.append(reads)
                self._fill()
                self._enter(0)
            except BaseException:
                self._give_up()
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
                self._collect()
                while reads.flying or reads.next < len(reads.table):
                    self._fill()
                    most = self._refill if self._waiting else self._depth
                    self._enter(min(reads.flying or 1, most))
                    self._collect()
            except BaseException:
                self._give_up()
                raise
            finally:
                self._tickets.pop(ticket, None)
                self.counters.wait_s += time.perf_counter() - started
        if reads.error is not None:
            raise reads.error
        self.counters.reads += reads.reads
        self.counters.read_bytes += int(reads.table[: reads.reads, _LENGTH].sum())

    def close(self) -> None:
        with self._lock:
            if self._ring.fd < 0:
                return
            self._give_up()
            self._ring.close()
        super().close()

    def _fill(self) -> None:
        """Put what is waiting into the ring, as far as the depth allows."""
        while self._waiting and self._flying < self._depth:
            reads = self._waiting[0]
            end = min(len(reads.table), reads.next + self._depth - self._flying)
            self._ring.push(reads.table[reads.next : end])
            reads.flying += end - reads.next
            self._flying += end - reads.next
            reads.next = end
            if end == len(reads.table):
                self._waiting.popleft()

    def _enter(self, wait_for: int) -> None:
        code = self._ring.enter(wait_for)
        # EINTR: the signal's handler has run by now. The other two: the kernel is out of memory for a moment.
        if code == 0 or code == errno.EINTR:
            return
        if code not in (errno.EAGAIN, errno.EBUSY):
            raise DiskReadError(f"io_uring_enter: {os.strerror(code)}", hint='use backend="threads"')
        if wait_for:
            time.sleep(_PAUSE_S)

    def _collect(self) -> None:
        """Account for the completions that are there, without blocking."""
        done = self._ring.take()
        if done is None:
            return
        users, results = done
        numbers = users >> _INDEX_BITS
        rows = users & _INDEX_MASK
        first = int(numbers[0])
        if (numbers == first).all():
            self._settle(self._tickets[first], rows, results)
            return
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            self._settle(self._tickets[number], rows[mine], results[mine])

    def _settle(self, reads: _Ticket, rows: NDArray[np.int64], results: NDArray[np.int32]) -> None:
        self._flying -= len(rows)
        reads.flying -= len(rows)
        short = results != reads.table[rows, _LENGTH]
        if short.any():
            self._send_again(reads, rows[short].tolist(), results[short].tolist())

    def _send_again(self, reads: _Ticket, rows: list[int], results: list[int]) -> None:
        """Queue the missing rest of reads that came short or failed, or fail the ticket."""
        if reads.error is not None:
            return
        again: list[NDArray[np.int64]] = []
        for row, result in zip(rows, results, strict=True):
            root, stalls = reads.roots.get(row, (row, 0))
            # Direct reads go on from an aligned place only.
            fresh = max(result, 0) // self.alignment_bytes * self.alignment_bytes
            stalls = 0 if fresh else stalls + 1
            if stalls > NO_PROGRESS_LIMIT:
                reads.drop_rest(self._error(reads.table[root], max(-result, 0)))
                return
            rest = reads.table[row] + (0, fresh, fresh, -fresh, 0)
            index = len(reads.table) + len(again)
            rest[_USER] = reads.number << _INDEX_BITS | index
            reads.roots[index] = root, stalls
            again.append(rest)
        self.counters.retries += len(again)
        if reads.next == len(reads.table):
            self._waiting.append(reads)
        reads.table = np.vstack([reads.table, *again])

    def _error(self, row: NDArray[np.int64], code: int) -> DiskReadError:
        file = int(np.flatnonzero(self._heads == row[_HEAD])[0])
        return read_error(file, int(row[_OFFSET]), int(row[_LENGTH]), code)

    def _give_up(self) -> None:
        """Wait for everything in flight, of all tickets: after an interruption it may be unknown whose it is.

        When this is interrupted too, the next call begins with it again.
        """
        self._draining = True
        self._ring.drain()
        for reads in self._tickets.values():
            if reads.flying or reads.next < len(reads.table):
                reads.drop_rest(DiskReadError("reads were given up when the reading thread was interrupted"))
                reads.flying = 0
        self._waiting.clear()
        self._flying = 0
        self._draining = False
