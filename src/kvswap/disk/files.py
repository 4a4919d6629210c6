"""KV files of one run: created in a private folder on a real disk, and unlinked as soon as they are open.

The backends create their files here. A file from ``open_unlinked`` has no name, so it ends with its descriptor, also
after a kill; nothing here is durable. All functions may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from pathlib import Path

try:
    import resource
except ImportError:  # not a Unix system
    resource = None  # type: ignore[assignment]

from kvswap.disk.folders import ELSEWHERE, absolute
from kvswap.errors import DiskFullError, DiskWriteError, OpenFilesError, StorageError
from kvswap.units import format_bytes

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
"""File systems whose files are in memory, so KV files there would save nothing."""
OPEN_FILES = 65_536
"""Open files that a process is given where the system's own limit is higher."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
_DENIED = (errno.EPERM, errno.EACCES, errno.EROFS)
# glibc falls back to writing a byte per block, which a direct descriptor answers with EINVAL.
_NO_NAMELESS = (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT, errno.ENOSYS)
"""Errors of systems and file systems without files that never had a name, and some that the other way says better."""
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_MOUNTINFO = Path("/proc/self/mountinfo")


def prepare_dir(path: str | Path) -> Path:
    """Create the folder (mode 0700) and check that files in it would be on a disk and can be written.

    Returns the absolute path. Raises StorageError with what to do next.
    """
    folder = absolute(path)
    existing = next((parent for parent in (folder, *folder.parents) if os.path.exists(parent)), Path(folder.anchor))
    filesystem = filesystem_of(existing)
    if filesystem in IN_MEMORY:
        raise StorageError(
            f"KV folder {folder} is in memory ({filesystem}), so the cache would fill the memory it is meant to save",
            hint=f"{ELSEWHERE}, on a disk",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"KV folder {folder}: it or a part of its path is a file", hint=ELSEWHERE) from error
    except OSError as error:
        raise StorageError(f"KV folder {folder} cannot be created: {error.strerror}", hint=ELSEWHERE) from error
    try:
        os.close(_create_unlinked(folder, os.O_RDWR))
    except OSError as error:
        check_open_files(error)
        raise StorageError(f"KV folder {folder} cannot be written: {error.strerror}", hint=ELSEWHERE) from error
    return folder


def filesystem_of(path: str | Path) -> str:
    """Type of the file system that holds ``path``, such as ``ext4``; ``"unknown"`` where the system does not tell."""
    try:
        lines = _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "unknown"
    return match_mount(os.path.realpath(path), lines) or "unknown"


def match_mount(path: str, mountinfo: list[str]) -> str | None:
    """Type of the mount with the longest prefix of the absolute ``path``; of equal ones the last, which is on top."""
    found, longest = None, -1
    for line in mountinfo:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")[0]
        if len(fields) < 5 or not kind:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:
            found, longest = kind, len(mount)
    return found


def free_bytes(path: str | Path) -> int:
    """Bytes that this user may still write to the file system of ``path``. Raises StorageError."""
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        raise StorageError(f"free space of {path}: {error.strerror}", hint="check that the folder exists") from error


def check_free(path: str | Path, needed_bytes: int) -> None:
    """Raise StorageError unless ``needed_bytes`` can be written to the file system of ``path`` now."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise StorageError(
            f"full disk: {path} has {format_bytes(free)} free, {format_bytes(needed_bytes)} are needed",
            hint="free some space, choose another folder with kv_dir, or shorten the context",
        )


def open_unlinked(directory: str | Path, size_bytes: int, direct: bool) -> int:
    """A descriptor of a new nameless file of ``size_bytes``, with its space reserved. The caller closes it.

    Mode 0600, unlinked before any byte is in it. ``direct`` opens it with O_DIRECT where the system has that.
    Raises DiskFullError, or StorageError when it cannot be opened like that.
    """
    flags = os.O_RDWR | (getattr(os, "O_DIRECT", 0) if direct else 0)
    try:
        fd = _create_unlinked(Path(directory), flags)
    except OSError as error:
        if error.errno in _FULL:
            raise full_error(f"a file in {directory} cannot be created", error) from error
        check_open_files(error)
        what = " with direct I/O" if direct else ""
        raise StorageError(f"a file in {directory} cannot be opened{what}: {error.strerror}", hint=ELSEWHERE) from error
    try:
        ensure_size(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def ensure_size(fd: int, size_bytes: int) -> None:
    """Grow the file to at least ``size_bytes`` with its space reserved; it never gets smaller.

    Not for two threads at once on one file. Raises DiskFullError and leaves the file as it was.
    """
    old_bytes: int | None = None
    try:
        old_bytes = os.fstat(fd).st_size
        if size_bytes > old_bytes:
            _reserve(fd, old_bytes, size_bytes)
    except OSError as error:
        if old_bytes is None:
            raise DiskWriteError(f"a KV file cannot be looked at: {error.strerror}", hint=advice(error)) from error
        # A full disk can leave the file half grown: give that space back.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, old_bytes)
        what = f"a KV file cannot grow from {format_bytes(old_bytes)} to {format_bytes(size_bytes)}"
        if error.errno in _FULL:
            raise full_error(what, error) from error
        raise DiskWriteError(f"{what}: {error.strerror}", hint=advice(error)) from error


def raise_open_files() -> None:
    """Let this process open as many files as the system allows it: sessions of format version 2 have one a layer."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def check_open_files(error: OSError) -> None:
    """Raise OpenFilesError where ``error`` says that no more files can be opened."""
    if error.errno == errno.EMFILE and resource is not None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise OpenFilesError(
            f"this process may have {limit:,} files open and needs more",
            hint=f"close files or contexts that are not used, or raise the limit with ulimit -n {max(4096, 2 * limit)}",
        ) from error
    if error.errno == errno.ENFILE:
        raise OpenFilesError(
            "the system has as many files open as it allows", hint="close other programs, or raise fs.file-max"
        ) from error


def advice(error: OSError) -> str:
    """What to do about an error of a file system, as a hint."""
    if error.errno in _UNSUPPORTED:
        return f"this file system cannot do that: {ELSEWHERE}, on another file system"
    if error.errno in _DENIED:
        return f"see that this user may write there, or {ELSEWHERE}"
    return "check the disk (dmesg), then try again"


def is_full(error: OSError) -> bool:
    """Whether this error means that no space is left: disk, quota or file size limit."""
    return error.errno in _FULL


def full_error(what: str, error: OSError) -> DiskFullError:
    """The DiskFullError for ``what`` that failed with ENOSPC, EDQUOT or EFBIG."""
    hints = {
        errno.EDQUOT: "raise the disk quota or choose another folder with kv_dir",
        errno.EFBIG: "raise the file size limit (ulimit -f) or choose another file system with kv_dir",
    }
    hint = hints.get(error.errno or 0, "free some space or choose another folder with kv_dir")
    return DiskFullError(f"{what}: {error.strerror}", hint=hint)


def _reserve(fd: int, old_bytes: int, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, old_bytes, size_bytes - old_bytes)
            return
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    os.ftruncate(fd, size_bytes)


def _create_unlinked(folder: Path, flags: int) -> int:
    if hasattr(os, "O_TMPFILE"):  # never has a name, which a kill could leave behind
        try:
            return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
    name = folder / f".kv-{secrets.token_hex(12)}"
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise
    except OSError:
        # tmpfs and others create the name before they refuse O_DIRECT.
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    try:
        os.unlink(name)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):  # some file systems remove no file that is open
            os.unlink(name)
        raise
    return fd
