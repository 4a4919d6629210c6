"""Reads through the page cache, used only where direct I/O is refused. Every result records it.

The page cache takes memory outside the limit, and repeated reads come from memory instead of the disk.
"""

from __future__ import annotations

from pathlib import Path

from kvswap.disk.threads_backend import ThreadsBackend

# The page cache needs no alignment; this keeps the layout of groups that a disk of 512-byte sectors has.
_ALIGNMENT_BYTES = 512


class BufferedBackend(ThreadsBackend):
    """The thread pool on descriptors without direct I/O."""

    name = "buffered"

    def __init__(self, directory: Path, depth: int) -> None:
        super().__init__(directory, _ALIGNMENT_BYTES, depth, direct=False)
