"""Two locks: one writer a session, and a lock on the folder of all sessions while a session is created.

Both are held by an open descriptor (flock), so the system releases them when the process ends in any way. The file
``lock`` of a session also says who holds it, for error messages. Readers take no lock: committed bytes never change
under them, and they notice when a file is removed.

A new session is built in a folder with a temporary name and renamed when it is complete. An interruption leaves the
temporary folder, which ``kvswap sessions prune`` removes; the creation lock keeps prune away from one in use.

A file system without locks is refused. Two programs could write to one session there, and no other kind of lock ends
with its holder: what a lock file says outlives a kill. Sessions can be read there, because nobody can be writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvswap.disk.atomic import sync_folder
from kvswap.disk.files import advice, filesystem_of
from kvswap.disk.folders import ELSEWHERE
from kvswap.disk.private_folder import PrivateFolder, remove_tree, translate_os_errors
from kvswap.errors import KVSwapError, SessionError, StorageError
from kvswap.sessions import encrypted_names

NAME = "lock"
TEMPORARY_PREFIX = ".new-"
_OWNER_BYTES = 4096
_TRIES, _PAUSE_S = 4, 0.02
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system that has no locks."""


# ---- one writer a session


def acquire(folder: PrivateFolder, label: str) -> int:
    """Take the writer's lock; returns the descriptor that holds it.

    Raises SessionError that names the holder, or where the folder was removed or moved since it was opened, and
    StorageError where the file system has no locks.
    """
    fd = _open_file(folder, label)
    try:
        _lock(fd)
        with translate_os_errors(f"{label} cannot be locked"):
            there = folder.in_place() and os.fstat(fd).st_nlink > 0
        if not there:
            raise removed(label)
        _write_owner(fd)
        return fd
    except OSError as error:
        try:
            holder = owner(folder)
        finally:
            os.close(fd)
        if error.errno not in _HELD:
            raise _cannot_lock(label, folder.path, error) from error
        raise SessionError(
            f"{label} is in use by {holder}", hint="end that, or use a session of another name (kvswap sessions fork)"
        ) from error
    except BaseException:
        os.close(fd)
        raise


def release(fd: int) -> None:
    """Release the writer's lock."""
    try:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def is_locked(folder: PrivateFolder) -> bool:
    """Whether a running process has the session open for writing. Raises StorageError where nobody can tell."""
    try:
        fd = folder.open(NAME)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:  # nobody can have opened it for writing
            return False
        if error.errno not in _HELD:
            raise _cannot_lock(f"session {folder.path.name}", folder.path, error) from error
        return True
    finally:
        os.close(fd)


def owner(folder: PrivateFolder) -> str:
    """Who holds the writer's lock, in words."""
    try:
        found = json.loads(folder.read(NAME, _OWNER_BYTES))
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(found["since"])))
        return (
            f"process {int(found['pid'])} ({str(found['command'])[:40]!r} on {str(found['host'])[:60]}) since {since}"
        )
    except (KVSwapError, OSError, ValueError, KeyError, TypeError):
        return "another process"


def _open_file(folder: PrivateFolder, label: str) -> int:
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            return folder.open(NAME, write=True)
        try:
            return folder.make(NAME)
        except FileExistsError:  # another process has just made it
            continue
        except FileNotFoundError as error:
            raise removed(label) from error
    raise removed(label)


def removed(label: str) -> SessionError:
    """The error for a session whose folder has gone while it was opened or read."""
    return SessionError(f"{label} was removed by another process", hint="see: kvswap sessions list")


def _lock(fd: int) -> None:
    """Try several times, because ``is_locked`` in another process holds the lock for an instant."""
    for _ in range(_TRIES - 1):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                raise
            time.sleep(_PAUSE_S)
    return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _cannot_lock(what: str, path: Path, error: OSError) -> StorageError:
    words = f"{what} cannot be locked: {errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"
    if error.errno not in _NO_LOCKS:
        return StorageError(words, hint=advice(error))
    return StorageError(
        f"{words}; the file system of {path} ({filesystem_of(path)}) has no locks, so two programs could write to one "
        "session at once",
        hint=f"mount it with locks, or {ELSEWHERE}, on a file system that has them",
    )


def _write_owner(fd: int) -> None:
    """Write who we are. A failure is ignored, since only messages use it."""
    command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    ours = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time()), "command": command}
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(ours).encode(), 0)


# ---- creation of a session


def temporary_path(path: Path) -> Path:
    """A temporary name beside a session's folder."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")


@contextmanager
def creation_lock(root: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Hold the lock of ``root``, the folder of all sessions: shared while creating one, exclusive while pruning."""
    with translate_os_errors(f"folder {root} cannot be locked"):
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except OSError as error:
            raise _cannot_lock(f"folder {root}", root, error) from error
        yield
    finally:
        os.close(fd)


@contextmanager
def new_session_folder(path: Path, *, encrypted: bool | None = None) -> Iterator[PrivateFolder]:
    """A folder with a temporary name to build a session in; it gets the name ``path``, durably, when the block ends.

    An exception in the block removes it. Raises SessionError where the name is taken, or where it is that of an
    encrypted session and this one is not; None is not known yet.
    """
    if os.path.lexists(path):
        raise SessionError(f"session {path.name} exists already", hint="choose another name")
    with creation_lock(path.parent):
        was_known = encrypted_names.is_known(path)
        if encrypted is not None:
            encrypted_names.keep(path, encrypted=encrypted)
        temporary = temporary_path(path)
        folder = PrivateFolder.create(temporary)
        try:
            yield folder
            _move_into_place(temporary, path)
        except BaseException:
            with contextlib.suppress(KVSwapError):
                remove_tree(temporary)
            if not was_known:
                with contextlib.suppress(KVSwapError):
                    encrypted_names.forget(path)
            raise
        finally:
            folder.close()


def _move_into_place(temporary: Path, path: Path) -> None:
    with translate_os_errors(f"session {path.name} cannot get its name"):
        os.rename(temporary, path)
        sync_folder(path.parent)
