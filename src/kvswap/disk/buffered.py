"""Reads through the page cache: only where direct I/O is refused, and recorded as such in every result.

The page cache then uses memory outside the limit, and repeated reads come from memory rather than from the disk.
"""

from __future__ import annotations

from pathlib import Path

from kvswap.disk.threads import ThreadsBackend

# The page cache needs none; this keeps groups laid out as on a disk of 512-byte sectors.
_ALIGNMENT_BYTES = 512


class BufferedBackend(ThreadsBackend):
    """The thread pool on descriptors without direct I/O."""

    name = "buffered"

    def __init__(self, directory: Path, depth: int) -> None:
        super().__init__(directory, _ALIGNMENT_BYTES, depth, direct=False)
