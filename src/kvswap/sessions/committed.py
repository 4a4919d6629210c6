"""The manifest file of one session: what is committed now, read and replaced in one move.

Used by ``commits.SessionStore``. A replacement can break off between the rename and the return, by an error of the disk
or by Ctrl-C. Which state is committed then is decided by the file alone. So whoever asks next gets what the file says:
the old state or the new one.

A reader holds no lock. Another process may commit while it reads, and remove or overwrite what only the state before
referred to. So what a reader finds wrong counts only if the manifest is still the same afterwards (``steady``).

Imports no torch. One thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvswap.disk.private_folder import PrivateFolder
from kvswap.errors import DiskReadError, SessionError, StorageError
from kvswap.sessions import encrypted_names, lock
from kvswap.sessions.arrays import damaged
from kvswap.sessions.encryption import authenticated_sealer
from kvswap.sessions.manifest import Manifest
from kvswap.sessions.manifest_json import LIMIT_BYTES, encode, parse
from kvswap.sessions.seal import Sealer

MANIFEST = "manifest"
READ_ERRORS = (DiskReadError, StorageError, FileNotFoundError)
"""What reading a session raises where files are damaged, or where another process is changing them."""
MAX_READS = 1000
"""How often something is read again because another process has committed in between."""
_T = TypeVar("_T")


class Committed:
    """The committed state of the session in ``folder``; ``label`` is for messages. Without ``write`` it is a reader's.

    Raises DamagedError. Raises SessionError where another process has removed the session, and to a writer where it is
    a plain one in an encrypted one's place.
    """

    def __init__(self, folder: PrivateFolder, label: str, *, write: bool) -> None:
        self._folder, self._label, self._write = folder, label, write
        self._data = self._read()
        self._manifest = parse(self._data, label)
        if write:
            encrypted_names.keep(folder.path, encrypted=self._manifest.encryption is not None)
        self._sealer: Sealer | None = None
        self._next: tuple[bytes, Manifest, Sealer] | None = None  # while a replacement runs, and after it broke off

    @property
    def manifest(self) -> Manifest:
        """What is committed now. Raises DiskError where that cannot be found out."""
        self._settle()
        return self._manifest

    @property
    def sealer(self) -> Sealer:
        """What seals the session. Raises SessionError without its key, DamagedError for a forged manifest.

        The key is asked for when it is first needed: a session can be listed and removed without it.
        """
        self._settle()
        if self._sealer is None:
            self._sealer = authenticated_sealer(self._manifest, self._data, self._label)
        return self._sealer

    def replace(self, manifest: Manifest, sealer: Sealer) -> None:
        """Commit ``manifest``, sealed with ``sealer``, durably. Raises DiskError; the old or the new one is there."""
        data = encode(manifest, sealer.sign)
        self._settle()
        self._folder.sync()
        self._next = (data, manifest, sealer)
        self._folder.replace(MANIFEST, data)
        self._take(data, manifest, sealer)

    def refresh(self) -> Manifest:
        """What is committed now; a reader takes over what another process has committed since it last looked."""
        if not self._write:
            data = self._read()
            if data != self._data:
                self._manifest, self._data, self._sealer = parse(data, self._label), data, None
        return self.manifest

    def steady(self, read: Callable[[], _T]) -> _T:
        """What ``read()`` returns; a reader calls it again where it failed and another process has committed."""
        if self._write:
            return read()
        for _ in range(MAX_READS):
            before = self._manifest
            try:
                return read()
            except READ_ERRORS:
                if self.refresh() is before:
                    raise
        raise changes_too_fast(self._label)

    def _settle(self) -> None:
        """After a replacement that broke off: take over what the file says.

        The name is made durable first. Otherwise files of the old state could be removed, and a power cut could bring
        its manifest back.
        """
        if self._next is None:
            return
        data, manifest, sealer = self._next
        self._folder.sync()
        if self._read() == data:
            self._take(data, manifest, sealer)
        self._next = None

    def _take(self, data: bytes, manifest: Manifest, sealer: Sealer) -> None:
        self._data, self._manifest, self._sealer = data, manifest, sealer
        self._next = None

    def _read(self) -> bytes:
        try:
            data = self._folder.read(MANIFEST, LIMIT_BYTES + 1)
        except FileNotFoundError as error:
            if not self._folder.in_place():
                raise lock.removed(self._label) from error
            raise damaged(self._label, "it has no manifest") from error
        if data and not any(data):
            raise SessionError(
                f"{self._label} is being wiped, or was when that was interrupted",
                hint=f"kvswap sessions wipe {self._label.split()[-1]} finishes it",
            )
        if len(data) > LIMIT_BYTES:
            raise damaged(self._label, "its manifest is too long")
        return data


def changes_too_fast(label: str) -> SessionError:
    """The error for a session that another process has changed each time it was read."""
    return SessionError(f"{label} is being changed faster than it can be read", hint="try again when it is not in use")
