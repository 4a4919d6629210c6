"""Asks the kernel for an io_uring and maps its memory. System calls go through ctypes. Linux 5.15 or newer."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys

from kvswap.terms import round_up

SETUP = 425
ENTRY_WORDS, COMPLETION_WORDS = 8, 2
"""64-bit words of an entry and of a completion."""
_COOP_TASKRUN = 1 << 8
_FEATURES = 1 | 2  # SINGLE_MMAP, NODROP: since 5.5
_RINGS_AT, _ENTRIES_AT = 0, 0x10000000


def _words(names: str) -> list[tuple[str, type[ctypes.c_uint32]]]:
    return [(name, ctypes.c_uint32) for name in names.split()]


class _SqOffsets(ctypes.Structure):
    _fields_ = [*_words("head tail mask entries flags dropped array resv"), ("user_addr", ctypes.c_uint64)]


class _CqOffsets(ctypes.Structure):
    _fields_ = [*_words("head tail mask entries overflow cqes flags resv"), ("user_addr", ctypes.c_uint64)]


class Params(ctypes.Structure):
    """``io_uring_params``: sizes of the rings, and the places of everything in their memory, in bytes."""

    _fields_ = [
        *_words("sq_entries cq_entries flags cpu idle features wq_fd resv1 resv2 resv3"),
        ("sq", _SqOffsets),
        ("cq", _CqOffsets),
    ]


def system_calls() -> ctypes.CDLL:
    """libc, whose ``syscall`` takes seven integers and releases the interpreter lock."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long] * 7
    libc.syscall.restype = ctypes.c_long
    return libc


def set_up(depth: int) -> tuple[int, Params]:
    """The descriptor of a new ring of at least ``depth`` entries. Raises OSError where the kernel gives none."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"io_uring is Linux only, this is {sys.platform}")
    libc, code = system_calls(), 0
    # Cooperative completion (since 5.19) spares the computing thread an interrupt per read.
    for flags in (_COOP_TASKRUN, 0):
        params = Params(flags=flags)
        fd = libc.syscall(SETUP, depth, ctypes.addressof(params), 0, 0, 0, 0)
        if fd < 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:
                continue
            break
        if params.features & _FEATURES != _FEATURES:
            os.close(fd)
            raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
        return int(fd), params
    raise OSError(code, f"io_uring_setup: {os.strerror(code)}")


def map_memory(fd: int, params: Params) -> tuple[mmap.mmap, mmap.mmap]:
    """Memory with the counters, indices and completions of both rings, and memory with the entries."""
    sq, cq = params.sq, params.cq
    ring_bytes = max(sq.array + 4 * params.sq_entries, cq.cqes + 8 * COMPLETION_WORDS * params.cq_entries)
    entries_bytes = 8 * ENTRY_WORDS * params.sq_entries
    rings = mmap.mmap(fd, round_up(ring_bytes, mmap.PAGESIZE), offset=_RINGS_AT)
    return rings, mmap.mmap(fd, round_up(entries_bytes, mmap.PAGESIZE), offset=_ENTRIES_AT)
