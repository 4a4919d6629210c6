"""One session's folder: what is committed, and how a commit comes about (docs/file-format.md).

A writer holds the session's lock from ``open`` to ``close``; readers hold none. ``commit``, ``undo`` and ``cut`` return
when their result is durable; an interruption before that leaves the last committed state. Whole groups are written by
the group store, through descriptors from ``open_data``. Imports no torch. One thread.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from kvswap.core.rates import Rates
from kvswap.disk.private import PrivateFolder
from kvswap.errors import SessionError
from kvswap.sessions import lock
from kvswap.sessions.index import Arrays, LayerIndex, batch_name, encode_arrays, encode_batch
from kvswap.sessions.keys import master_key
from kvswap.sessions.making import making, move_into_place, partial_path
from kvswap.sessions.manifest import (
    CHECKPOINTS,
    SEGMENTS,
    Blob,
    Checkpoint,
    Counts,
    Layout,
    Manifest,
    Model,
    Segment,
    encode,
)
from kvswap.sessions.reader import MANIFEST, SessionReader, Stored
from kvswap.sessions.seal import Checksums, Cipher, Sealer
from kvswap.store.checksum import text_sum

BASIS = "basis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a commit brings: ``groups`` are the layers' new ones, from the last commit's ``flushed`` to this one's."""

    model: Model
    layout: Layout
    basis: Arrays | None
    tokens: int
    flushed: Counts
    groups: Sequence[LayerIndex]
    tail: Arrays
    data_bytes: int
    interim: bool
    rates: Rates = Rates()  # noqa: RUF009 - frozen


class SessionFolder(SessionReader):
    """An open session. ``manifest`` is what is committed now."""

    def __init__(self, folder: PrivateFolder, *, write: bool, damaged: bool = False) -> None:
        super().__init__(folder)
        self.writable = write
        self._lock: int | None = lock.acquire(folder, self.what) if write else None
        self._begun: Segment | None = None  # a segment that is written to and was never committed
        self._restarted = False
        self._ready = False
        try:
            self.manifest = self._read_manifest()
            if not damaged:
                self._check_files()
            if write and not damaged:
                self._clean()
            self._ready = not damaged
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, *, write: bool, damaged: bool = False) -> SessionFolder:
        """Open an existing session; one that may be ``damaged`` as far as its manifest goes.

        Raises SessionError, StorageError, DamagedError.
        """
        if not os.path.lexists(path):
            raise SessionError(f"session {path.name}: there is none", hint="see: kvswap sessions list")
        folder = PrivateFolder(path)
        try:
            return cls(folder, write=write, damaged=damaged)
        except BaseException:
            folder.close()
            raise

    @classmethod
    def create(cls, path: Path, *, encrypt: bool = False) -> SessionFolder:
        """Make a session that holds nothing yet. Raises SessionError when the name is taken, or without a key."""
        what = f"session {path.name}"
        if os.path.lexists(path):
            raise SessionError(f"{what} exists already", hint="open it, or choose another name")
        key = master_key(what) if encrypt else b""
        encryption = Cipher.new(key) if encrypt else None
        sealer: Sealer = Cipher(key, encryption, what) if encryption else Checksums()
        with making(path.parent):
            partial, now = partial_path(path), int(time.time())
            folder = PrivateFolder.create(partial)
            try:
                manifest = Manifest(created=now, used=now, encryption=encryption)
                folder.replace(MANIFEST, encode(manifest, sealer.sign))
                move_into_place(partial, path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                folder.close()
        return cls.open(path, write=True)

    def close(self) -> None:
        """Give the lock back. May be called twice."""
        held, self._lock = self._lock, None
        try:
            if held is not None and self._ready:
                self._trim()
        finally:
            if held is not None:
                lock.release(held)
            self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def base(self) -> Checkpoint | None:
        """What the next commit goes on from: the current checkpoint, or nothing after ``restart``."""
        return None if self._restarted else self.manifest.current

    # ---- writing

    def open_data(self, segment: int, layer: int, *, direct: bool) -> int:
        """A descriptor of a data file for a backend, which closes it; made where this segment has just begun."""
        name = f"data-{segment}-{layer}"
        if self._begun is not None and self._begun.number == segment:
            return self.folder.make(name, direct=direct)
        return self.folder.open(name, write=self.writable, direct=direct)

    def appendable(self) -> bool:
        """Whether new groups may go behind those of the base's last segment."""
        current = self.base
        if current is None or not current.segments:
            return False
        number, index_bytes = current.segments[-1]
        last = self.manifest.segment(number)
        return last.owned and last.high == current.flushed and last.index_bytes == index_bytes

    def begin_segment(self, start: Counts) -> int:
        """Begin a segment for new groups from ``start`` on; its number. Raises SessionError after too many."""
        current = self.base
        if current is not None and len(current.segments) >= SEGMENTS:
            raise SessionError(
                f"{self.what} was forked and taken back {SEGMENTS} times over",
                hint="export it and import it again, which joins its files",
            )
        number = max((segment.number for segment in self.manifest.segments), default=-1) + 1
        self._begun = Segment(number=number, owned=True, start=start, high=start, index_bytes=0)
        return number

    def commit(self, new: Commit) -> None:
        """Make a new state durable; data files have to be so already. See the format for the order."""
        manifest, folder = self.manifest, self.folder
        before = folder.written_bytes
        current = self.base
        pairs = list(current.segments) if current else []
        segments = {segment.number: segment for segment in manifest.segments}
        if any(len(layer.seals) for layer in new.groups):
            if self._begun is not None:
                pairs.append((self._begun.number, 0))
                segments[self._begun.number] = self._begun
            number, index_bytes = pairs[-1]
            start = current.flushed if current else (0,) * new.layout.layers
            batch = encode_batch(start, new.groups, self.sealer, batch_name(number, index_bytes))
            folder.append(f"index-{number}", index_bytes, batch)
            pairs[-1] = (number, index_bytes + len(batch))
            segments[number] = replace(segments[number], high=new.flushed, index_bytes=index_bytes + len(batch))
        basis = manifest.basis or self._write_blob(folder, BASIS, encode_arrays(new.basis or {}))
        tail = self.write_tail(folder, manifest.commits, encode_arrays(new.tail))
        checkpoint = Checkpoint(
            commit=manifest.commits,
            interim=new.interim,
            tokens=new.tokens,
            flushed=new.flushed,
            tail=tail,
            segments=tuple(pairs),
        )
        kept = self._lasting() if new.layout == manifest.layout else ()
        self.put(
            replace(
                manifest,
                commits=manifest.commits + 1,
                written_bytes=manifest.written_bytes + new.data_bytes + folder.written_bytes - before,
                rates=new.rates.better(manifest.rates) if manifest.rates else new.rates,
                model=new.model,
                layout=new.layout,
                basis=basis,
                segments=tuple(segments.values()),
                checkpoints=(*kept, checkpoint)[-CHECKPOINTS:],
            )
        )
        self._begun, self._restarted = None, False

    def restart(self) -> None:
        """Let the next commit begin a context from nothing; what was there can be gone back to."""
        self._restarted, self._begun = bool(self.manifest.checkpoints), None

    def give_up(self) -> None:
        """Forget what was begun since the last commit: the next reader of the folder finds that commit."""
        self._restarted, self._begun = False, None
        self._clean()

    def undo(self) -> None:
        """Go back to the checkpoint before. Raises SessionError when none is left."""
        if self._restarted:
            return self.give_up()
        if not self.manifest.checkpoints:
            raise SessionError(f"{self.what} has nothing to take back", hint="it holds no tokens")
        kept = self.manifest.checkpoints[:-1]
        if not kept and self.manifest.checkpoints[0].commit > 0:
            raise SessionError(
                f"{self.what}: turns further back are not kept", hint=f"the newest {CHECKPOINTS} are; start a new one"
            )
        if kept:
            self.put(replace(self.manifest, checkpoints=kept))
        else:
            now = self.manifest
            empty = Manifest(created=now.created, used=now.used, encryption=now.encryption)
            self.put(replace(empty, written_bytes=now.written_bytes))

    def cut(self, groups: int) -> None:
        """Keep only the first ``groups`` whole groups of the current context, at least one, as a new checkpoint."""
        manifest, stored = self.manifest, self.load()
        layout, current = manifest.layout, self.base
        assert stored is not None and layout is not None and current is not None and groups > 0
        flushed, tail = cut_tail(layout, stored, current, groups)
        checkpoint = replace(
            current,
            commit=manifest.commits,
            interim=True,
            tokens=groups * layout.group_tokens,
            flushed=flushed,
            tail=self.write_tail(self.folder, manifest.commits, encode_arrays(tail)),
        )
        checkpoints = (*self._lasting(), checkpoint)[-CHECKPOINTS:]
        self.put(replace(manifest, commits=manifest.commits + 1, checkpoints=checkpoints))

    def _lasting(self) -> tuple[Checkpoint, ...]:
        """Checkpoints that stay when another one comes."""
        found = self.manifest.checkpoints
        return found[:-1] if found and found[-1].interim else found

    def put(self, manifest: Manifest) -> None:
        """The one place where a new state becomes the committed one."""
        manifest = self._settle(replace(manifest, used=int(time.time())))
        data = encode(manifest, self.sealer.sign)
        self.folder.sync()
        self.folder.replace(MANIFEST, data)
        self.manifest = manifest
        self._clean()

    def become(self, manifest: Manifest, sealer: Sealer) -> None:
        """Commit what another session holds, whose files are linked here already, under its sealer."""
        self._sealer = sealer
        self.put(manifest)

    def _settle(self, manifest: Manifest) -> Manifest:
        """Segments that no checkpoint names go; the marks of owned ones fall to what is still referred to."""
        kept = []
        for segment in manifest.segments:
            ends, index_bytes = [], 0
            for checkpoint in manifest.checkpoints:
                for (each, end), pair in zip(manifest.ends(checkpoint), checkpoint.segments, strict=True):
                    if each.number == segment.number:
                        ends.append(end)
                        index_bytes = max(index_bytes, pair[1])
            if not ends:
                continue
            if segment.owned and not self._shared(segment):
                high = tuple(max(column) for column in zip(*ends, strict=True))
                segment = replace(segment, high=high, index_bytes=index_bytes)
            kept.append(segment)
        return replace(manifest, segments=tuple(kept))

    def _shared(self, segment: Segment) -> bool:
        return self.folder.stat(f"index-{segment.number}").st_nlink > 1

    def write_tail(self, folder: PrivateFolder, commit: int, data: bytes) -> Blob:
        """Write the tail of a commit durably, under this session's key; into ``folder``, as a rule its own."""
        return self._write_blob(folder, f"tail-{commit}", data)

    def _write_blob(self, folder: PrivateFolder, name: str, data: bytes) -> Blob:
        data = self.sealer.wrap(data, name)
        folder.write(name, data)
        return Blob(file=name, bytes=len(data), xxh3=text_sum(data))

    # ---- files

    def _clean(self) -> None:
        """Remove what no manifest names: leftovers of an interruption, and tails that are no longer kept."""
        begun = f"data-{self._begun.number}-" if self._begun else None
        named = {MANIFEST, lock.NAME, *self.manifest.files()}
        for name in self.folder.names():
            if name not in named and not (begun and name.startswith(begun)):
                self.folder.remove(name)

    def _trim(self) -> None:
        """Give back the space that was reserved behind the groups of owned segments."""
        sizes = self.manifest.files()
        for segment in self.manifest.segments:
            if segment.owned and not self._shared(segment):
                for name in [name for name in sizes if name.startswith(f"data-{segment.number}-")]:
                    self.folder.truncate(name, sizes[name])


def cut_tail(layout: Layout, stored: Stored, current: Checkpoint, groups: int) -> tuple[Counts, Arrays]:
    """Groups on disk by layer, and the tail, of the first ``groups`` whole groups of a checkpoint."""
    tokens = groups * layout.group_tokens
    flushed = tuple(min(each, groups) for each in current.flushed)
    tail: Arrays = {"ids": np.array(stored.ids[:tokens], np.int64)}
    for layer, (old, new) in enumerate(zip(current.flushed, flushed, strict=True)):
        waiting = stored.tail[f"waiting-{layer}"].reshape(2 * layout.kv_heads, -1)
        kept_bytes = max(0, tokens - old * layout.group_tokens) * layout.head_dim * layout.geometry.itemsize_bytes
        assert new == old or kept_bytes == 0
        tail[f"waiting-{layer}"] = waiting[:, :kept_bytes].reshape(-1)
    return flushed, tail
