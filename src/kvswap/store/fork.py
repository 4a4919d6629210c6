"""A second session that begins as the first one is now: the same files under a second name, without copying them."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvswap.disk.private import PrivateFolder
from kvswap.errors import DiskWriteError, SessionError
from kvswap.store.folder import SessionFolder
from kvswap.store.manifest import encode
from kvswap.store.reader import MANIFEST

PARTIAL = ".new-"


def fork(source: SessionFolder, path: Path) -> int:
    """Make the session ``path`` from what is committed in ``source``, whose lock must be held; bytes of new disk.

    The fork appears whole or not at all. Raises SessionError when the name is taken, DiskWriteError, DiskFullError.
    """
    if os.path.lexists(path):
        raise SessionError(f"session {path.name} exists already", hint="choose another name")
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    with making(path.parent):
        return _fork(source, partial, path)


@contextmanager
def making(root: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold ``root`` while a session is made in it, lest it is taken for a leftover; ``alone``, to remove those."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def _fork(source: SessionFolder, partial: Path, path: Path) -> int:
    target = PrivateFolder.create(partial)
    try:
        for name in source.manifest.files():
            if not target.link_from(source.folder, name):
                target.copy_from(source.folder, name)
        now = int(time.time())
        segments = tuple(replace(segment, owned=False) for segment in source.manifest.segments)
        manifest = replace(source.manifest, created=now, used=now, segments=segments)
        manifest = replace(manifest, written_bytes=target.written_bytes)
        target.sync()
        target.replace(MANIFEST, encode(manifest))
        move_into_place(partial, path)
        return target.written_bytes
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        target.close()


def move_into_place(partial: Path, path: Path) -> None:
    """Give a complete session its name, durably."""
    try:
        os.rename(partial, path)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise DiskWriteError(f"session {path.name} cannot get its name: {error.strerror}", hint="try again") from error
