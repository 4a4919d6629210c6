"""Slabs, folders and nameless files."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvswap.disk import Slab, check_free, free_bytes, prepare_dir, probe_direct
from kvswap.disk.files import match_mount, open_unlinked
from kvswap.errors import StorageError
from tests.helpers.system import has_direct_io


def rss_anon_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_slab_is_aligned_and_rounded() -> None:
    slab = Slab(5000)
    assert slab.address % mmap.PAGESIZE == 0
    assert slab.nbytes == slab.array.nbytes == 2 * mmap.PAGESIZE
    assert not slab.array.any()
    slab.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shrink_gives_memory_back() -> None:
    slab = Slab(64 << 20)
    slab.array[:] = 1
    before = rss_anon_bytes()
    slab.shrink(8 << 20)
    assert before - rss_anon_bytes() > 50 << 20
    assert slab.nbytes == 8 << 20
    assert (slab.array[: 8 << 20] == 1).all()
    slab.array[-1] = 1  # still mapped
    with pytest.raises(ValueError, match="shrink"):
        slab.shrink(9 << 20)
    slab.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slab_that_can_grow_takes_no_more_than_is_used() -> None:
    slab = Slab(3 << 20, 64 << 20)
    assert (slab.nbytes, slab.array.nbytes) == (3 << 20, 64 << 20)
    before = rss_anon_bytes()
    for size in (3 << 20, 5 << 20, 9 << 20):
        slab.grow(size)
        slab.array[:size] = 1
        assert size - (1 << 19) <= rss_anon_bytes() - before <= size + (1 << 19)
    slab.shrink(1 << 20)
    assert rss_anon_bytes() - before <= (1 << 20) + (1 << 19)
    with pytest.raises(ValueError, match="grow"):
        slab.grow(65 << 20)
    slab.close()


def vm_flags(address: int) -> list[str]:
    """What the kernel notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(each, 16) for each in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slab_asks_for_huge_pages_and_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags() -> list[str]:
        slab = Slab(4 << 20)
        slab.array[:] = 1
        found = vm_flags(slab.address)
        slab.close()
        return found

    asked = Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert ("hg" in flags()) == asked
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # a kernel that does not know it
    assert "hg" not in flags()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")  # a system that does not
    assert "hg" not in flags()


def test_close_leaves_views_alive() -> None:
    slab = Slab(4096)
    view = slab.array[:10]
    view[:] = 3
    slab.close()
    slab.close()
    assert (view == 3).all()


def test_empty_slab_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Slab(0)


def test_prepare_dir_makes_a_private_folder(tmp_path: Path) -> None:
    folder = prepare_dir(tmp_path / "a" / "b")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert prepare_dir(folder) == folder
    assert list(folder.iterdir()) == []


def test_prepare_dir_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="is a file"):
            prepare_dir(path)


def test_prepare_dir_refuses_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StorageError, match=r"cannot be written: Permission denied.*kv_dir"):
        prepare_dir(tmp_path)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_memory_file_system_is_refused() -> None:
    with pytest.raises(StorageError, match=r"in memory \(tmpfs\)"):
        prepare_dir(f"/dev/shm/kvswap-test-{os.getpid()}")
    assert not os.path.exists(f"/dev/shm/kvswap-test-{os.getpid()}")


def test_mount_with_the_longest_prefix_wins() -> None:
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/a rw",
        "2 1 0:5 / /mnt/a\\040b rw shared:1 - tmpfs tmpfs rw",
        "3 1 0:6 / /mnt/a rw - xfs /dev/b rw",
        "4 1 0:7 / /mnt/a rw - btrfs /dev/c rw",
        "broken",
    ]
    assert match_mount("/mnt/a b/c", lines) == "tmpfs"
    assert match_mount("/mnt/a/c", lines) == "btrfs"
    assert match_mount("/mnt/abc", lines) == "ext4"
    assert match_mount("/", []) is None


def test_free_space(tmp_path: Path) -> None:
    check_free(tmp_path, 1)
    with pytest.raises(StorageError, match="full disk"):
        check_free(tmp_path, free_bytes(tmp_path) * 2 + (1 << 40))
    with pytest.raises(StorageError, match="free space"):
        free_bytes(tmp_path / "absent")


def test_probe_leaves_nothing_and_never_raises(tmp_path: Path) -> None:
    probe = probe_direct(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert probe.ok is has_direct_io(tmp_path)
    assert not probe.ok or probe.alignment_bytes in (512, 1024, 2048, 4096)
    absent = probe_direct(tmp_path / "absent")
    assert not absent.ok
    assert "cannot be opened" in absent.reason


def test_probe_tries_when_the_kernel_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("no direct I/O here")
    monkeypatch.setattr("kvswap.disk.direct._stated_alignment", lambda fd: [])
    assert probe_direct(tmp_path).ok
    monkeypatch.setattr("kvswap.disk.direct._try", lambda fd, alignment: "EINVAL")
    assert "direct write and read of 4096 bytes failed: EINVAL" in probe_direct(tmp_path).reason
    monkeypatch.setattr("kvswap.disk.direct._stated_alignment", lambda fd: [(0, 0)])
    assert "no direct I/O" in probe_direct(tmp_path).reason


def test_file_is_private_reserved_and_nameless(tmp_path: Path) -> None:
    fd = open_unlinked(tmp_path, 1 << 20, direct=False)
    facts = os.fstat(fd)
    os.close(fd)
    assert list(tmp_path.iterdir()) == []
    assert (facts.st_mode & 0o777, facts.st_nlink, facts.st_size) == (0o600, 0, 1 << 20)
    assert facts.st_blocks * 512 >= 1 << 20


def test_file_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    fd = open_unlinked(tmp_path, 1 << 20, direct=False)
    assert os.fstat(fd).st_size == 1 << 20
    os.close(fd)


CHILD = """
import sys, time
from kvswap.disk import create_backend
backend = create_backend("auto", sys.argv[1], 8, on_notice=lambda text: None)
file = backend.open(1 << 20)
print("open", flush=True)
time.sleep(60)
"""


def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        child.kill()
    assert list(tmp_path.iterdir()) == []


def test_view_of_a_slab_is_numpy() -> None:
    slab = Slab(4096)
    assert slab.array.dtype == np.uint8
    assert slab.array.ctypes.data == slab.address
    slab.close()


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a system without files that never had a name")
def test_a_nameless_file_never_had_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a kill between its creation and its removal leaves it behind."""
    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_TMPFILE))
    except OSError:
        pytest.skip("a file system without files that never had a name")
    monkeypatch.setattr(os, "unlink", lambda *_: pytest.fail("it had a name"))
    fd = open_unlinked(tmp_path, 4096, direct=False)
    try:
        assert os.fstat(fd).st_size == 4096 and os.fstat(fd).st_nlink == 0 and os.listdir(tmp_path) == []
    finally:
        os.close(fd)
