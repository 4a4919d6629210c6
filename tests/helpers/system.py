"""What the system itself can do, asked without any of kvswap's code: a broken probe must fail tests, not skip them."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from pathlib import Path

UNIT = 4096
IO_URING_SETUP, SINGLE_MMAP_AND_NODROP = 425, 3


def has_direct_io(folder: Path) -> bool:
    """Whether a file in ``folder`` can be written and read round the page cache."""
    path, buffer = folder / "direct-io-trial", mmap.mmap(-1, UNIT)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except (OSError, AttributeError):  # macOS has no O_DIRECT
        path.unlink(missing_ok=True)
        return False
    try:
        return os.pwrite(fd, buffer, 0) == UNIT and os.preadv(fd, [buffer], 0) == UNIT
    except OSError:
        return False
    finally:
        os.close(fd)
        path.unlink()


def has_io_uring() -> bool:
    """Whether the kernel gives this process a ring, with what has been there since 5.5."""
    if sys.platform != "linux":
        return False
    params = ctypes.create_string_buffer(120)
    fd = ctypes.CDLL(None, use_errno=True).syscall(IO_URING_SETUP, 8, params)
    if fd < 0:
        return False
    os.close(fd)
    features: int = struct.unpack_from("I", params, 20)[0]
    return features & SINGLE_MMAP_AND_NODROP == SINGLE_MMAP_AND_NODROP
