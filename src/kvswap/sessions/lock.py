"""Two locks: one writer a session, and a lock on the folder of all sessions while a session is created.

Both are held by an open descriptor (flock), so the system releases them when the process ends in any way. The file
``lock`` of a session also says who holds it, for error messages. Readers take no lock: committed bytes never change
under them, and they notice when a file is removed.

A new session is built in a folder with a temporary name and renamed when it is complete. An interruption leaves the
temporary folder, which ``kvswap sessions prune`` removes; the creation lock keeps prune away from one in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvswap.disk.atomic import sync_folder
from kvswap.disk.private_folder import PrivateFolder, translate_os_errors
from kvswap.errors import SessionError

NAME = "lock"
TEMPORARY_PREFIX = ".new-"
_OWNER_BYTES = 4096
_TRIES, _PAUSE_S = 4, 0.02


# ---- one writer a session


def acquire(folder: PrivateFolder, label: str) -> int:
    """Take the writer's lock; returns the descriptor that holds it.

    Raises SessionError that names the holder, or where the folder was removed or moved since it was opened.
    """
    fd = _open_file(folder, label)
    try:
        _lock(fd)
    except OSError as error:
        holder = owner(folder)
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise SessionError(f"{label} cannot be locked: {error.strerror}", hint="use another folder") from error
        raise SessionError(
            f"{label} is in use by {holder}", hint="end that, or use a session of another name (kvswap sessions fork)"
        ) from error
    if not folder.in_place() or os.fstat(fd).st_nlink == 0:
        os.close(fd)
        raise _removed(label)
    _write_owner(fd)
    return fd


def release(fd: int) -> None:
    """Release the writer's lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
    os.close(fd)


def is_locked(folder: PrivateFolder) -> bool:
    """Whether a running process has the session open for writing."""
    try:
        fd = folder.open(NAME)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
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
    except (OSError, ValueError, KeyError, TypeError):
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
            raise _removed(label) from error
    raise _removed(label)


def _removed(label: str) -> SessionError:
    return SessionError(f"{label} was removed by another process", hint="see: kvswap sessions list")


def _lock(fd: int) -> None:
    """Try several times, because ``is_locked`` in another process holds the lock for an instant."""
    for _ in range(_TRIES - 1):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_PAUSE_S)
    return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


@contextmanager
def new_session_folder(path: Path) -> Iterator[PrivateFolder]:
    """A folder with a temporary name to build a session in; it gets the name ``path``, durably, when the block ends.

    An exception in the block removes it. Raises SessionError where the name is taken.
    """
    if os.path.lexists(path):
        raise SessionError(f"session {path.name} exists already", hint="choose another name")
    with creation_lock(path.parent):
        temporary = temporary_path(path)
        folder = PrivateFolder.create(temporary)
        try:
            yield folder
            _move_into_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            folder.close()


def _move_into_place(temporary: Path, path: Path) -> None:
    with translate_os_errors(f"session {path.name} cannot get its name"):
        os.rename(temporary, path)
        sync_folder(path.parent)
