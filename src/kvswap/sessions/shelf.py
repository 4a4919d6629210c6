"""All sessions of one folder: what there is, how much disk it takes, and how it goes away again.

Imports no torch; any thread. Whatever removes or changes a session takes its lock first.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from kvswap.disk.files import prepare_dir
from kvswap.disk.folders import sessions_folder
from kvswap.disk.private import PrivateFolder
from kvswap.errors import DamagedError, KVSwapError, SessionError
from kvswap.sessions import lock
from kvswap.sessions.check import QUARANTINE, move_away, quarantine_path, repair
from kvswap.sessions.folder import SessionFolder
from kvswap.sessions.making import PARTIAL, making, partial_path
from kvswap.sessions.manifest import Manifest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def sessions_dir(kv_dir: str | None) -> Path:
    """The folder of all sessions below a folder for KV files; it need not exist yet."""
    return sessions_folder(kv_dir)


def session_path(kv_dir: str | None, name: str) -> Path:
    """Where the session of that name is or would be. Raises SessionError for a name that is none."""
    if not _NAME.fullmatch(name):
        raise SessionError(f"session name {name!r}", hint="use up to 64 letters, digits, '.', '_' and '-'")
    return sessions_dir(kv_dir) / name


def create_session(kv_dir: str | None, name: str, *, encrypt: bool = False) -> SessionFolder:
    """A new session, open for writing, in a folder that is made if need be. Raises SessionError, StorageError."""
    return SessionFolder.create(made(session_path(kv_dir, name)), encrypt=encrypt)


def made(path: Path) -> Path:
    """See that the folder of all sessions, in which ``path`` will be, is there and on a disk. Raises StorageError."""
    prepare_dir(path.parent.parent)
    prepare_dir(path.parent)
    return path


def open_session(kv_dir: str | None, name: str, *, write: bool = True) -> SessionFolder:
    """An existing session. Raises SessionError, StorageError, DamagedError."""
    return SessionFolder.open(session_path(kv_dir, name), write=write)


def open_or_create(kv_dir: str | None, name: str, *, encrypt: bool = False) -> SessionFolder:
    """The session of that name, open for writing, old or new; its key is there, if it is encrypted.

    Raises SessionError where ``encrypt`` is wanted of an old one that is not.
    """
    if not os.path.lexists(session_path(kv_dir, name)):
        return create_session(kv_dir, name, encrypt=encrypt)
    folder = open_session(kv_dir, name)
    try:
        if encrypt and folder.manifest.encryption is None:
            raise SessionError(f"{folder.what} exists and is not encrypted", hint="choose another name")
        _ = folder.sealer  # said before a model is loaded
    except BaseException:
        folder.close()
        raise
    return folder


def close_session(folder: SessionFolder) -> None:
    """Close a session, and remove one that never came to hold anything."""
    path, empty = folder.folder.path, not folder.manifest.checkpoints and folder.manifest.written_bytes == 0
    if empty:
        shutil.rmtree(path, ignore_errors=True)  # while we hold its lock
    folder.close()


def others(path: Path) -> list[Path]:
    """All sessions beside that of ``path``."""
    return [each for each in sorted(path.parent.iterdir()) if each != path and _NAME.fullmatch(each.name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One session as a list shows it. ``disk_bytes`` is what removing it would free, ``shared_bytes`` what it shares.

    ``manifest`` is None where ``problem`` says why it cannot be read.
    """

    name: str
    path: Path
    disk_bytes: int
    shared_bytes: int
    in_use: bool
    manifest: Manifest | None
    problem: str


def entries(root: Path) -> list[Entry]:
    """All sessions below ``root``, by name."""
    if not root.is_dir():
        return []
    return [entry(path) for path in sorted(root.iterdir()) if _NAME.fullmatch(path.name)]


def entry(path: Path) -> Entry:
    """What one session looks like from outside; nothing is raised for a damaged one."""
    own_bytes = shared_bytes = 0
    manifest, problem, in_use = None, "", False
    try:
        with SessionFolder.open(path, write=False) as folder:
            manifest = folder.manifest
            in_use = lock.held(folder.folder)
            for name in folder.folder.names():
                status = folder.folder.stat(name)
                used_bytes = status.st_blocks * 512
                own_bytes, shared_bytes = (
                    (own_bytes + used_bytes, shared_bytes)
                    if status.st_nlink == 1
                    else (own_bytes, shared_bytes + used_bytes)
                )
    except (KVSwapError, OSError) as error:
        problem = getattr(error, "message", "") or str(error)
    return Entry(
        name=path.name,
        path=path,
        disk_bytes=own_bytes,
        shared_bytes=shared_bytes,
        in_use=in_use,
        manifest=manifest,
        problem=problem,
    )


def used_bytes(root: Path) -> int:
    """Disk that all sessions, leftovers and the quarantine take; files with several names count once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # a commit has just removed it
                continue
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def remove(path: Path, *, wipe: bool = False) -> int:
    """Remove a session; bytes that were overwritten before (``wipe``). Raises SessionError while it is in use.

    What a fork shares is left to the fork and not overwritten.
    """
    if not os.path.lexists(path):
        raise SessionError(f"session {path.name}: there is none", hint="see: kvswap sessions list")
    folder = PrivateFolder(path)
    wiped_bytes = 0
    try:
        held = lock.acquire(folder, f"session {path.name}")
        try:
            for name in folder.names() if wipe else ():
                wiped_bytes += folder.overwrite(name)
            gone = partial_path(path)
            os.rename(path, gone)  # a name is free at once, and a kill leaves what prune removes
            shutil.rmtree(gone)
        finally:
            os.close(held)
    finally:
        folder.close()
    return wiped_bytes


def prune(root: Path) -> list[str]:
    """Remove leftovers of interrupted work and sessions that never held anything; what was removed, in words."""
    removed: list[str] = []
    if not root.is_dir():
        return removed
    with making(root, alone=True):
        for path in sorted(root.glob(f"{PARTIAL}*")):
            shutil.rmtree(path)
            removed.append(f"leftover {path.name}")
    for found in entries(root):
        if found.manifest is None or found.in_use:
            continue
        try:
            with SessionFolder.open(found.path, write=True) as folder:  # opening and closing tidies up
                empty = not folder.manifest.checkpoints
            if empty:
                remove(found.path)
                removed.append(f"empty session {found.name}")
        except SessionError:  # somebody was faster
            continue
    return removed


def repair_session(path: Path) -> tuple[str, Path | None]:
    """As ``check.repair``; a session whose manifest cannot be read is moved to quarantine. Raises DamagedError."""
    folder: SessionFolder | None = None
    try:
        folder = SessionFolder.open(path, write=True, damaged=True)
        _ = folder.sealer  # a manifest that is not authentic is as good as none
    except DamagedError as error:
        if folder is not None:
            folder.close()
        place = quarantine_path(path)
        private = PrivateFolder(path)
        try:
            held = lock.acquire(private, f"session {path.name}")
            move_away(path, place)
            os.close(held)
        finally:
            private.close()
        raise DamagedError(
            f"{error.message}; it was moved to {place}", hint="make it anew from its documents"
        ) from error
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    try:
        return repair(folder)
    finally:
        folder.close()


def quarantined(root: Path) -> list[Path]:
    """Folders in quarantine."""
    place = root / QUARANTINE
    return sorted(place.iterdir()) if place.is_dir() else []
