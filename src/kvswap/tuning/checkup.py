"""Everything that ``kvswap doctor`` says, as values: the machine, the folder, the read test, the verdict.

No model, under ten seconds, and nothing stays on the disk: a folder that was made for the look is removed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.disk import ReadBackend, create_backend, free_bytes, kv_folder, prepare_dir, probe_direct
from kvswap.disk.uring import probe_uring
from kvswap.errors import DiskError, StorageError
from kvswap.tuning.disk_test import FILE_BYTES, ReadTest, measure_reads
from kvswap.tuning.machine import Machine, describe_machine
from kvswap.tuning.verdict import Verdict, judge
from kvswap.units import MIB

FORMAT, VERSION = "kvswap-doctor", 1
_DEPTH = 64
_SMALLEST_FILE_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What the folder for KV files allows. Reasons are empty where there is nothing to explain.

    ``backend`` and ``direct_io``: what ``backend="auto"`` comes to here. The alignments are 0 without direct I/O.
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
class Checkup:
    """``read_test`` is None where it could not be made; ``read_test_reason`` then says why."""

    machine: Machine
    folder: Folder
    read_test: ReadTest | None
    read_test_reason: str
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``kvswap doctor --json``: format, version, and the fields as they are named here."""
        values = dataclasses.asdict(self)
        if (test := self.read_test) is not None:
            for name, rate in (("small", test.small), ("large", test.large), ("single", test.single)):
                values["read_test"][name] |= {"bytes_per_s": rate.bytes_per_s, "reads_per_s": rate.reads_per_s}
        return {"format": FORMAT, "version": VERSION, **values}


def check_up(kv_dir: str | None, *, file_bytes: int = FILE_BYTES, read_s: float = 3.0) -> Checkup:
    """Look at the machine and at ``kv_dir``, or the folder that is used when nothing is said.

    Raises StorageError where the folder cannot be used at all.
    """
    with _borrowed_dir(kv_dir) as path:
        machine = describe_machine()
        backend = create_backend("auto", path, _DEPTH, on_notice=lambda text: None)
        try:
            folder = _look_at(path, backend)
            test, reason = _try_reads(backend, folder, file_bytes, read_s)
        finally:
            backend.close()
    verdict = judge(
        backend=folder.backend,
        direct_io=folder.direct_io,
        direct_io_reason=folder.direct_io_reason,
        uring_reason=folder.uring_reason,
        free_bytes=folder.free_bytes,
        read_bytes_per_s=test.large.bytes_per_s if test and not test.page_cache else None,
        read_test_reason=reason,
        gpu_note=machine.gpu.note,
    )
    return Checkup(machine=machine, folder=folder, read_test=test, read_test_reason=reason, verdict=verdict)


def _look_at(path: Path, backend: ReadBackend) -> Folder:
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
    """The read test on at most half of the free space, or why there is none."""
    room_bytes = min(file_bytes, folder.free_bytes // 2 // MIB * MIB)
    if room_bytes < min(file_bytes, _SMALLEST_FILE_BYTES):
        return None, "too little free space for a file to read"
    try:
        return measure_reads(backend, file_bytes=room_bytes, read_s=read_s), ""
    except (DiskError, StorageError) as error:
        return None, str(error)


@contextlib.contextmanager
def _borrowed_dir(kv_dir: str | None) -> Iterator[Path]:
    """The folder, checked; those of its path that did not exist before are removed at the end when they are empty."""
    folder = kv_folder(kv_dir)
    fresh = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield prepare_dir(folder)
    finally:
        for part in fresh:
            with contextlib.suppress(OSError):
                part.rmdir()
