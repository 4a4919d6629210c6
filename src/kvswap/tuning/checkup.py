"""Examine the machine and a folder for ``kvswap doctor``: facts, a read test, and advice.

``check_up`` collects everything and returns it as one ``Checkup``. ``give_verdict`` is the decision alone: it takes
values and returns the summary and the advice. No model is loaded, the whole takes less than ten seconds, and nothing
remains on the disk; a folder that was created for the examination is removed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.disk import ReadBackend, create_backend, free_bytes, kv_folder, prepare_dir, probe_direct
from kvswap.disk.uring_backend import probe_uring
from kvswap.errors import DiskError, StorageError
from kvswap.tuning.machine import Machine, describe_machine
from kvswap.tuning.measure_disk import FILE_BYTES, ReadTest, measure_reads
from kvswap.units import GIB, MIB, format_bytes, format_rate

FORMAT, VERSION = "kvswap-doctor", 1
SLOW_BYTES_PER_S = 150e6
"""Below this rate of 64 KiB reads, tokens wait for the disk even with a small model."""
LITTLE_FREE_BYTES = 4 * GIB
_DEPTH = 64
_SMALLEST_FILE_BYTES = 16 * MIB
_BACKENDS = {
    "uring": "io_uring with direct I/O",
    "threads": "threads with direct I/O",
    "buffered": "the page cache, without direct I/O",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What the folder for KV files allows.

    ``direct_io_reason`` and ``uring_reason`` say why something does not work, and are empty where it does. ``backend``
    and ``direct_io`` are what ``backend="auto"`` chooses here. The alignments are 0 without direct I/O.
    """

    path: str
    filesystem: str
    free_bytes: int
    direct_io_works: bool
    direct_io_reason: str
    uring_works: bool
    uring_reason: str
    offset_alignment_bytes: int
    memory_alignment_bytes: int
    backend: str
    direct_io: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``summary`` says what kvswap will use in this folder. ``advice`` says what to improve; it may be empty."""

    summary: str
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All findings. ``read_test`` is None where no read test was possible; ``read_test_reason`` then says why."""

    machine: Machine
    folder: Folder
    read_test: ReadTest | None
    read_test_reason: str
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of ``kvswap doctor --json``: format, version, and the fields under their names."""
        values = dataclasses.asdict(self)
        if (test := self.read_test) is not None:
            for name, rate in (("small", test.small), ("large", test.large), ("single", test.single)):
                values["read_test"][name] |= {"bytes_per_s": rate.bytes_per_s, "reads_per_s": rate.reads_per_s}
        return {"format": FORMAT, "version": VERSION, **values}


def check_up(kv_dir: str | None, *, file_bytes: int = FILE_BYTES, read_s: float = 3.0) -> Checkup:
    """Examine the machine and ``kv_dir``, or the default folder where it is None.

    Raises StorageError when the folder cannot be used at all.
    """
    with _existing_dir(kv_dir) as path:
        machine = describe_machine()
        backend = create_backend("auto", path, _DEPTH, on_notice=lambda text: None)
        logger.debug("checking %s with backend %s, direct I/O %s", path, backend.name, backend.direct)
        try:
            folder = _describe_folder(path, backend)
            test, reason = _try_reads(backend, folder, file_bytes, read_s)
        finally:
            backend.close()
    verdict = give_verdict(
        backend=folder.backend,
        direct_io=folder.direct_io,
        direct_io_reason=folder.direct_io_reason,
        uring_reason=folder.uring_reason,
        free_bytes=folder.free_bytes,
        read_bytes_per_s=test.large.bytes_per_s if test and not test.page_cache else None,
        read_test_reason=reason,
        gpu_note=machine.gpu.note,
        compiled=machine.compiled_loops,
    )
    return Checkup(machine=machine, folder=folder, read_test=test, read_test_reason=reason, verdict=verdict)


def give_verdict(
    *,
    backend: str,
    direct_io: bool,
    direct_io_reason: str,
    uring_reason: str,
    free_bytes: int,
    read_bytes_per_s: float | None,
    read_test_reason: str,
    gpu_note: str,
    compiled: bool,
) -> Verdict:
    """Say what kvswap will use and what to improve.

    ``read_bytes_per_s`` is the disk's own rate for 64 KiB reads, or None where it is unknown.
    """
    rate = f", {format_rate(read_bytes_per_s)} at random" if read_bytes_per_s else ""
    advice = []
    if not direct_io:
        advice.append(
            f"direct I/O is refused ({direct_io_reason}), so reads use memory outside the limit and the read test says "
            "nothing about the disk: choose a folder on a local disk (ext4, xfs, btrfs) with --kv-dir"
        )
    if uring_reason and direct_io:
        advice.append(_uring_advice(uring_reason))
    if read_test_reason:
        advice.append(f"the read test failed ({read_test_reason}): check the disk, or choose another with --kv-dir")
    if read_bytes_per_s is not None and read_bytes_per_s < SLOW_BYTES_PER_S:
        advice.append(
            f"the disk is slow at random reads ({format_rate(read_bytes_per_s)}), so tokens will wait for it: choose a "
            "folder on an SSD with --kv-dir"
        )
    if free_bytes < LITTLE_FREE_BYTES:
        advice.append(
            f"{format_bytes(free_bytes)} of free space is enough for short contexts only: free some, or choose another "
            "disk with --kv-dir"
        )
    if gpu_note:
        advice.append(f"{gpu_note}: install a PyTorch that supports it if the model shall run there")
    if not compiled:
        advice.append(
            "nothing was compiled, so models run slower and .gguf files are converted to float32: install a C "
            "compiler, then kvswap again"
        )
    return Verdict(summary=f"kvswap will read through {_BACKENDS[backend]}{rate}", advice=tuple(advice))


def _uring_advice(reason: str) -> str:
    what = f"io_uring cannot be used ({reason}) and threads are slower"
    if reason.startswith("EPERM"):
        return (
            f"{what}: allow it in the container's seccomp profile, or with sysctl kernel.io_uring_disabled=0 "
            "on the machine"
        )
    if reason.startswith("ENOMEM"):
        return f"{what}: raise the limit on locked memory (ulimit -l)"
    if reason.startswith("ENOSYS"):
        return f"{what}: it needs Linux 5.15 or newer"
    return what


def _describe_folder(path: Path, backend: ReadBackend) -> Folder:
    direct, (uring_works, uring_reason) = probe_direct(path), probe_uring()
    return Folder(
        path=str(path),
        filesystem=direct.filesystem,
        free_bytes=free_bytes(path),
        direct_io_works=direct.ok,
        direct_io_reason=direct.reason,
        uring_works=uring_works,
        uring_reason=uring_reason,
        offset_alignment_bytes=direct.alignment_bytes,
        memory_alignment_bytes=direct.memory_alignment_bytes,
        backend=backend.name,
        direct_io=backend.direct,
    )


def _try_reads(backend: ReadBackend, folder: Folder, file_bytes: int, read_s: float) -> tuple[ReadTest | None, str]:
    """Run the read test on at most half of the free space; return it, or None and the reason."""
    usable_bytes = min(file_bytes, folder.free_bytes // 2 // MIB * MIB)
    if usable_bytes < min(file_bytes, _SMALLEST_FILE_BYTES):
        return None, "too little free space for a test file"
    try:
        return measure_reads(backend, file_bytes=usable_bytes, read_s=read_s), ""
    except (DiskError, StorageError) as error:
        return None, str(error)


@contextlib.contextmanager
def _existing_dir(kv_dir: str | None) -> Iterator[Path]:
    """Create the folder where it is missing and check it; afterwards remove what was created, if it is empty."""
    folder = kv_folder(kv_dir)
    created = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield prepare_dir(folder)
    finally:
        for part in created:
            with contextlib.suppress(OSError):
                part.rmdir()
