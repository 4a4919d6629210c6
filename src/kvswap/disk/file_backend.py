"""What the backends on real files share: descriptors, blocking writes and sync. Each backend has its own reads."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.backend import NO_PROGRESS_LIMIT, ReadBackend, ReadCounters, check_aligned
from kvswap.disk.direct import set_nocache
from kvswap.disk.files import ensure_size, full_error, is_full, open_unlinked
from kvswap.errors import DiskWriteError


class FileBackend(ReadBackend):
    """Anonymous files in ``directory``; ``alignment_bytes`` is what direct I/O needs there, see ``probe_direct``."""

    def __init__(self, directory: Path, alignment_bytes: int, *, direct: bool) -> None:
        self.direct = direct
        self.alignment_bytes = alignment_bytes
        self.counters = ReadCounters()
        self._directory = directory
        self._fds: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._files_lock = threading.Lock()

    def open(self, size_bytes: int) -> int:
        return self.adopt(open_unlinked(self._directory, size_bytes, self.direct))

    def adopt(self, fd: int) -> int:
        if self.direct:
            set_nocache(fd)
        elif hasattr(os, "posix_fadvise"):
            # Read-ahead would fetch neighbours that were not selected.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with self._files_lock:
            # A new array, so that a submit in another thread keeps a whole one.
            self._fds = np.append(self._fds, fd)
            return len(self._fds) - 1

    def sync(self, file: int) -> None:
        try:
            os.fdatasync(self._fd(file))
        except OSError as error:
            what = f"KV file {file} cannot be made durable"
            if is_full(error):
                raise full_error(what, error) from error
            raise DiskWriteError(f"{what}: {error.strerror}", hint="check the disk (dmesg)") from error

    def ensure_size(self, file: int, size_bytes: int) -> None:
        ensure_size(self._fd(file), size_bytes)

    def write(self, file: int, offset_bytes: int, data: NDArray[np.uint8]) -> None:
        check_aligned(self, offset_bytes, data)
        fd, view = self._fd(file), data.reshape(-1).data
        done, stalls = 0, 0
        while done < len(view):
            fresh = self._write_some(fd, file, offset_bytes + done, view[done:])
            # Direct writes go on from an aligned place only.
            fresh -= fresh % self.alignment_bytes
            done += fresh
            stalls = 0 if fresh else stalls + 1
            if stalls > NO_PROGRESS_LIMIT:
                raise DiskWriteError(
                    f"write of {len(view)} bytes at offset {offset_bytes} of KV file {file} stops at byte {done}",
                    hint="check the disk (dmesg)",
                )
        with self._files_lock:
            self.counters.writes += 1
            self.counters.write_bytes += len(view)

    def close(self) -> None:
        with self._files_lock:
            fds, self._fds = self._fds, np.empty(0, dtype=np.int64)
        with ExitStack() as all_of_them:  # also those after one whose close fails
            for fd in fds:
                all_of_them.callback(os.close, int(fd))

    def _fd(self, file: int) -> int:
        return int(self._fds[file])

    def _write_some(self, fd: int, file: int, offset_bytes: int, view: memoryview) -> int:
        what = f"write of {len(view)} bytes at offset {offset_bytes} of KV file {file}"
        try:
            return os.pwrite(fd, view, offset_bytes)
        except OSError as error:
            if is_full(error):
                raise full_error(what, error) from error
            name = errno.errorcode.get(error.errno or 0, "?")
            raise DiskWriteError(f"{what}: {name}, {error.strerror}", hint="check the disk (dmesg)") from error
