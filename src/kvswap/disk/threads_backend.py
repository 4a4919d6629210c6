"""Reads through a small pool of daemon threads and ``preadv``: for systems without io_uring.

Passing a read to another thread costs Python tens of microseconds, so a fast disk is not used to the full. The rules
are those of ``backend``. All reads of a ticket have ended, with or without an error, before its ``wait`` does.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.backend import NO_PROGRESS_LIMIT, read_error
from kvswap.disk.file_backend import FileBackend
from kvswap.errors import DiskReadError

_MOST_THREADS = 16


_Row = tuple[int, int, int, int, int]  # descriptor, file, offset, length, address


class _Ticket:
    """Reads of one submit. Workers take them one by one, and none after an error."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows = rows
        self.error: Exception | None = None
        self._next = 0
        self._flying = 0
        self._changed = threading.Condition()

    def take(self) -> _Row | None:
        """The next read, after which ``settle`` must be called, or None."""
        with self._changed:
            if self.error is not None or self._next == len(self.rows):
                return None
            self._next += 1
            self._flying += 1
            return self.rows[self._next - 1]

    def settle(self, error: Exception | None) -> None:
        with self._changed:
            self._flying -= 1
            self.error = self.error or error
            if self._over():
                self._changed.notify_all()

    def join(self) -> None:
        """Block until no read is in flight and none will be taken."""
        with self._changed:
            while not self._over():
                self._changed.wait()

    def stop(self, why: BaseException) -> None:
        """Begin no more reads, and wait for those in flight, which write into memory."""
        with self._changed:
            self.error = self.error or DiskReadError(f"reads were given up: {why!r}")
        self.join()

    def _over(self) -> bool:
        return not self._flying and (self.error is not None or self._next == len(self.rows))


class ThreadsBackend(FileBackend):
    """``preadv`` on direct descriptors, or buffered ones in the subclass; at most ``depth`` and 16 at a time."""

    name = "threads"

    def __init__(self, directory: Path, alignment_bytes: int, depth: int, *, direct: bool = True) -> None:
        super().__init__(directory, alignment_bytes, direct=direct)
        self._queue: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._tickets: dict[int, _Ticket] = {}
        self._workers = [
            threading.Thread(target=self._work, name=f"kvswap-read-{number}", daemon=True)
            for number in range(min(depth, _MOST_THREADS))
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self,
        files: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        addresses: NDArray[np.int64],
    ) -> int:
        fds = self._fds[files]
        columns = (fds, files, offsets, lengths, addresses)
        ticket = _Ticket(list(zip(*(column.tolist() for column in columns), strict=True)))
        number = next(self._numbers)
        self._tickets[number] = ticket
        try:
            for _ in self._workers[: len(ticket.rows)]:
                self._queue.put(ticket)
        except BaseException as interrupt:
            ticket.stop(interrupt)
            raise
        return number

    def wait(self, ticket: int) -> None:
        reads = self._tickets.pop(ticket, None)
        if reads is None:
            raise ValueError(f"ticket {ticket} is unknown or was waited for already")
        started = time.perf_counter()
        try:
            reads.join()
        except BaseException as interrupt:
            reads.stop(interrupt)
            raise
        finally:
            self.counters.wait_s += time.perf_counter() - started
        if reads.error is not None:
            raise reads.error
        self.counters.reads += len(reads.rows)
        self.counters.read_bytes += sum(row[3] for row in reads.rows)

    def close(self) -> None:
        for reads in self._tickets.values():
            reads.stop(DiskReadError("the backend was closed"))
        self._tickets.clear()
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join()
        self._workers = []
        super().close()

    def _work(self) -> None:
        while (reads := self._queue.get()) is not None:
            while (row := reads.take()) is not None:
                error: Exception | None = None
                try:
                    self._read(*row)
                except Exception as caught:  # noqa: BLE001 - the waiting thread raises it again
                    error = caught
                reads.settle(error)

    def _read(self, fd: int, file: int, offset: int, length: int, address: int) -> None:
        done, stalls, code = 0, 0, 0
        while done < length:
            target = (ctypes.c_char * (length - done)).from_address(address + done)
            try:
                fresh, code = os.preadv(fd, [target], offset + done), 0
            except OSError as error:
                fresh, code = 0, error.errno or 0
            if done + fresh < length:
                # Direct reads go on from an aligned place only.
                fresh -= fresh % self.alignment_bytes
                stalls = 0 if fresh else stalls + 1
                if stalls > NO_PROGRESS_LIMIT:
                    raise read_error(file, offset, length, code)
                self._count_retry()
            done += fresh

    def _count_retry(self) -> None:
        with self._files_lock:
            self.counters.retries += 1
