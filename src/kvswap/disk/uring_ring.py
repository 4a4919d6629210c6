"""The rings shared with the kernel: set up, fill, enter and drain them. Tickets are the business of ``uring``.

System calls go through ctypes, which releases the interpreter lock; the shared memory is seen through numpy. So no
compiler and no dependency is needed. Linux 5.15 or newer. Not locked: one thread at a time.

Memory order. Submission: the kernel reads our entries and our tail inside ``io_uring_enter``, called by the thread
that wrote them, so program order is enough. Completion: the kernel publishes an entry, then the tail. On x86 loads
are not reordered with loads, so entries up to a tail that we read are whole. On ARM64 they may be; there ``ready``
makes a foreign call between the two. That call releases the interpreter lock and takes it again: a store-release
followed by a load-acquire, which later loads do not pass. Our own head needs no barrier: the completion ring has twice
the entries that can be in flight, so the kernel never overwrites one that is still being read.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import time

import numpy as np
from numpy.typing import NDArray

from kvswap.terms import round_up

SETUP, ENTER = 425, 426
OP_READ = 22
WORDS = 5
"""Leading 64-bit words of a submission entry that differ between reads: opcode and descriptor, offset, address,
length, user data. The rest stays zero."""
_ENTRY_WORDS = 8
_GETEVENTS = 1
_COOP_TASKRUN = 1 << 8
_FEATURES = 1 | 2  # SINGLE_MMAP, NODROP: since 5.5
_RINGS_AT, _ENTRIES_AT = 0, 0x10000000
_PAUSE_S = 0.001
_WEAK_ORDER = platform.machine().lower() not in ("x86_64", "amd64", "i686")


def _words(names: str) -> list[tuple[str, type[ctypes.c_uint32]]]:
    return [(name, ctypes.c_uint32) for name in names.split()]


class _SqOffsets(ctypes.Structure):
    _fields_ = [*_words("head tail mask entries flags dropped array resv"), ("user_addr", ctypes.c_uint64)]


class _CqOffsets(ctypes.Structure):
    _fields_ = [*_words("head tail mask entries overflow cqes flags resv"), ("user_addr", ctypes.c_uint64)]


class _Params(ctypes.Structure):
    _fields_ = [
        *_words("sq_entries cq_entries flags cpu idle features wq_fd resv1 resv2 resv3"),
        ("sq", _SqOffsets),
        ("cq", _CqOffsets),
    ]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long] * 7
    libc.syscall.restype = ctypes.c_long
    return libc


class Ring:
    """One io_uring for at most ``depth`` reads in flight. The constructor raises OSError where it is not allowed."""

    _tail: int  # submissions pushed so far, modulo 2^32 as in the rings
    _head: int  # completions taken so far
    _sqes: NDArray[np.int64]
    _users: NDArray[np.int64]
    _results: NDArray[np.int32]

    def __init__(self, depth: int) -> None:
        if sys.platform != "linux":
            raise OSError(errno.ENOSYS, f"io_uring is Linux only, this is {sys.platform}")
        self._libc = _libc()
        self.fd, params = self._setup(depth)
        try:
            if params.features & _FEATURES != _FEATURES:
                raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
            self._map(params)
        except BaseException:
            os.close(self.fd)
            raise

    def push(self, rows: NDArray[np.int64]) -> None:
        """Put reads, int64 ``(count, WORDS)``, behind those in the ring; ``enter`` hands them over.

        The caller sees to it that no more than ``depth`` are pushed and not yet taken.
        """
        count = len(rows)
        slot = self._tail & self._mask
        first = min(count, self._entries - slot)
        self._sqes[slot : slot + first] = rows[:first]
        if first < count:
            self._sqes[: count - first] = rows[first:]
        self._tail = (self._tail + count) & 0xFFFFFFFF
        self._sq_tail[0] = self._tail

    def enter(self, wait_for: int) -> int:
        """Hand what was pushed to the kernel and block for ``wait_for`` completions that were not taken yet.

        Returns 0 or the errno. EINTR, EAGAIN and EBUSY leave the rest in the ring: call again.
        """
        pushed = (self._tail - int(self._sq_head[0])) & 0xFFFFFFFF
        flags = _GETEVENTS if wait_for else 0
        if self._libc.syscall(ENTER, self.fd, pushed, wait_for, flags, 0, 0) >= 0:
            return 0
        return ctypes.get_errno()

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
        """User data and results, ``(count,)`` each, of reads that ended since the last call, or None."""
        tail = int(self._cq_tail[0])
        count = (tail - self._head) & 0xFFFFFFFF
        if not count:
            return None
        if _WEAK_ORDER:
            self._libc.getpid()
        slot = self._head & self._cq_mask
        end = slot + count
        if end <= self._cq_mask + 1:
            users, results = self._users[slot:end].copy(), self._results[slot:end].copy()
        else:
            end &= self._cq_mask
            users = np.concatenate([self._users[slot:], self._users[:end]])
            results = np.concatenate([self._results[slot:], self._results[:end]])
        self._head = tail
        self._cq_head[0] = tail
        return users, results

    def drain(self) -> None:
        """Return when nothing is in flight, whatever was lost on the way; all completions are dropped.

        It goes by the kernel's counters alone, so it holds also after an exception in the middle of anything.
        """
        self._tail = int(self._sq_head[0])  # what was not handed over never will be
        self._sq_tail[0] = self._tail
        while True:
            self._head = int(self._cq_tail[0])
            self._cq_head[0] = self._head
            left = (self._tail - self._head) & 0xFFFFFFFF
            if not left:
                return
            if self.enter(left):
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Drain, then give the rings back. May be called twice."""
        if self.fd >= 0:
            self.drain()
            os.close(self.fd)
            # Python's mmap holds a duplicate of the descriptor: the ring lives until the views are gone.
            vars(self).clear()
            self.fd = -1

    def _setup(self, depth: int) -> tuple[int, _Params]:
        # Cooperative completion (since 5.19) spares the computing thread an interrupt per read.
        code = 0
        for flags in (_COOP_TASKRUN, 0):
            params = _Params(flags=flags)
            fd = self._libc.syscall(SETUP, depth, ctypes.addressof(params), 0, 0, 0, 0)
            if fd >= 0:
                return int(fd), params
            code = ctypes.get_errno()
            if code != errno.EINVAL:
                break
        raise OSError(code, f"io_uring_setup: {os.strerror(code)}")

    def _map(self, params: _Params) -> None:
        sq, cq = params.sq, params.cq
        ring_bytes = max(sq.array + 4 * params.sq_entries, cq.cqes + 16 * params.cq_entries)
        entries_bytes = 8 * _ENTRY_WORDS * params.sq_entries
        rings = mmap.mmap(self.fd, round_up(ring_bytes, mmap.PAGESIZE), offset=_RINGS_AT)
        entries = mmap.mmap(self.fd, round_up(entries_bytes, mmap.PAGESIZE), offset=_ENTRIES_AT)

        def counter(offset: int) -> NDArray[np.uint32]:
            return np.frombuffer(rings, dtype=np.uint32, count=1, offset=offset)

        self._entries, self._mask = int(params.sq_entries), int(params.sq_entries) - 1
        self._cq_mask = int(params.cq_entries) - 1
        self._sq_head, self._sq_tail = counter(sq.head), counter(sq.tail)
        self._cq_head, self._cq_tail = counter(cq.head), counter(cq.tail)
        self._tail, self._head = int(self._sq_tail[0]), int(self._cq_head[0])
        np.frombuffer(rings, dtype=np.uint32, count=self._entries, offset=sq.array)[:] = np.arange(self._entries)
        table = np.frombuffer(entries, dtype=np.int64, count=_ENTRY_WORDS * self._entries)
        self._sqes = table.reshape(self._entries, _ENTRY_WORDS)[:, :WORDS]
        done = np.frombuffer(rings, dtype=np.int64, count=2 * params.cq_entries, offset=cq.cqes)
        self._users = done[::2]
        self._results = done.view(np.int32)[2::4]
