"""A second session that begins as the first one is now: the same files under a second name, without copying them."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from kvswap.disk.private import PrivateFolder
from kvswap.errors import SessionError
from kvswap.sessions.folder import SessionFolder
from kvswap.sessions.making import making, move_into_place, partial_path
from kvswap.sessions.manifest import encode
from kvswap.sessions.reader import MANIFEST


def fork(source: SessionFolder, path: Path) -> int:
    """Make the session ``path`` from what is committed in ``source``, whose lock must be held; bytes of new disk.

    The fork appears whole or not at all. Raises SessionError when the name is taken, DiskWriteError, DiskFullError.
    """
    if os.path.lexists(path):
        raise SessionError(f"session {path.name} exists already", hint="choose another name")
    with making(path.parent):
        return _fork(source, partial_path(path), path)


def _fork(source: SessionFolder, partial: Path, path: Path) -> int:
    sign = source.sealer.sign
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
        target.replace(MANIFEST, encode(manifest, sign))
        move_into_place(partial, path)
        return target.written_bytes
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        target.close()
