"""A private folder whose files are durable: every name is looked up in the open folder, and no link is followed.

Sessions keep their files here. Folders have mode 0700 and files 0600, whatever the umask. Files that others may write
to, and anything that is not a plain file, are refused. ``write``, ``append`` and ``replace`` return when the bytes are
on the disk (fdatasync); new names and renames are durable after ``sync``.

Some file systems keep no modes or owners (FAT, exFAT, NTFS, SMB): all files have those that were given when it was
mounted. What counts is that nobody else gets at a new file. So such a file system will do where it was mounted for this
user alone, and is refused otherwise.

One thread at a time. Raises StorageError, DiskFullError, DiskWriteError, DiskReadError. Apart from FileNotFoundError
and FileExistsError, no OSError gets out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvswap.disk.atomic import NO_FOLDER_SYNC, NO_LINKS
from kvswap.disk.files import advice, check_open_files, filesystem_of, full_error, is_full
from kvswap.disk.folders import ELSEWHERE
from kvswap.errors import DiskReadError, DiskWriteError, StorageError

_READ_BYTES = 1 << 24
_NO_MODES = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system that keeps no modes."""
_TRIES = 100
_PLAIN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in a file's place must not block


class PrivateFolder:
    """One open folder. ``written_bytes`` counts what went through ``write``, ``append`` and ``replace``."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            check_open_files(error)
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise StorageError(
                    f"folder {path}: it is a link or no folder", hint="give a folder of your own"
                ) from error
            gone = error.errno == errno.ENOENT
            hint = "another process has removed or moved it" if gone else advice(error)
            raise StorageError(f"folder {path} cannot be opened: {_words(error)}", hint=hint) from error
        self.path = path
        self.written_bytes = 0
        try:
            _check_owner(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    @classmethod
    def create(cls, path: Path) -> PrivateFolder:
        """Make the folder, which must not exist, with mode 0700. Raises FileExistsError when it does."""
        with translate_os_errors(f"folder {path} cannot be made"):
            os.mkdir(path, 0o700)
        try:
            _take_in(path, 0o700)
            return cls(path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(path)
            raise

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def in_place(self) -> bool:
        """Whether the folder still has its path: nobody has removed or moved it since it was opened."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    # ---- descriptors

    def open(self, name: str, *, write: bool = False, direct: bool = False) -> int:
        """A descriptor of an existing plain file, which the caller closes. Raises FileNotFoundError."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | _PLAIN | (getattr(os, "O_DIRECT", 0) if direct else 0)
        try:
            fd = os.open(name, flags, dir_fd=self._fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EISDIR):
                raise _read_error(f"{self.path / name} cannot be opened", error) from error
            why = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise StorageError(f"{self.path / name}: {why}", hint="a session has plain files of its owner") from error
        try:
            _check_owner(fd, self.path / name, plain=True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def make(self, name: str, *, direct: bool = False) -> int:
        """A descriptor of a new file with mode 0600, which the caller closes."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _PLAIN | (getattr(os, "O_DIRECT", 0) if direct else 0)
        with translate_os_errors(f"{self.path / name} cannot be made"):
            fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            _make_private(fd, self.path / name, 0o600)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._fd)
            raise
        return fd

    # ---- whole files

    def read(self, name: str, limit_bytes: int, *, offset_bytes: int = 0) -> bytes:
        """All bytes of a file from an offset on, at most ``limit_bytes`` of them. Raises FileNotFoundError."""
        fd = self.open(name)
        try:
            left = min(limit_bytes, max(0, _status(fd, self.path / name).st_size - offset_bytes))
            parts = []
            while left > 0:
                part = _pread(fd, min(left, _READ_BYTES), offset_bytes, self.path / name)
                if not part:
                    break
                parts.append(part)
                offset_bytes, left = offset_bytes + len(part), left - len(part)
            return b"".join(parts)
        finally:
            os.close(fd)

    def write(self, name: str, data: bytes) -> None:
        """A new durable file; one of that name that is left over from before is replaced."""
        self.remove(name)
        fd = self.make(name)
        with self._closing(fd, name):
            self._write_all(fd, data, 0)

    def append(self, name: str, offset_bytes: int, data: bytes) -> None:
        """Write durably at an offset of a file, which is made where it is absent; what was behind is cut off."""
        try:
            fd = self.open(name, write=True)
        except FileNotFoundError:
            fd = self.make(name)
        with self._closing(fd, name):
            os.ftruncate(fd, offset_bytes)
            self._write_all(fd, data, offset_bytes)

    def replace(self, name: str, data: bytes) -> None:
        """Put new contents in a file's place in one move, durably: it has the old or the new ones, never a part."""
        self.write(f"{name}.new", data)
        with translate_os_errors(f"{self.path / name} cannot be replaced"):
            os.rename(f"{name}.new", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self.sync()

    def truncate(self, name: str, size_bytes: int) -> None:
        """Cut a file down to ``size_bytes``, to give space back; it is not made longer."""
        fd = self.open(name, write=True)
        with self._closing(fd, name, durable=False):
            if os.fstat(fd).st_size > size_bytes:
                os.ftruncate(fd, size_bytes)

    def overwrite(self, name: str) -> int:
        """Put zeros over all of a plain file that has no second name, durably; how many bytes."""
        fd = self.open(name, write=True)
        with self._closing(fd, name):
            status = os.fstat(fd)
            size_bytes = status.st_size if status.st_nlink == 1 else 0
            for offset_bytes in range(0, size_bytes, _READ_BYTES):
                self._write_all(fd, bytes(min(_READ_BYTES, size_bytes - offset_bytes)), offset_bytes)
            return size_bytes

    def sync(self) -> None:
        """Make names durable, where the file system lets its user do that."""
        with translate_os_errors(f"folder {self.path} cannot be made durable"):
            try:
                os.fsync(self._fd)
            except OSError as error:
                if error.errno not in NO_FOLDER_SYNC:
                    raise

    # ---- names

    def names(self) -> list[str]:
        """All names in the folder, sorted."""
        with translate_read_errors(f"folder {self.path} cannot be read"):
            return sorted(os.listdir(self._fd))

    def stat(self, name: str) -> os.stat_result:
        """Of the name itself, not of what a link leads to. Raises FileNotFoundError."""
        with translate_read_errors(f"{self.path / name} cannot be looked at"):
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove a name; nothing when it is absent."""
        with contextlib.suppress(FileNotFoundError), translate_os_errors(f"{self.path / name} cannot be removed"):
            os.unlink(name, dir_fd=self._fd)

    def link_from(self, source: PrivateFolder, name: str) -> bool:
        """Give a file of another folder the same name here as well; False where the file system has no hard links."""
        try:
            os.link(name, name, src_dir_fd=source._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        except OSError as error:
            if error.errno in NO_LINKS:
                return False
            raise _write_error(f"{self.path / name} cannot be linked", error) from error
        return True

    def copy_from(self, source: PrivateFolder, name: str) -> None:
        """Copy a file of another folder, durably."""
        to = self.make(name)
        with self._closing(to, name):
            offset_bytes = 0
            while part := source.read(name, _READ_BYTES, offset_bytes=offset_bytes):
                self._write_all(to, part, offset_bytes)
                offset_bytes += len(part)

    # ---- details

    @contextmanager
    def _closing(self, fd: int, name: str, *, durable: bool = True) -> Iterator[None]:
        """Close at the end, after fdatasync; errors of both become ours."""
        try:
            with translate_os_errors(f"write of {self.path / name}"):
                yield
                if durable:
                    os.fdatasync(fd)
        finally:
            os.close(fd)

    def _write_all(self, fd: int, data: bytes, offset_bytes: int) -> None:
        view = memoryview(data)
        while view:
            wrote = os.pwrite(fd, view, offset_bytes)
            if wrote == 0:
                raise OSError(errno.EIO, "no byte was taken")
            offset_bytes, view = offset_bytes + wrote, view[wrote:]
            self.written_bytes += wrote


# ---- owners and modes


def _take_in(path: Path, mode: int) -> None:
    """Make a new folder private."""
    with translate_os_errors(f"folder {path} cannot be opened"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _make_private(fd, path, mode)
    finally:
        os.close(fd)


def _make_private(fd: int, path: Path, mode: int) -> None:
    """See that a new file or folder is this user's alone."""
    with translate_os_errors(f"the mode of {path} cannot be set"):
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno not in _NO_MODES:
                raise
    status, user = _status(fd, path), os.geteuid()
    if status.st_uid != user or status.st_mode & 0o077:
        raise StorageError(
            f"others may get at what is stored in {path.parent}: files made there belong to user {status.st_uid} and "
            f"have mode {stat.S_IMODE(status.st_mode):04o}, which its file system ({filesystem_of(path.parent)}) "
            "does not let kvswap change",
            hint=f"mount it with uid={user},umask=077, or {ELSEWHERE}",
        )


def _check_owner(fd: int, path: Path, *, plain: bool = False) -> None:
    """See that nobody else can have written a file or folder that exists."""
    status, user = _status(fd, path), os.geteuid()
    if plain and not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{path} is no plain file", hint="a session has plain files of its owner")
    if status.st_uid == user and not status.st_mode & 0o022:
        return
    raise StorageError(
        f"{path} belongs to another user or may be written by others "
        f"(it is user {status.st_uid}'s with mode {stat.S_IMODE(status.st_mode):04o}; this is user {user})",
        hint="use a folder of your own; a file system without owners and modes has to be mounted for you alone "
        f"(uid={user},umask=077)",
    )


# ---- errors


def _status(fd: int, path: Path) -> os.stat_result:
    with translate_read_errors(f"{path} cannot be looked at"):
        return os.fstat(fd)


def _pread(fd: int, count_bytes: int, offset_bytes: int, path: Path) -> bytes:
    try:
        return os.pread(fd, count_bytes, offset_bytes)
    except OSError as error:
        raise _read_error(f"read of {path}", error) from error


@contextmanager
def translate_os_errors(what: str) -> Iterator[None]:
    """Raise DiskWriteError or DiskFullError for an OSError in the block; ``what`` says what failed.

    FileNotFoundError and FileExistsError pass through, because callers decide what they mean.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise _write_error(what, error) from error


@contextmanager
def translate_read_errors(what: str) -> Iterator[None]:
    """As ``translate_os_errors``, with DiskReadError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise _read_error(what, error) from error


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that path. Raises DiskReadError where nobody can tell."""
    with translate_read_errors(f"folder {path} cannot be looked at"):
        return path.is_dir()


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it; another process may be removing it too. Raises DiskWriteError."""
    with translate_os_errors(f"folder {path} cannot be removed"):
        for _ in range(_TRIES):
            try:
                return shutil.rmtree(path)
            except FileNotFoundError:
                if not os.path.lexists(path):
                    return
        raise OSError(errno.EBUSY, f"{os.strerror(errno.EBUSY)}: its contents change")


def _read_error(what: str, error: OSError) -> DiskReadError:
    check_open_files(error)
    return DiskReadError(f"{what}: {_words(error)}", hint=advice(error))


def _write_error(what: str, error: OSError) -> DiskWriteError:
    if is_full(error):
        return full_error(what, error)
    check_open_files(error)
    return DiskWriteError(f"{what}: {_words(error)}", hint=advice(error))


def _words(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"
