"""All sessions of one folder: find, list, remove and prune them.

Whatever changes or removes a session takes its lock first. Imports no torch; any thread.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvswap.disk.files import prepare_dir
from kvswap.disk.folders import sessions_folder
from kvswap.disk.private_folder import (
    PrivateFolder,
    is_folder,
    remove_tree,
    translate_os_errors,
    translate_read_errors,
)
from kvswap.errors import DamagedError, KVSwapError, SessionError
from kvswap.sessions import encrypted_names, lock
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.committed import MANIFEST
from kvswap.sessions.manifest import Manifest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# ---- from a name to a session


def sessions_dir(kv_dir: str | None) -> Path:
    """The folder of all sessions, in a folder for KV files. It need not exist yet."""
    return sessions_folder(kv_dir)


def session_path(kv_dir: str | None, name: str) -> Path:
    """The folder that a session of that name has or would have. Raises SessionError for an impossible name."""
    if not _NAME.fullmatch(name):
        raise SessionError(f"session name {name!r}", hint="use up to 64 letters, digits, '.', '_' and '-'")
    return sessions_dir(kv_dir) / name


def prepare_parent(path: Path) -> None:
    """Create the folder of all sessions, which will contain ``path``. Raises StorageError."""
    prepare_dir(path.parent.parent)
    prepare_dir(path.parent)


def create_store(kv_dir: str | None, name: str, *, encrypt: bool = False) -> SessionStore:
    """A new session, open for writing. Raises SessionError, StorageError."""
    path = session_path(kv_dir, name)
    prepare_parent(path)
    return SessionStore.create(path, encrypt=encrypt)


def open_store(kv_dir: str | None, name: str, *, write: bool = True) -> SessionStore:
    """An existing session. Raises SessionError, StorageError, DamagedError."""
    return SessionStore.open(session_path(kv_dir, name), write=write)


def open_or_create_store(kv_dir: str | None, name: str, *, encrypt: bool = False) -> SessionStore:
    """The session of that name, existing or new, open for writing; if it is encrypted, its key has been checked.

    Raises SessionError where ``encrypt`` is asked for and an existing session is not encrypted.
    """
    if not os.path.lexists(session_path(kv_dir, name)):
        return create_store(kv_dir, name, encrypt=encrypt)
    store = open_store(kv_dir, name)
    try:
        if encrypt and store.manifest.encryption is None:
            raise SessionError(f"{store.label} exists and is not encrypted", hint="choose another name")
        _ = store.sealer  # a missing key is reported before a model is loaded
    except BaseException:
        store.close()
        raise
    return store


def sibling_paths(path: Path) -> list[Path]:
    """The folders of all other sessions beside ``path``, sorted."""
    return [each for each in _session_paths(path.parent) if each != path]


# ---- what a folder contains


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One session in a list.

    Removing it would free ``disk_bytes``; its files that other sessions share take ``shared_bytes``. Where the session
    cannot be read, ``manifest`` is None and ``problem`` says why.
    """

    name: str
    path: Path
    disk_bytes: int
    shared_bytes: int
    in_use: bool
    manifest: Manifest | None
    problem: str


def entries(root: Path) -> list[Entry]:
    """All sessions of a folder, by name. Those that another process removes meanwhile are left out."""
    found = [entry(path) for path in _session_paths(root)] if is_folder(root) else []
    return [each for each in found if each.manifest is not None or os.path.lexists(each.path)]


def entry(path: Path) -> Entry:
    """One session, seen from outside. A damaged one raises nothing."""
    own_bytes = shared_bytes = 0
    manifest, problem, in_use = None, "", False
    try:
        with SessionStore.open(path, write=False) as store:
            manifest = store.manifest
            in_use = lock.is_locked(store.folder)
            for name in store.folder.names():
                try:
                    status = store.folder.stat(name)
                except FileNotFoundError:  # a commit has just removed it
                    continue
                if status.st_nlink == 1:
                    own_bytes += status.st_blocks * 512
                else:
                    shared_bytes += status.st_blocks * 512
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
    """Disk space of all sessions, leftovers and the quarantine. A file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                with translate_read_errors(f"{folder}/{name} cannot be looked at"):
                    status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # a commit has just removed it
                continue
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def freed_by_removal(paths: Sequence[Path]) -> list[int]:
    """Disk space that each removal frees when these sessions are removed in order; shared files go with the last name.

    Files that another session or the quarantine shares are not freed.
    """
    removed: dict[tuple[int, int], int] = {}
    freed = []
    for path in paths:
        freed_bytes = 0
        for status in _statuses(path):
            key = status.st_dev, status.st_ino
            removed[key] = removed.get(key, 0) + 1
            freed_bytes += status.st_blocks * 512 if removed[key] == status.st_nlink else 0
        freed.append(freed_bytes)
    return freed


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Of all files of a session; of none that another process removes meanwhile."""
    with translate_read_errors(f"folder {path} cannot be looked at"), contextlib.suppress(FileNotFoundError):
        for file in path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield file.lstat()


def _leftovers(root: Path) -> list[Path]:
    with translate_read_errors(f"folder {root} cannot be read"):
        return [path for path in sorted(root.iterdir()) if path.name.startswith(lock.TEMPORARY_PREFIX)]


def _session_paths(root: Path) -> list[Path]:
    with translate_read_errors(f"folder {root} cannot be read"):
        return [path for path in sorted(root.iterdir()) if _NAME.fullmatch(path.name)]


# ---- removing


def remove(path: Path, *, wipe: bool = False, forget: bool = True) -> int:
    """Remove a session. With ``wipe`` its files are overwritten first; returns how many bytes were overwritten.

    Files that other sessions share stay as they are. If it was encrypted, a plain session may get its name afterwards,
    unless ``forget`` is False. Raises SessionError while the session is in use.
    """
    if not os.path.lexists(path):
        if forget and encrypted_names.is_known(path):  # it was deleted by other means
            encrypted_names.forget(path)
            return 0
        raise SessionError(f"there is no session {path.name}", hint="see: kvswap sessions list")
    folder = PrivateFolder(path)
    wiped_bytes = 0
    try:
        locked = lock.acquire(folder, f"session {path.name}")
        try:
            # The manifest first: what is half wiped must not look like damage.
            for name in sorted(folder.names(), key=lambda name: name != MANIFEST) if wipe else ():
                wiped_bytes += folder.overwrite(name)
            gone = lock.temporary_path(path)
            with translate_os_errors(f"session {path.name} cannot be removed"):
                os.rename(path, gone)  # frees the name at once; after an interruption prune removes the rest
            if forget:
                encrypted_names.forget(path)
            remove_tree(gone)
        finally:
            os.close(locked)
    finally:
        folder.close()
    return wiped_bytes


def prune(root: Path) -> list[str]:
    """Remove leftovers of interrupted work, and sessions that were never used; what was removed, in words."""
    removed: list[str] = []
    if not is_folder(root):
        return removed
    with lock.creation_lock(root, exclusive=True):
        for path in _leftovers(root):
            remove_tree(path)
            removed.append(f"leftover {path.name}")
    for found in entries(root):
        if found.manifest is None or found.in_use:
            continue
        try:
            with SessionStore.open(found.path, write=True) as store:  # opening for writing removes leftover files
                empty = not store.manifest.checkpoints
            if empty:
                remove(found.path)
                removed.append(f"empty session {found.name}")
        except (SessionError, DamagedError):  # another process has opened or removed it in the meantime
            continue
    return removed
