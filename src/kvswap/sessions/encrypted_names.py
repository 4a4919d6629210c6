"""Which names are those of encrypted sessions, so that a plain one in their place is not taken for them.

The folder of all sessions has a folder ``.encrypted`` with an empty file for each such name. Under such a name no plain
session is created, and none is opened for writing: what the user thinks is encrypted would be written as plain text.
``kvswap sessions rm`` and ``wipe`` set the name free. This guards against mistakes, such as a backup in the wrong
place or a session that was deleted by hand. It is no defence against somebody who can write to the folder, who could
remove the file as well; ``--encrypt`` refuses a plain session whatever the folder says. Imports no torch. Any thread.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kvswap.disk.private_folder import PrivateFolder, translate_read_errors
from kvswap.errors import SessionError, StorageError

FOLDER = ".encrypted"


def keep(path: Path, *, encrypted: bool) -> None:
    """Note that the session ``path`` is ``encrypted``. Raises SessionError where it is not and its name says it was."""
    known = is_known(path)
    if encrypted and not known:
        try:
            _note(path)
        except (FileNotFoundError, StorageError):  # another process gave up the last name, and with it the folder
            _note(path)
    if known and not encrypted:
        raise SessionError(
            f"session {path.name} was encrypted, and the one in its place would not be",
            hint="move what is there to another name, give --encrypt for a new one, "
            f"or free the name with kvswap sessions rm {path.name}",
        )


def is_known(path: Path) -> bool:
    """Whether the name of the session ``path`` is that of an encrypted one."""
    try:
        with translate_read_errors(f"folder {path.parent} cannot be looked at"):
            os.lstat(path.parent / FOLDER / path.name)
    except FileNotFoundError:
        return False
    return True


def _note(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        PrivateFolder.create(path.parent / FOLDER).close()
    folder = PrivateFolder(path.parent / FOLDER)
    try:
        folder.write(path.name, b"")
        folder.sync()
    finally:
        folder.close()


def forget(path: Path) -> None:
    """Set the name of the session ``path`` free. The last name takes the folder with it."""
    if is_known(path):
        folder = PrivateFolder(path.parent / FOLDER)
        try:
            folder.remove(path.name)
        finally:
            folder.close()
        with contextlib.suppress(OSError):  # it has other names
            os.rmdir(path.parent / FOLDER)
