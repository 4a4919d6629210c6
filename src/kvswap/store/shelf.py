"""All sessions of one folder: their names and places. Imports no torch; any thread."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from kvswap.disk.files import default_kv_dir, prepare_dir
from kvswap.errors import SessionError
from kvswap.store.folder import SessionFolder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def sessions_dir(kv_dir: str | None) -> Path:
    """The folder of all sessions below a folder for KV files; it need not exist yet."""
    return (Path(kv_dir).expanduser() if kv_dir else default_kv_dir()).absolute() / "sessions"


def session_path(kv_dir: str | None, name: str) -> Path:
    """Where the session of that name is or would be. Raises SessionError for a name that is none."""
    if not _NAME.fullmatch(name):
        raise SessionError(f"session name {name!r}", hint="use up to 64 letters, digits, '.', '_' and '-'")
    return sessions_dir(kv_dir) / name


def create_session(kv_dir: str | None, name: str) -> SessionFolder:
    """A new session, open for writing, in a folder that is made if need be. Raises SessionError, StorageError."""
    path = session_path(kv_dir, name)
    prepare_dir(path.parent.parent)
    prepare_dir(path.parent)
    return SessionFolder.create(path)


def open_session(kv_dir: str | None, name: str, *, write: bool = True) -> SessionFolder:
    """An existing session. Raises SessionError, StorageError, DamagedError."""
    return SessionFolder.open(session_path(kv_dir, name), write=write)


def open_or_create(kv_dir: str | None, name: str) -> SessionFolder:
    """The session of that name, open for writing, old or new."""
    if os.path.lexists(session_path(kv_dir, name)):
        return open_session(kv_dir, name)
    return create_session(kv_dir, name)


def close_session(folder: SessionFolder) -> None:
    """Close a session, and remove one that never came to hold anything."""
    path, empty = folder.folder.path, not folder.manifest.checkpoints and folder.manifest.written_bytes == 0
    if empty:
        shutil.rmtree(path, ignore_errors=True)  # while we hold its lock
    folder.close()
