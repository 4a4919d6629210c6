"""One writer a session: a lock that the system gives back when its holder ends, however it ends.

The file says who holds it, for messages; only the lock itself counts. Readers take none: what is committed is never
changed under them, and what is taken out of it they notice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from kvswap.disk.private import PrivateFolder
from kvswap.errors import SessionError

NAME = "lock"
_OWNER_BYTES = 4096
_TRIES, _PAUSE_S = 4, 0.02


def acquire(folder: PrivateFolder, what: str) -> int:
    """Take the writer's lock; returns the descriptor that holds it. Raises SessionError that names the holder."""
    try:
        fd = folder.open(NAME, write=True)
    except FileNotFoundError:
        fd = folder.make(NAME)
    try:
        _lock(fd)
    except OSError as error:
        holder = owner(folder)
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise SessionError(f"{what} cannot be locked: {error.strerror}", hint="use another folder") from error
        raise SessionError(
            f"{what} is in use by {holder}", hint="end that, or use a session of another name (kvswap sessions fork)"
        ) from error
    _sign(fd)
    return fd


def _sign(fd: int) -> None:
    """Write who we are, for others' messages; a disk that refuses that little will be heard of soon enough."""
    command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    held = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time()), "command": command}
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(held).encode(), 0)


def _lock(fd: int) -> None:
    """Try for a moment: who only asks whether the lock is held holds it for an instant."""
    for _ in range(_TRIES - 1):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_PAUSE_S)
    return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def release(fd: int) -> None:
    """Give the lock back."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
    os.close(fd)


def held(folder: PrivateFolder) -> bool:
    """Whether a living process has the lock now."""
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
    """Who holds the lock, for people."""
    try:
        found = json.loads(folder.read(NAME, _OWNER_BYTES))
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(found["since"])))
        return (
            f"process {int(found['pid'])} ({str(found['command'])[:40]!r} on {str(found['host'])[:60]}) since {since}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
