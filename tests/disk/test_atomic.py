"""A file or folder has its old contents or the new ones, also after a failure in the middle and a power failure."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvswap.disk import atomic
from kvswap.disk.atomic import (
    atomic_file,
    atomic_folder,
    atomic_write,
    remove_leftovers,
    sync_folder,
    try_atomic_file,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    return file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is made durable or renamed, in order."""
    found: list[tuple[str, str]] = []
    fsync, replace, rename, link = os.fsync, os.replace, os.rename, os.link

    def name(fd: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        return "temporary" if path.name.endswith(".partial") else path.name

    def synced(fd: int) -> None:
        found.append(("fsync", name(fd)))
        fsync(fd)

    def moved(how: str, move):  # type: ignore[no-untyped-def]
        def call(source: Path, to: Path) -> None:
            found.append((how, Path(to).name))
            move(source, to)

        return call

    monkeypatch.setattr(os, "fsync", synced)
    for how, move in (("replace", replace), ("rename", rename), ("link", link)):
        monkeypatch.setattr(os, how, moved(how, move))
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_contents_are_replaced(target: Path, umask: None) -> None:
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    with atomic_file(target, mode=0o600) as file:
        file.write(b"private")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert names(target.parent) == ["file"]


def test_a_file_is_durable_before_its_name_and_its_name_before_the_return(
    target: Path, calls: list[tuple[str, str]]
) -> None:
    atomic_write(target, b"new")
    assert calls == [("fsync", "temporary"), ("replace", "file"), ("fsync", target.parent.name)]


def test_a_library_may_write_by_name_and_replace_the_file(target: Path, calls: list[tuple[str, str]]) -> None:
    with atomic_file(target) as file:
        Path(file.name).unlink()
        Path(file.name).write_bytes(b"by name")
    assert target.read_bytes() == b"by name"
    assert calls[0] == ("fsync", "temporary")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_file(target) as file:
        file.write(b"half")
        file.flush()
        raise error
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file_and_nothing_else(
    target: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "the disk died")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="the disk died"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["file"]


def test_a_link_at_the_temporary_name_is_not_followed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = target.with_name("victim")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "guessed")
    trap = target.with_name(".file.guessed.partial")
    trap.symlink_to(victim)
    for write in (lambda: atomic_write(target, b"new"), lambda: try_atomic_file(target)):
        with pytest.raises(FileExistsError):
            write()
    assert not victim.exists()
    assert target.read_bytes() == b"old"
    assert trap.is_symlink()  # it is not ours, so it is not removed


def test_temporary_names_differ_and_do_not_grow(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    atomic_write(target, b"new")
    assert names(tmp_path) == [target.name]
    assert len({atomic.temporary_path(target) for _ in range(50)}) == 50


def test_two_writers_at_once_leave_one_whole_file(target: Path) -> None:
    contents = [bytes([letter]) * 100_000 for letter in b"ab"]
    start = threading.Barrier(2)

    def write(data: bytes) -> None:
        start.wait()
        for _ in range(20):
            atomic_write(target, data)

    writers = [threading.Thread(target=write, args=(data,)) for data in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert target.read_bytes() in (b"old", *contents)
    for writer in writers:
        writer.join()
    assert target.read_bytes() in contents
    assert names(target.parent) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_taken_name_is_left_alone_without_replace(target: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*args: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FileExistsError), atomic_file(target, replace=False) as file:
        file.write(b"new")
    assert target.read_bytes() == b"old"
    with atomic_file(target.with_name("other"), replace=False) as file:
        file.write(b"new")
    assert target.with_name("other").read_bytes() == b"new"
    assert names(target.parent) == ["file", "other"]


def test_a_name_without_replace_is_durable(target: Path, calls: list[tuple[str, str]]) -> None:
    with atomic_file(target.with_name("other"), replace=False):
        pass
    assert calls == [("fsync", "temporary"), ("link", "other"), ("fsync", target.parent.name)]


def test_a_folder_appears_whole_and_durable(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"1")
        assert names(tmp_path) == [folder.name] != ["folder"]
    assert names(tmp_path / "folder") == ["a"]
    expected = [("fsync", "a"), ("fsync", "temporary"), ("rename", "folder"), ("fsync", tmp_path.name)]
    assert calls == expected


def test_a_folder_is_removed_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_full_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "theirs").touch()
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "ours").touch()
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["theirs"]


def test_a_folder_behind_a_link_is_made_durable(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link" / "file", b"new")
    assert names(tmp_path / "real") == ["file"]


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    for code in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES):  # noqa: B007 - refuse() reads it
        sync_folder(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match=r"Input/output"):
        sync_folder(tmp_path)


def test_trying_leaves_nothing(tmp_path: Path) -> None:
    try_atomic_file(tmp_path / "file")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        try_atomic_file(tmp_path / "absent" / "file")


# ---- what a kill leaves


KILLED = """
import sys, time
from pathlib import Path
from kvswap.disk.atomic import atomic_file, atomic_folder
make = {"file": atomic_file, "folder": atomic_folder}[sys.argv[1]]
with make(Path(sys.argv[2])) as made:
    if sys.argv[1] == "folder":
        (made / "weights").write_bytes(b"half")
        (made / "inside").mkdir()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_left_is_removed_by_the_next_writer_and_what_is_held_is_not(kind: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, kind, str(tmp_path / "model")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        (partial,) = tmp_path.iterdir()
        if kind == "file":
            os.utime(partial, (0, 0))
        atomic_write(tmp_path / "other", b"new")
        assert partial.exists()  # its writer is still there
        writer.kill()
    assert partial.exists()
    others = [tmp_path / ".notes.partial", tmp_path / ".x.0123456789abcdef.partial.txt"]
    for path in others:
        path.write_bytes(b"a user's")
    with atomic_folder(tmp_path / "second"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "other", tmp_path / "second", *others])


def test_a_file_that_a_library_has_just_put_in_place_of_a_held_one_is_kept(target: Path) -> None:
    with atomic_file(target) as file:
        Path(file.name).unlink()
        Path(file.name).write_bytes(b"by name")
        remove_leftovers(target.parent)
    assert target.read_bytes() == b"by name"


def test_without_locks_nothing_is_removed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = target.with_name(".model.0123456789abcdef.partial")
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        atomic_write(target, b"new")
        assert left.exists() and target.read_bytes() == b"new"
    remove_leftovers(target.parent)
    assert not left.exists()
