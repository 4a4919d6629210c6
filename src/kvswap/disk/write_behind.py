"""Writes that the caller does not wait for: a bounded queue in aligned memory, and one thread that writes.

``acquire`` a buffer, fill it, ``submit`` it, and do not touch it afterwards. Writes happen in the order of
submission. A read of a range that is submitted to the backend after ``wait_for`` of its write sees the new bytes.

Any thread may call anything. A thread holds at most one buffer that it has not submitted; one that it will not submit
goes back with ``discard``. After the first failed write nothing more is written, and every call but ``discard`` and
``close`` raises that error. Nothing is durable here: done means handed to the file, not synchronised.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.backend import ReadBackend, check_aligned
from kvswap.disk.slab import Slab
from kvswap.errors import DiskError, DiskWriteError
from kvswap.terms import round_up


class _Span:
    """Bytes ``start`` to ``end`` of the slab; ``free`` when written or discarded."""

    __slots__ = ("end", "free", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.free = start, end, False


@dataclass(frozen=True, slots=True)
class _Write:
    file: int
    offset_bytes: int
    data: NDArray[np.uint8]
    span: _Span


class WriteBehind:
    """A write queue of ``queue_bytes`` in front of ``backend``.

    Attributes
    ----------
    nbytes : int
        Memory that the queue takes, for the ledger.
    largest_bytes : int
        The most that one ``acquire`` may ask for: half of the queue, so that one buffer fills while one is written.
    """

    def __init__(self, backend: ReadBackend, queue_bytes: int) -> None:
        self._backend = backend
        self._align = backend.alignment_bytes
        self._slab = Slab(max(queue_bytes, 2 * self._align))
        self.nbytes = self._slab.nbytes
        self.largest_bytes = self.nbytes // 2 // self._align * self._align
        self._changed = threading.Condition()
        self._spans: deque[_Span] = deque()  # in use, in the order they were acquired: a ring through the slab
        self._unsubmitted: dict[int, _Span] = {}  # by address
        self._queue: deque[_Write] = deque()
        self._submitted = self._done = 0
        self._pending_bytes = 0
        self._error: DiskError | None = None
        self._closed = False
        self._writer = threading.Thread(target=self._run, name="kvswap-write-behind", daemon=True)
        self._writer.start()

    @property
    def pending_bytes(self) -> int:
        """Bytes submitted and not written yet."""
        return self._pending_bytes

    def acquire(self, nbytes: int) -> NDArray[np.uint8]:
        """An aligned uint8 ``(nbytes,)`` to fill, contents undefined. Blocks until there is room."""
        if not 0 < nbytes <= self.largest_bytes:
            raise ValueError(f"a write buffer has 1 to {self.largest_bytes} bytes, got {nbytes}")
        size_bytes = round_up(nbytes, self._align)
        with self._changed:
            self._check_open()
            while (start := self._place(size_bytes)) is None:
                self._changed.wait()
                self._check_open()
            span = _Span(start, start + size_bytes)
            self._spans.append(span)
            self._unsubmitted[self._slab.address + start] = span
            return self._slab.array[start : start + nbytes]

    def submit(self, file: int, offset_bytes: int, buffer: NDArray[np.uint8]) -> int:
        """Queue a buffer from ``acquire``, or its beginning, to be written; its sequence number. Never blocks."""
        check_aligned(self._backend, offset_bytes, buffer)
        with self._changed:
            self._check_open()
            span = self._take_back(buffer)
            self._queue.append(_Write(file, offset_bytes, buffer, span))
            self._submitted += 1
            self._pending_bytes += buffer.nbytes
            self._changed.notify_all()
            return self._submitted

    def discard(self, buffer: NDArray[np.uint8]) -> None:
        """Give back a buffer from ``acquire`` that will not be submitted."""
        with self._changed:
            self._release(self._take_back(buffer))

    def done(self, sequence: int) -> bool:
        """Whether that write and all before it are done; costs no lock."""
        if self._error is not None:
            raise self._error
        return self._done >= sequence

    def wait_for(self, sequence: int) -> None:
        """Block until that write and all before it are done. Raises the first error of the writer."""
        with self._changed:
            while self._error is None and self._done < min(sequence, self._submitted):
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def flush(self) -> None:
        """Block until everything submitted so far is done. Raises the first error of the writer."""
        self.wait_for(self._submitted)

    def close(self) -> None:
        """Write what is queued, end the thread, free the memory. Never raises a write error: ``flush`` first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join()
        self._slab.close()

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise ValueError("the write queue is closed")

    def _place(self, size_bytes: int) -> int | None:
        """Where ``size_bytes`` fit behind the newest span of the ring, or None."""
        if not self._spans:
            return 0
        oldest, newest = self._spans[0], self._spans[-1]
        limit_bytes = self._slab.nbytes
        if newest.start < oldest.start:
            limit_bytes = oldest.start
        if newest.end + size_bytes <= limit_bytes:
            return newest.end
        wraps = newest.start >= oldest.start and size_bytes <= oldest.start
        return 0 if wraps else None

    def _take_back(self, buffer: NDArray[np.uint8]) -> _Span:
        span = self._unsubmitted.pop(int(buffer.__array_interface__["data"][0]), None)
        if span is None:
            raise ValueError("the buffer is not from acquire, or was submitted already")
        return span

    def _release(self, span: _Span) -> None:
        span.free = True
        while self._spans and self._spans[0].free:
            self._spans.popleft()
        self._changed.notify_all()

    def _run(self) -> None:
        while (write := self._next()) is not None:
            error: DiskError | None = None
            try:
                self._backend.write(write.file, write.offset_bytes, write.data)
            except DiskError as caught:
                error = caught
            except Exception as caught:  # noqa: BLE001 - callers raise it; a dead writer would block them
                error = DiskWriteError(f"write to KV file {write.file} at offset {write.offset_bytes}: {caught!r}")
            with self._changed:
                self._pending_bytes -= write.data.nbytes
                self._release(write.span)
                if error is None:
                    self._done += 1
                else:
                    self._fail(error)

    def _next(self) -> _Write | None:
        """The next write, or None when closed and empty."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return self._queue.popleft() if self._queue else None

    def _fail(self, error: DiskError) -> None:
        self._error = error
        self._pending_bytes = 0
        for write in self._queue:
            self._release(write.span)
        self._queue.clear()
