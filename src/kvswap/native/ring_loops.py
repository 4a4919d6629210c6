"""Reads through io_uring, started and collected in C: the compiled half of ``kvswap.disk.uring_ring``.

Callers ask ``available`` first. One thread at a time on one ring.
"""

from __future__ import annotations

import ctypes

from kvswap.native.library import available as available
from kvswap.native.library import required_library


class RingMemory(ctypes.Structure):
    """Where a ring's memory is, and its sizes; ``kvswap.disk.uring_ring`` fills it in and owns the memory."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sq_head", "sq_tail", "cq_head", "cq_tail", "entries", "completions")),
        *((name, ctypes.c_void_p) for name in ("reads", "failed", "free", "tickets", "fds", "wanted")),
        *((name, ctypes.c_int64) for name in ("fd", "entries_count", "completions_count")),
        *((name, ctypes.c_int64) for name in ("depth", "room", "tickets_count", "files")),
    ]


def submit(memory: RingMemory, ticket: int, number: int, count: int) -> int:
    """Start the first ``count`` reads of ``memory.wanted``. Returns 0 or the errno of handing them over.

    They are numbers ``number`` and on of the ticket's reads. Raises ValueError where the ring has no such ticket, no
    room for so many, or where one has no file or an impossible length.
    """
    code: int = required_library().kvswap_ring_submit(ctypes.addressof(memory), ticket, number, count)
    if code < 0:
        raise ValueError(
            f"{count} reads: no room for them in the ring, no such ticket, no such file, or no such length"
        )
    return code


def collect(memory: RingMemory, wait_for: int) -> int:
    """Account for completions, after blocking for ``wait_for`` of them where that is not 0.

    Returns how many rows of ``memory.failed`` reads were written that failed or came short, or a negative errno.
    """
    found: int = required_library().kvswap_ring_collect(ctypes.addressof(memory), wait_for)
    return found
