"""Finds out what direct I/O needs in a folder: asks the kernel where it can say, and always tries a write and a read.

Direct reads bypass the page cache, so memory stays under the limit and times are those of the disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from kvswap.disk.files import filesystem_of, open_unlinked
from kvswap.disk.slab import Slab
from kvswap.errors import KVSwapError

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_MEMORY_ALIGN_AT, _OFFSET_ALIGN_AT = 152, 156


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectProbe:
    """Whether direct I/O works in a folder and what it needs.

    ``alignment_bytes`` holds for offsets and lengths, ``memory_alignment_bytes`` for addresses; both are 0 when
    ``ok`` is false, and ``reason`` then says why.
    """

    ok: bool
    alignment_bytes: int
    memory_alignment_bytes: int
    filesystem: str
    reason: str


def probe_direct(path: str | Path) -> DirectProbe:
    """Try direct I/O with a temporary file in the folder ``path``, which is gone afterwards. A refusal is a result."""
    filesystem = filesystem_of(path)
    try:
        fd = open_unlinked(path, 2 * mmap.PAGESIZE, direct=True)
    except (KVSwapError, OSError) as error:
        return _refused(filesystem, f"a file cannot be opened for direct I/O: {error}")
    try:
        set_nocache(fd)
        candidates = _stated_alignment(fd) or [(512, 512), (4096, 4096)]
        reason = "the file system reports that it has no direct I/O"
        for offset_align, memory_align in candidates:
            if offset_align == 0:
                continue
            failure = _try(fd, offset_align)
            if failure is None:
                return DirectProbe(
                    ok=True,
                    alignment_bytes=offset_align,
                    memory_alignment_bytes=memory_align,
                    filesystem=filesystem,
                    reason="",
                )
            reason = f"a direct write and read of {offset_align} bytes failed: {failure}"
        return _refused(filesystem, reason)
    finally:
        os.close(fd)


def set_nocache(fd: int) -> None:
    """Keep the page cache out on macOS, which has no O_DIRECT; elsewhere nothing."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def _refused(filesystem: str, reason: str) -> DirectProbe:
    return DirectProbe(
        ok=False, alignment_bytes=0, memory_alignment_bytes=0, filesystem=filesystem, reason=f"{reason} ({filesystem})"
    )


def _stated_alignment(fd: int) -> list[tuple[int, int]]:
    """``[(offset alignment, memory alignment)]`` as statx tells it since Linux 6.1, ``[]`` when it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or not hasattr(libc, "statx"):
        return []
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return []
    mask, memory_align, offset_align = (
        int.from_bytes(answer.raw[at : at + 4], sys.byteorder) for at in (0, _MEMORY_ALIGN_AT, _OFFSET_ALIGN_AT)
    )
    return [(offset_align, memory_align)] if mask & _STATX_DIOALIGN else []


def _try(fd: int, alignment_bytes: int) -> str | None:
    """Write and read back one unit at an odd multiple of the alignment; what went wrong, or None."""
    slab = Slab(4 * max(alignment_bytes, mmap.PAGESIZE))
    source = slab.array[alignment_bytes : 2 * alignment_bytes]
    target = slab.array[3 * alignment_bytes : 4 * alignment_bytes]
    source[:] = 0xA5
    try:
        wrote = os.pwrite(fd, source.data, alignment_bytes)
        read = os.preadv(fd, [target.data], alignment_bytes)
        if wrote != alignment_bytes or read != alignment_bytes or bool((target != 0xA5).any()):
            return f"{wrote} bytes written, {read} read back"
        return None
    except OSError as error:
        return f"{errno.errorcode.get(error.errno or 0, '?')} {error.strerror}"
    finally:
        slab.close()
