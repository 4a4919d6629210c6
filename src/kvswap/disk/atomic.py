"""Files and folders that appear whole or not at all, and stay after a power failure.

Everything in kvswap that replaces a file uses these functions. A session's manifest is the one exception: it is
replaced below an open folder, by ``PrivateFolder.replace``. The functions here write a temporary file in the same
folder, sync it (fsync), rename it, and sync the folder. A failure removes the temporary file and leaves the old file
as it was. The temporary name is random and created with O_EXCL: two writers never share it, and a link in its place is
not followed.

A kill can leave a hidden file or folder that ends in ``.partial``, which nothing reads. The next one who writes to the
same folder removes it (``remove_leftovers``). A writer holds a lock (flock) on what it makes, which ends with its
process. So only what nobody holds is removed; where the file system has no locks, nothing is.

Any thread, any process; the last writer wins. The functions raise OSError, and the caller says what the file was for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from kvswap.errors import on_error

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS)
"""Errors of a file system that has no hard links, or no more of them."""
_PARTIAL = re.compile(r"\..{1,40}\.[0-9a-f]{16}\.partial", re.DOTALL)
_FORGOTTEN_S = 3600.0
NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that cannot sync folders: those of other machines, which keep the names themselves."""


def atomic_write(target: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write ``data`` to ``target``, which is replaced if it exists. Raises OSError."""
    with atomic_file(target, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_file(target: Path, *, replace: bool = True, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A new binary file that gets the name ``target`` when the block ends without an error.

    Libraries that want a path can write to ``file.name`` instead of ``file``; they may replace that file.

    Parameters
    ----------
    replace
        False: a file of that name is left alone, and FileExistsError is raised at the end.
    mode
        Permissions of the file, less the umask.

    Raises
    ------
    OSError
    """
    remove_leftovers(target.parent)
    temporary = temporary_path(target)
    file = open(temporary, "xb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, mode))  # noqa: SIM115
    with on_error(lambda: temporary.unlink(missing_ok=True)), closing(file), _held(os.dup(file.fileno())):
        with file:
            yield file
        sync(temporary)
        if replace:
            os.replace(temporary, target)
        else:
            _link(temporary, target)
    sync_folder(target.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that gets the name ``target`` when the block ends without an error. Its files lie flat in it.

    Raises FileExistsError when there is a folder of that name with something in it, which is left alone, and OSError.
    """
    remove_leftovers(target.parent)
    temporary = temporary_path(target)
    os.mkdir(temporary)
    with on_error(lambda: shutil.rmtree(temporary, ignore_errors=True)), _held(os.open(temporary, os.O_RDONLY)):
        os.stat(temporary)  # before it was held, somebody could take it for a leftover
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync_folder(temporary)
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            raise
    sync_folder(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of ``atomic_file`` and ``atomic_folder`` in a folder. Raises nothing.

    A file has to be an hour old as well, because a library may have put one that nobody holds in its place.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if _PARTIAL.fullmatch(path.name):
                with suppress(OSError):
                    _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            shutil.rmtree(path)
        elif time.time() - status.st_mtime > _FORGOTTEN_S:
            path.unlink()
    finally:
        os.close(fd)


@contextmanager
def _held(fd: int) -> Iterator[None]:
    """Lock what a descriptor has open, where that can be done, and close it at the end."""
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_atomic_file(target: Path) -> None:
    """Find out, without a trace, whether ``atomic_file`` could begin. Raises OSError."""
    temporary = temporary_path(target)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    temporary.unlink()


def temporary_path(target: Path) -> Path:
    """A hidden name beside ``target`` that nobody can guess."""
    # Only a part of the name, so that a long name does not become too long.
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.partial")


def sync(path: Path) -> None:
    """Wait until the bytes of a file are on the disk. Raises OSError."""
    _fsync(path, os.O_NOFOLLOW)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where that can be done. Raises OSError."""
    try:
        _fsync(path, os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (*NO_FOLDER_SYNC, errno.EACCES):  # a folder that may be written but not read
            raise


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link(temporary: Path, target: Path) -> None:
    """Give a file a second name that is not taken. Raises FileExistsError."""
    try:
        os.link(temporary, target)
        os.unlink(temporary)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(target):  # without hard links nothing better can be asked
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.rename(temporary, target)
