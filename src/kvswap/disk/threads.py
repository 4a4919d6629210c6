"""Reads through a small pool of daemon threads and ``preadv``: for systems without io_uring.

Python's thread hand-over costs tens of microseconds a read, so a fast disk is not used to the full; the contract is
the same. A ticket's reads all end, well or not, before its ``wait`` does.
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


class _Ticket:
    """Reads of one submit; ``left`` and ``error`` are guarded by ``changed``."""

    def __init__(self, rows: list[tuple[int, int, int, int, int]]) -> None:
        self.rows = rows
        self.left = len(rows)
        self.error: Exception | None = None
        self.changed = threading.Condition()


class ThreadsBackend(FileBackend):
    """``preadv`` on direct descriptors, or buffered ones in the subclass; at most ``depth`` and 16 at a time."""

    name = "threads"

    def __init__(self, directory: Path, alignment_bytes: int, depth: int, *, direct: bool = True) -> None:
        super().__init__(directory, alignment_bytes, direct=direct)
        self._queue: queue.SimpleQueue[tuple[_Ticket, int] | None] = queue.SimpleQueue()
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
        for index in range(len(ticket.rows)):
            self._queue.put((ticket, index))
        return number

    def wait(self, ticket: int) -> None:
        reads = self._tickets.pop(ticket, None)
        if reads is None:
            raise ValueError(f"ticket {ticket} is unknown or was waited for already")
        started = time.perf_counter()
        try:
            self._join(reads)
        except BaseException as interrupt:
            self._stop(reads, interrupt)
            raise
        finally:
            self.counters.wait_s += time.perf_counter() - started
        if reads.error is not None:
            raise reads.error
        self.counters.reads += len(reads.rows)
        self.counters.read_bytes += sum(row[3] for row in reads.rows)

    def close(self) -> None:
        for reads in self._tickets.values():
            self._stop(reads, DiskReadError("the backend was closed"))
        self._tickets.clear()
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join()
        self._workers = []
        super().close()

    def _join(self, reads: _Ticket) -> None:
        with reads.changed:
            while reads.left:
                reads.changed.wait()

    def _stop(self, reads: _Ticket, why: BaseException) -> None:
        """Let reads that have not begun fall through, and wait for those in flight: they write into memory."""
        with reads.changed:
            reads.error = reads.error or DiskReadError(f"reads were given up: {why!r}")
        self._join(reads)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            reads, index = item
            error: Exception | None = None
            try:
                if reads.error is None:
                    self._read(*reads.rows[index])
            except Exception as caught:  # noqa: BLE001 - whatever it is, the waiting thread has to hear of it
                error = caught
            with reads.changed:
                reads.error = reads.error or error
                reads.left -= 1
                if not reads.left:
                    reads.changed.notify_all()

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
