"""A session as one file: the current context, its files joined, in a tar archive without compression.

``export_session`` compares every group with its seal on the way out; an encrypted session stays so, under its key.
``import_session`` reads everything again before the session gets its name. Only the names of the format are taken from
an archive, as plain files and with the sizes that its manifest states. Imports no torch.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from kvswap.disk.atomic import atomic_file
from kvswap.disk.files import check_free
from kvswap.disk.private import PrivateFolder
from kvswap.errors import DamagedError, InputError, SessionError
from kvswap.sessions.check import check
from kvswap.sessions.folder import BASIS, SessionFolder
from kvswap.sessions.index import LayerIndex, batch_name, encode_arrays, encode_batch
from kvswap.sessions.making import making, move_into_place, partial_path
from kvswap.sessions.manifest import LIMIT_BYTES, Blob, Manifest, Segment, encode
from kvswap.sessions.parse import parse, signature
from kvswap.sessions.reader import MANIFEST, unlock
from kvswap.store.checksum import text_sum

_PIECE_BYTES = 4 << 20


def export_session(folder: SessionFolder, target: Path) -> int:
    """Write the current context to a new file ``target``, mode 0600; its size in bytes. It appears whole or not at all.

    Raises SessionError for an empty session, InputError where the file exists or cannot be written, DamagedError.
    """
    stored, manifest = folder.load(), folder.manifest
    layout, current, basis = manifest.layout, manifest.current, manifest.basis
    if stored is None or layout is None or current is None or basis is None:
        raise SessionError(f"{folder.what} is empty", hint="there is nothing to export")
    start = (0,) * layout.layers
    index = encode_batch(start, stored.groups, folder.sealer, batch_name(0, 0))
    tail = folder.sealer.wrap(encode_arrays(stored.tail), "tail-0")
    checkpoint = replace(
        current,
        commit=0,
        interim=False,
        tail=Blob(file="tail-0", bytes=len(tail), xxh3=text_sum(tail)),
        segments=((0, len(index)),),
    )
    segment = Segment(number=0, owned=True, start=start, high=current.flushed, index_bytes=len(index))
    flat = replace(manifest, commits=1, written_bytes=0, rates=None, segments=(segment,), checkpoints=(checkpoint,))
    members = [(MANIFEST, encode(flat, folder.sealer.sign)), (BASIS, folder.folder.read(BASIS, basis.bytes))]
    members += [("tail-0", tail), ("index-0", index)]
    try:
        if os.path.lexists(target):
            raise FileExistsError
        with atomic_file(target, replace=False, mode=0o600) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
                for name, data in members:
                    _add(archive, name, data)
                for layer, groups in enumerate(stored.groups):
                    info = tarfile.TarInfo(f"data-0-{layer}")
                    info.size = len(groups.seals) * layout.slot_bytes
                    archive.addfile(info, _Joined(_data(folder, layer, groups)))
            size_bytes = file.tell()
        return size_bytes
    except FileExistsError as error:
        raise InputError(f"{target} exists already", hint="give another name") from error
    except OSError as error:
        raise InputError(f"{target}: {error.strerror or error}", hint="give a file in a folder of yours") from error


def import_session(source: Path, path: Path) -> Manifest:
    """Make the session ``path`` from an archive. It appears whole or not at all.

    Raises SessionError when the name is taken, InputError or DamagedError for a file that is no sound archive.
    """
    if os.path.lexists(path):
        raise SessionError(f"session {path.name} exists already", hint="choose another name (--name)")
    partial = partial_path(path)
    try:
        with making(path.parent), tarfile.open(source, mode="r:") as archive:
            check_free(path.parent, source.stat().st_size)
            folder = PrivateFolder.create(partial)
            try:
                manifest = _unpack(archive, folder, f"archive {source.name}")
            finally:
                folder.close()
        with SessionFolder.open(partial, write=False) as session:
            report = check(session)
        if report.problems:
            raise DamagedError(f"archive {source.name} is damaged: {report.problems[0]}", hint="export it again")
        move_into_place(partial, path)
        return manifest
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{source}: not an archive of a session ({error})", hint="give a file from export") from error
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}", hint="give a file from export") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack(archive: tarfile.TarFile, folder: PrivateFolder, what: str) -> Manifest:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > LIMIT_BYTES:
        raise InputError(f"{what} does not begin with a manifest", hint="give a file from export")
    data = _content(archive, first).read()
    manifest = parse(data, what)
    sealer = unlock(manifest, *signature(data), what)
    sizes, layout = manifest.files(), manifest.layout
    if layout is None or len(manifest.segments) != 1 or len(manifest.checkpoints) != 1:
        raise DamagedError(f"{what} holds more or less than one context", hint="export it again")
    while (member := archive.next()) is not None:
        if not member.isreg() or sizes.pop(member.name, None) != member.size:
            raise DamagedError(f"{what}: unexpected member {member.name[:40]!r}", hint="export it again")
        _copy(_content(archive, member), folder, member)
    if sizes:
        raise DamagedError(f"{what} ends before {next(iter(sizes))}", hint="export it again")
    now = int(time.time())
    fresh = replace(manifest, created=now, used=now, written_bytes=folder.written_bytes)
    folder.sync()
    folder.replace(MANIFEST, encode(fresh, sealer.sign))
    return fresh


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # a plain file has one
    return content


def _copy(content: IO[bytes], folder: PrivateFolder, member: tarfile.TarInfo) -> None:
    offset_bytes = 0
    folder.write(member.name, b"")
    while part := content.read(_PIECE_BYTES):
        folder.append(member.name, offset_bytes, part)
        offset_bytes += len(part)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _data(folder: SessionFolder, layer: int, groups: LayerIndex) -> Iterator[bytes]:
    """All groups of a layer in order, from whichever segments hold them, compared with their seals."""
    layout, current = folder.manifest.layout, folder.manifest.current
    assert layout is not None and current is not None
    slot_bytes, piece = layout.slot_bytes, max(1, _PIECE_BYTES // layout.slot_bytes)
    for segment, ends in folder.manifest.ends(current):
        first, end = segment.start[layer], ends[layer]
        for start in range(first, end, piece):
            count = min(piece, end - start)
            name = f"data-{segment.number}-{layer}"
            data = folder.folder.read(name, count * slot_bytes, offset_bytes=(start - first) * slot_bytes)
            if len(data) < count * slot_bytes:
                raise DamagedError(f"{folder.what}: {name} ends too early", hint="try: kvswap sessions repair")
            slots = np.frombuffer(data, np.uint8).reshape(count, slot_bytes)
            used, seals = slots[:, : layout.geometry.group_bytes], groups.seals[start : start + count]
            wrong = ~folder.sealer.authentic(layer, start, used, seals)
            if wrong.any():
                group = start + int(np.flatnonzero(wrong)[0])
                raise DamagedError(
                    f"{folder.what} is damaged: group {group} of layer {layer} is not what was written",
                    hint=f"kvswap sessions repair {folder.name} keeps the context before it",
                )
            yield data


class _Joined(io.RawIOBase):
    """Pieces of bytes as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; fewer only at the end."""
        parts, wanted = [], size
        while wanted > 0:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    break
            part, self._rest = self._rest[:wanted], self._rest[wanted:]
            parts.append(bytes(part))
            wanted -= len(part)
        return b"".join(parts)
