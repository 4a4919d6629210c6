"""The manifest file of one session: what is committed now, read and replaced in one move.

Used by ``commits.SessionStore``. A replacement can break off between the rename and the return, by an error of the disk
or by Ctrl-C. Which state is committed then is decided by the file alone. So whoever asks next gets what the file says:
the old state or the new one. Imports no torch. One thread.
"""

from __future__ import annotations

from kvswap.disk.private_folder import PrivateFolder
from kvswap.sessions.arrays import damaged
from kvswap.sessions.encryption import authenticated_sealer
from kvswap.sessions.manifest import Manifest
from kvswap.sessions.manifest_json import LIMIT_BYTES, encode, parse
from kvswap.sessions.seal import Sealer

MANIFEST = "manifest"


class Committed:
    """The committed state of the session in ``folder``; ``label`` is for messages. Raises DamagedError."""

    def __init__(self, folder: PrivateFolder, label: str) -> None:
        self._folder, self._label = folder, label
        self._data = self._read()
        self._manifest = parse(self._data, label)
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
            raise damaged(self._label, "it has no manifest") from error
        if len(data) > LIMIT_BYTES:
            raise damaged(self._label, "its manifest is too long")
        return data
