"""Files of a session that are written once and read whole: tails, the basis, and indexes up to a length.

``SessionStore`` calls these. What is read is what was written, or DamagedError. One thread.
"""

from __future__ import annotations

import os

from kvswap.disk.private_folder import PrivateFolder
from kvswap.sessions.arrays import damaged
from kvswap.sessions.manifest import Blob, Manifest
from kvswap.sessions.seal import Sealer, text_sum


def check_files_of(folder: PrivateFolder, manifest: Manifest, label: str) -> None:
    """Raise DamagedError where a file that the manifest names is gone or too short."""
    for name, size_bytes in manifest.files().items():
        try:
            os.close(folder.open(name))  # a plain file of this user
            found_bytes = folder.stat(name).st_size
        except FileNotFoundError as error:
            raise damaged(label, f"{name} is gone") from error
        if found_bytes < size_bytes:
            raise damaged(label, f"{name} has {found_bytes:,} bytes instead of {size_bytes:,}")


def read_file(folder: PrivateFolder, name: str, size_bytes: int, label: str) -> bytes:
    """The first ``size_bytes`` of a file. Raises DamagedError where there are fewer."""
    try:
        data = folder.read(name, size_bytes)
    except FileNotFoundError as error:
        raise damaged(label, f"{name} is gone") from error
    if len(data) != size_bytes:
        raise damaged(label, f"{name} ends too early")
    return data


def read_blob(folder: PrivateFolder, blob: Blob, sealer: Sealer, label: str) -> bytes:
    """What ``write_blob`` was given. Raises DamagedError."""
    data = read_file(folder, blob.file, blob.bytes, label)
    if text_sum(data) != blob.xxh3:
        raise damaged(label, f"{blob.file} is not what was written")
    return sealer.unwrap(data, blob.file, label)


def write_blob(folder: PrivateFolder, name: str, data: bytes, sealer: Sealer) -> Blob:
    """Write a file durably, sealed; returns what finds it again. Raises DiskError."""
    data = sealer.wrap(data, name)
    folder.write(name, data)
    return Blob(file=name, bytes=len(data), xxh3=text_sum(data))
