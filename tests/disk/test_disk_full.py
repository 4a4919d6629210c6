"""A disk that fills up: while a file is made, while it grows, in the middle of writing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvswap.disk import Slab
from kvswap.disk.files import ensure_size, open_unlinked
from kvswap.errors import DiskFullError, DiskWriteError, StorageError
from tests.helpers.backends import UNIT, make

REAL = ("uring", "threads", "buffered")


def failing(code: int):
    def call(*args: object, **options: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "disk quota")])
def test_full_while_a_file_is_made(code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code), raising=False)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with pytest.raises(DiskFullError, match=hint):
        open_unlinked(tmp_path, UNIT, direct=False)
    assert list(tmp_path.iterdir()) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_full_while_a_file_grows_gives_the_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = open_unlinked(tmp_path, UNIT, direct=False)

    def half(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", half, raising=False)
    with pytest.raises(DiskFullError, match=r"cannot grow from 4\.0 KiB to 32\.0 KiB"):
        ensure_size(fd, 8 * UNIT)
    assert os.fstat(fd).st_size == UNIT
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EIO), raising=False)
    with pytest.raises(DiskWriteError, match="cannot grow"):
        ensure_size(fd, 8 * UNIT)
    os.close(fd)


def test_folder_that_refuses_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        open_unlinked(tmp_path / "absent", UNIT, direct=False)
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(DiskFullError, match="cannot be created"):
        open_unlinked(tmp_path, UNIT, direct=False)


@pytest.mark.parametrize("name", REAL)
def test_write_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, slab = make(name, tmp_path), Slab(UNIT)
    file = backend.open(UNIT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(DiskFullError, match=rf"write of {UNIT} bytes at offset 0 of KV file {file}"):
            backend.write(file, 0, slab.array)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.EIO))
        with pytest.raises(DiskWriteError, match="EIO"):
            backend.write(file, 0, slab.array)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, view, offset: 100)
        with pytest.raises(DiskWriteError, match="stops at byte 0"):
            backend.write(file, 0, slab.array)
    assert backend.counters.writes == 0
    backend.close()


@pytest.mark.parametrize("name", REAL)
def test_short_writes_go_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes 700 bytes: the rest goes on from the last whole sector."""
    backend, slab = make(name, tmp_path), Slab(UNIT)
    file, real, offsets = backend.open(UNIT), os.pwrite, []

    def short(fd: int, view: memoryview, offset: int) -> int:
        offsets.append(offset)
        real(fd, view[:512], offset)
        return min(700, len(view))

    monkeypatch.setattr(os, "pwrite", short)
    slab.array[:] = 9
    backend.write(file, 0, slab.array)
    assert offsets == list(range(0, UNIT, backend.alignment_bytes))
    assert backend.counters.write_bytes == UNIT
    backend.close()


CHILD = """
import resource, sys
from kvswap.disk import Slab, WriteBehind, create_backend
from kvswap.errors import DiskFullError
backend = create_backend(sys.argv[2], sys.argv[1], 8, on_notice=lambda text: None)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    backend.open(2 << 20)
except DiskFullError as error:
    print("open:", error)
file = backend.open(1 << 19)
try:
    backend.ensure_size(file, 2 << 20)
except DiskFullError as error:
    print("grow:", error)
writes = WriteBehind(backend, 1 << 18)
try:
    for offset in range(0, 4 << 20, 1 << 16):
        writes.submit(file, offset, writes.acquire(1 << 16))
    writes.flush()
except DiskFullError as error:
    print("write:", error, offset >= 1 << 20)
writes.close()
backend.close()
"""


@pytest.mark.parametrize("name", REAL)
def test_real_limit_in_the_middle_of_writing(name: str, tmp_path: Path) -> None:
    """The kernel itself refuses, by a limit on the size of files, so that no privilege is needed."""
    make(name, tmp_path).close()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), name], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["open", "grow", "write"]
    assert all("ulimit -f" in line for line in lines)
    assert lines[-1].endswith("True")
    assert list(tmp_path.iterdir()) == []
