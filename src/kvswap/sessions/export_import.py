"""A session as one file: its current context in a tar archive without compression, as one segment.

``export_session`` compares every group with its seal while it writes; an encrypted session stays encrypted, under the
same key. ``import_session`` reads everything again before the session gets its name. It takes only the names of the
format from an archive, as plain files, with the sizes that the manifest states, and never writes more bytes than the
archive has. Imports no torch.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from kvswap.disk.atomic import atomic_file
from kvswap.disk.files import check_free, check_open_files
from kvswap.disk.private_folder import PrivateFolder
from kvswap.errors import DamagedError, InputError, SessionError
from kvswap.sessions import encrypted_names
from kvswap.sessions.arrays import encode_arrays
from kvswap.sessions.check import check
from kvswap.sessions.commits import BASIS, SessionStore
from kvswap.sessions.committed import MANIFEST
from kvswap.sessions.encryption import authenticated_sealer
from kvswap.sessions.index import LayerIndex, batch_name, encode_batch
from kvswap.sessions.lock import new_session_folder
from kvswap.sessions.manifest import Blob, Manifest, Segment
from kvswap.sessions.manifest_json import LIMIT_BYTES, encode, parse
from kvswap.sessions.quota import counted
from kvswap.sessions.seal import text_sum
from kvswap.store.layout import GroupLayout

_PIECE_BYTES = 4 << 20
_T = TypeVar("_T")


def export_session(store: SessionStore, target: Path) -> int:
    """Write the current context to a new file ``target``, mode 0600; its size in bytes.

    The file appears complete or not at all. Raises SessionError for an empty session, InputError where the file exists
    or cannot be written, DamagedError.
    """
    members, segment, layers = _members(store)
    try:
        if os.path.lexists(target):
            raise FileExistsError
        with atomic_file(target, replace=False, mode=0o600) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
                for name, data in members:
                    _add(archive, name, data)
                _add_groups(archive, store, segment, layers)
            size_bytes = file.tell()
        return size_bytes
    except FileExistsError as error:
        raise InputError(f"{target} exists already", hint="give another name") from error
    except OSError as error:
        check_open_files(error)
        raise InputError(f"{target}: {error.strerror or error}", hint="give a file in a folder of yours") from error


def _members(store: SessionStore) -> tuple[list[tuple[str, bytes]], Segment, list[LayerIndex]]:
    """The small files of an archive, by name; the segment that follows, and the index of its groups."""
    contents, manifest = store.load(), store.manifest
    layout, current, basis = manifest.layout, manifest.current, manifest.basis
    if contents is None or layout is None or current is None or basis is None:
        raise SessionError(f"{store.label} is empty", hint="there is nothing to export")
    start = (0,) * layout.layers
    index = encode_batch(start, contents.groups, store.sealer, batch_name(0, 0))
    tail = store.sealer.wrap(encode_arrays(contents.tail), "tail-0")
    checkpoint = replace(
        current,
        commit=0,
        interim=False,
        tail=Blob(file="tail-0", bytes=len(tail), xxh3=text_sum(tail)),
        segments=((0, len(index)),),
    )
    segment = Segment(
        number=0,
        owned=True,
        start=start,
        high=current.flushed,
        index_bytes=len(index),
        stripe_groups=GroupLayout(layout.geometry, layout.alignment_bytes).stripe_groups(max(current.flushed)),
    )
    joined = replace(manifest, commits=1, written_bytes=0, rates=None, segments=(segment,), checkpoints=(checkpoint,))
    members = [
        (MANIFEST, encode(joined, store.sealer.sign)),
        (BASIS, store.folder.read(BASIS, basis.bytes)),
        ("tail-0", tail),
        ("index-0", index),
    ]
    return members, segment, contents.groups


def import_session(source: Path, path: Path) -> Manifest:
    """Create the session ``path`` from an archive. It appears complete or not at all.

    Raises SessionError where the name is taken, InputError or DamagedError for a file that is not a sound archive.
    """
    label = f"archive {source.name}"
    try:
        with new_session_folder(path) as folder, _header(lambda: tarfile.open(source, mode="r:")) as archive:
            check_free(path.parent, source.stat().st_size)
            with counted(folder):
                manifest = _unpack(archive, folder, label)
            with SessionStore.open(folder.path, write=False) as store:
                report = check(store)
            if report.problems:
                raise DamagedError(f"{label} is damaged: {report.problems[0]}", hint="export it again")
            encrypted_names.keep(path, encrypted=manifest.encryption is not None)
        return manifest
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{source}: not an archive of a session ({error})", hint="give a file from export") from error
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}", hint="give a file from export") from error


def _unpack(archive: tarfile.TarFile, folder: PrivateFolder, label: str) -> Manifest:
    first = _header(archive.next)
    if first is None or first.name != MANIFEST or not _is_plain(first) or first.size > LIMIT_BYTES:
        raise InputError(f"{label} does not begin with a manifest", hint="give a file from export")
    data = _content(archive, first).read()
    manifest = parse(data, label)
    sealer = authenticated_sealer(manifest, data, label)
    sizes, layout = manifest.files(), manifest.layout
    if layout is None or len(manifest.segments) != 1 or len(manifest.checkpoints) != 1:
        raise DamagedError(f"{label} does not contain exactly one context", hint="export it again")
    while (member := _header(archive.next)) is not None:
        if not _is_plain(member) or sizes.pop(member.name, None) != member.size:
            raise DamagedError(f"{label}: unexpected member {member.name[:40]!r}", hint="export it again")
        _copy(_content(archive, member), folder, member)
    if sizes:
        raise DamagedError(f"{label} ends before {next(iter(sizes))}", hint="export it again")
    now = int(time.time())
    fresh = replace(manifest, created=now, used=now, written_bytes=folder.written_bytes)
    folder.sync()
    folder.replace(MANIFEST, encode(fresh, sealer.sign))
    return fresh


def _header(read: Callable[[], _T]) -> _T:
    """What ``read`` makes of the next header of an archive. Raises TarError for a header of whatever bytes."""
    try:
        return read()
    except (ValueError, OverflowError, RecursionError) as error:  # no numbers, or headers about headers without end
        raise tarfile.ReadError(f"damaged header: {error}") from error


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a plain file whose bytes are all in the archive. A sparse one is made longer by its holes."""
    return member.isreg() and not member.issparse()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    if content is None:
        raise tarfile.TarError(f"{member.name} is no plain file")
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


def _add_groups(archive: tarfile.TarFile, store: SessionStore, segment: Segment, layers: list[LayerIndex]) -> None:
    assert store.manifest.layout is not None
    ((name, size_bytes),) = segment.files(store.manifest.layout).items()
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    archive.addfile(info, _Joined(_stripes(store, segment, layers)))


def _stripes(store: SessionStore, segment: Segment, layers: list[LayerIndex]) -> Iterator[bytes]:
    """The file of ``segment``, stripe by stripe; what no group fills is zero. May go on past the last group."""
    layout, stripe_groups = store.manifest.layout, segment.stripe_groups
    assert layout is not None and stripe_groups is not None
    for first in range(0, max(segment.high), stripe_groups):
        for layer, index in enumerate(layers):
            end = max(first, min(first + stripe_groups, segment.high[layer]))
            yield from _read_groups(store, layer, index, first, end)
            if end < first + stripe_groups:
                yield bytes((first + stripe_groups - end) * layout.slot_bytes)


def _read_groups(store: SessionStore, layer: int, index: LayerIndex, first: int, end: int) -> Iterator[bytes]:
    """Groups ``[first, end)`` of a layer in order, from all segments, compared with their seals."""
    layout, current = store.manifest.layout, store.manifest.current
    assert layout is not None and current is not None
    for segment, ends in store.manifest.ends(current):
        begin, stop = max(first, segment.start[layer]), min(end, ends[layer])
        for run in segment.runs(layout, layer, begin, stop, _PIECE_BYTES):
            data = store.folder.read(run.file, run.count * layout.slot_bytes, offset_bytes=run.offset_bytes)
            if len(data) < run.count * layout.slot_bytes:
                raise DamagedError(f"{store.label}: {run.file} ends too early", hint="try: kvswap sessions repair")
            slots = np.frombuffer(data, np.uint8).reshape(run.count, layout.slot_bytes)
            used, seals = slots[:, : layout.geometry.group_bytes], index.seals[run.first : run.first + run.count]
            wrong = ~store.sealer.authentic(layer, run.first, used, seals)
            if wrong.any():
                group = run.first + int(np.flatnonzero(wrong)[0])
                raise DamagedError(
                    f"{store.label} is damaged: group {group} of layer {layer} is not what was written",
                    hint=f"kvswap sessions repair {store.name} keeps the context before it",
                )
            yield data


class _Joined(io.RawIOBase):
    """A sequence of bytes objects, none of them empty, as one file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; fewer only at the end."""
        parts, missing = [], size
        while missing > 0:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    break
            part, self._rest = self._rest[:missing], self._rest[missing:]
            parts.append(bytes(part))
            missing -= len(part)
        return b"".join(parts)
