"""The interface of a disk backend: files without names, blocking writes, reads that are waited for with tickets.

A ticket stands for the reads of one ``submit``. ``wait`` returns when every byte of them has arrived, or raises. From
``submit`` until ``wait`` returns, the memory belongs to the backend. It may be used for something else only after
``wait`` or ``close``, also after an exception.

Tickets may be waited for in any order, each once. Any thread may call anything, but ``submit`` and ``wait`` are made
for one reading thread: two threads take turns. A read that is submitted after a ``write`` of its range returned sees
the new bytes. Files from ``open`` have no name and end with the backend. Files from ``adopt`` keep their names, and
what was written to them is durable after ``sync``.
"""

from __future__ import annotations

import abc
import errno
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvswap.errors import DiskReadError, StorageError

NO_PROGRESS_LIMIT = 3
"""How many times in a row a read without progress is tried again before it fails."""


@dataclass(slots=True)
class ReadCounters:
    """What a backend has done so far. ``reads`` and ``read_bytes`` count requests of the caller that arrived."""

    read_bytes: int = 0
    reads: int = 0
    write_bytes: int = 0
    writes: int = 0
    wait_s: float = 0.0
    """Time that ``wait`` blocked its caller."""
    retries: int = 0
    """Requests that had to be sent again, whole or for the missing rest."""


class ReadBackend(abc.ABC):
    """Files on one disk, with reads and writes on them. The module docstring has the rules for all backends.

    Attributes
    ----------
    name : str
        ``uring``, ``threads``, ``buffered`` or ``memory``.
    direct : bool
        Whether the page cache is bypassed.
    alignment_bytes : int
        Offsets, lengths and addresses of reads and writes are multiples of this.
    counters : ReadCounters
    """

    name: str
    direct: bool
    alignment_bytes: int
    counters: ReadCounters

    @abc.abstractmethod
    def open(self, size_bytes: int) -> int:
        """A new anonymous file with ``size_bytes`` reserved, as a small number. Raises DiskFullError, StorageError."""

    def adopt(self, fd: int) -> int:
        """Take over the descriptor of a named file, opened as ``direct`` says, as a small number."""
        os.close(fd)
        raise StorageError(f"backend {self.name} has no named files", hint='use backend="auto" for a session')

    def sync(self, file: int) -> None:
        """Make what was written to an adopted file durable. Raises DiskWriteError, DiskFullError."""
        raise StorageError(f"backend {self.name} has no named files", hint='use backend="auto" for a session')

    @abc.abstractmethod
    def ensure_size(self, file: int, size_bytes: int) -> None:
        """Reserve space up to ``size_bytes``; never shrinks. One thread at a time per file. Raises DiskFullError."""

    @abc.abstractmethod
    def write(self, file: int, offset_bytes: int, data: NDArray[np.uint8]) -> None:
        """Write all of the contiguous ``data`` and return; any thread. Raises DiskWriteError, DiskFullError."""

    @abc.abstractmethod
    def submit(
        self,
        files: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        addresses: NDArray[np.int64],
    ) -> int:
        """Start reads and return their ticket without waiting for the disk.

        All int64 ``(reads,)``, any number, also none and more than the depth: ``lengths[i]`` bytes at ``offsets[i]``
        of ``files[i]`` go to memory at ``addresses[i]``. The arrays may be reused after the call.
        """

    @abc.abstractmethod
    def wait(self, ticket: int) -> None:
        """Block until every byte of the ticket is in memory.

        A read that fails or comes short is tried again for the missing part; one that gets nowhere
        ``NO_PROGRESS_LIMIT`` times in a row raises DiskReadError, after the ticket's other reads have ended.
        An exception raised by a signal handler, such as KeyboardInterrupt, passes on after reads in flight have ended.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for what is in flight, then close the files. May be called twice."""


def check_aligned(backend: ReadBackend, offset_bytes: int, data: NDArray[np.uint8]) -> None:
    """Raise ValueError for a write that direct I/O would refuse: an error of the caller, so not a DiskError."""
    address = int(data.__array_interface__["data"][0])
    if (offset_bytes | data.nbytes | address) % backend.alignment_bytes:
        raise ValueError(
            f"write of {data.nbytes} bytes at offset {offset_bytes} from address {address:#x}: "
            f"not multiples of {backend.alignment_bytes}"
        )


def read_error(file: int, offset_bytes: int, length_bytes: int, code: int) -> DiskReadError:
    """The DiskReadError of one read; ``code`` is an errno, 0 when the file ended before the read did."""
    what = f"read of {length_bytes} bytes at offset {offset_bytes} of KV file {file}"
    if code == 0:
        return DiskReadError(f"{what}: the file ended too early", hint="the cache is damaged: prefill again")
    name = errno.errorcode.get(code, str(code))
    return DiskReadError(f"{what}: {name}, {os.strerror(code)}", hint="check the disk (dmesg), then try again")
