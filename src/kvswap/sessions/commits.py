"""One session's folder as a store with commits (docs/file-format.md).

``SessionStore.commit`` makes a new state durable; ``undo`` and ``rollback`` go back. ``truncate`` takes tokens back in
memory, for the next commit. ``publish`` is the one place where a state becomes the committed one: it replaces the
manifest. An interruption anywhere leaves the last committed state or the new one (``committed.py``).

A writer holds the session's lock from ``open`` to ``close``. Readers hold none. Everything that is read is checked
against checksums, shapes and limits before it is used, and raises DamagedError where it is not what was written. Whole
groups are written by the group store, through descriptors from ``open_data``. Imports no torch. One thread.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvswap.core.load_or_recompute import Rates
from kvswap.disk.private_folder import PrivateFolder
from kvswap.errors import KVSwapError, SessionError, undo_after
from kvswap.sessions import encrypted_names, lock
from kvswap.sessions.arrays import Arrays, damaged, decode_arrays, encode_arrays
from kvswap.sessions.checkpoint_contents import CheckpointContents, decode_tail, replace_text, truncate_contents
from kvswap.sessions.committed import MANIFEST, Committed
from kvswap.sessions.encryption import create_sealer, new_encryption
from kvswap.sessions.index import LayerIndex, batch_name, decode_index, empty_index, encode_batch, join_indexes
from kvswap.sessions.manifest import (
    MAX_CHECKPOINTS,
    MAX_SEGMENTS,
    Blob,
    Checkpoint,
    Counts,
    Layout,
    Manifest,
    Model,
    Segment,
)
from kvswap.sessions.manifest_json import encode
from kvswap.sessions.seal import Sealer
from kvswap.sessions.whole_files import check_files_of, read_blob, read_file, write_blob

BASIS = "basis"

_logger = logging.getLogger("kvswap")


class SessionStore:
    """An open session's folder. ``label`` is "session NAME", for messages."""

    def __init__(self, folder: PrivateFolder, *, write: bool, check_files: bool = True) -> None:
        self.folder, self.writable = folder, write
        self.name = folder.path.name
        self.label = f"session {self.name}"
        self._lock: int | None = lock.acquire(folder, self.label) if write else None
        self._new_segment: Segment | None = None  # written to, but not committed yet
        self._cut: tuple[Checkpoint | None, Arrays] | None = None  # what ``truncate`` has kept, and its tail
        self._sound = False
        try:
            self._committed = Committed(folder, self.label, write=write)
            if check_files:
                self._committed.steady(lambda: check_files_of(folder, self.manifest, self.label))
            if write and check_files:
                self._remove_leftovers()
            self._sound = check_files
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, *, write: bool, check_files: bool = True) -> SessionStore:
        """Open an existing session. ``check_files=False`` checks the manifest alone, for repair.

        Raises SessionError, StorageError, DamagedError.
        """
        if not os.path.lexists(path):
            raise SessionError(f"there is no session {path.name}", hint="see: kvswap sessions list")
        folder = PrivateFolder(path)
        try:
            return cls(folder, write=write, check_files=check_files)
        except BaseException:
            folder.close()
            raise

    @classmethod
    def create(cls, path: Path, *, encrypt: bool = False) -> SessionStore:
        """Create an empty session and open it for writing. Raises SessionError: name taken, no key to encrypt with."""
        label = f"session {path.name}"
        with lock.new_session_folder(path, encrypted=encrypt) as folder:
            encryption, now = new_encryption(label) if encrypt else None, int(time.time())
            manifest = Manifest(created=now, used=now, encryption=encryption)
            folder.replace(MANIFEST, encode(manifest, create_sealer(encryption, label).sign))
        return cls.open(path, write=True)

    def close(self, *, discard_empty: bool = False) -> None:
        """Release the lock. May be called twice.

        With ``discard_empty`` a session that nothing was ever committed to is removed.
        """
        locked, self._lock = self._lock, None
        try:
            if locked is not None and self._sound and self._is_settled():
                if discard_empty and not self.manifest.checkpoints and self.manifest.written_bytes == 0:
                    shutil.rmtree(self.folder.path, ignore_errors=True)
                    encrypted_names.forget(self.folder.path)
                else:
                    self._release_reserved_space()
        finally:
            try:
                if locked is not None:
                    lock.release(locked)
            finally:
                self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        undo_after(error, self.close) if error is not None else self.close()

    # ---- reading

    @property
    def manifest(self) -> Manifest:
        """What is committed now."""
        return self._committed.manifest

    def refresh(self) -> Manifest:
        """What is committed now; see ``Committed.refresh``."""
        return self._committed.refresh()

    @property
    def base(self) -> Checkpoint | None:
        """The checkpoint that the next commit continues; None where it starts from nothing."""
        return self._cut[0] if self._cut is not None else self.manifest.current

    @property
    def truncated(self) -> bool:
        """Whether ``truncate`` has taken tokens back since the last commit."""
        return self._cut is not None

    @property
    def sealer(self) -> Sealer:
        """What seals and unseals this session; see ``Committed.sealer``."""
        return self._committed.sealer

    def load(self, checkpoint: Checkpoint | None = None, *, tail_only: bool = False) -> CheckpointContents | None:
        """The contents of a checkpoint, ``base`` unless another one is given; None where there is none.

        Raises DamagedError, SessionError.
        """
        if checkpoint is None:
            return self._committed.steady(lambda: self._load(None, tail_only))
        return self._load(checkpoint, tail_only)

    def _load(self, checkpoint: Checkpoint | None, tail_only: bool) -> CheckpointContents | None:
        cut = self._cut if checkpoint is None else None
        manifest, checkpoint = self.manifest, checkpoint or self.base
        if checkpoint is None or manifest.layout is None:
            return None
        layout, indexes = manifest.layout, []
        pairs = () if tail_only else checkpoint.segments
        for (segment, ends), (number, index_bytes) in zip(manifest.ends(checkpoint), pairs, strict=False):
            data, label = (
                read_file(self.folder, f"index-{number}", index_bytes, self.label),
                f"{self.label}: index-{number}",
            )
            indexes.append(decode_index(data, layout, self.sealer, number, segment.start, ends, label))
        tail = cut[1] if cut else decode_tail(self._read_blob(checkpoint.tail), layout, checkpoint, self.label)
        groups = join_indexes(indexes) if indexes else empty_index(layout, self.sealer)
        return CheckpointContents(tokens=checkpoint.tokens, flushed=checkpoint.flushed, tail=tail, groups=groups)

    def basis(self) -> list[NDArray[np.float32]]:
        """The basis of every layer's sketch, ``[basis_rows, rank]`` each; a transform of version 1 has two rows less.

        Raises DamagedError.
        """
        layout, blob = self.manifest.layout, self.manifest.basis
        assert layout is not None and blob is not None
        arrays = decode_arrays(self._read_blob(blob), f"{self.label}: {blob.file}")
        rows = {layout.basis_rows, layout.basis_rows - 2 * (layout.scale_rows == 0)}
        found = [arrays.get(str(layer)) for layer in range(layout.layers)]
        shapes = {(each, layout.sketch_rank) for each in rows}
        if any(each is None or each.dtype != np.float32 or each.shape not in shapes for each in found):
            raise damaged(self.label, "its basis has other shapes")
        return [each.astype(np.float32, copy=False) for each in found if each is not None]

    # ---- committing

    def open_data(self, name: str, *, direct: bool) -> int:
        """A descriptor of a data file, which the caller closes. That of a segment that has just begun is created."""
        if self._new_segment is not None and name in self._new_segment.names():
            return self.folder.make(name, direct=direct)
        return self.folder.open(name, write=self.writable, direct=direct)

    def appendable(self) -> bool:
        """Whether new groups may follow those of the base's last segment, in the same file.

        They do not in a segment of format version 1 or 2, which has one file a layer.
        """
        current = self.base
        if current is None or not current.segments:
            return False
        number, index_bytes = current.segments[-1]
        last = self.manifest.segment(number)
        whole = last.high == current.flushed and last.index_bytes == index_bytes
        return last.owned and whole and last.stripe_groups is not None

    def begin_segment(self, start: Counts, stripe_groups: int) -> Segment:
        """Begin a segment for new groups from ``start`` on. Raises SessionError after too many."""
        current = self.base
        if current is not None and len(current.segments) >= MAX_SEGMENTS:
            raise SessionError(
                f"{self.label} was forked and truncated {MAX_SEGMENTS} times, which is the limit",
                hint="export it and import it again, which joins its files",
            )
        number = max((segment.number for segment in self.manifest.segments), default=-1) + 1
        self._new_segment = Segment(
            number=number, owned=True, start=start, high=start, index_bytes=0, stripe_groups=stripe_groups
        )
        return self._new_segment

    def commit(
        self,
        *,
        model: Model,
        layout: Layout,
        basis: Arrays | None,
        tokens: int,
        flushed: Counts,
        new_groups: Sequence[LayerIndex],
        tail: Arrays,
        data_bytes: int,
        interim: bool,
        rates: Rates = Rates(),  # noqa: B008 - frozen
    ) -> None:
        """Make a new state durable. Its data files have to be durable already.

        ``new_groups`` has the groups of every layer from the base's ``flushed`` up to this one's. ``basis`` is needed
        once. ``data_bytes`` were written to data files. The next commit replaces an ``interim`` one. Raises DiskError.
        """
        manifest, before_bytes = self.manifest, self.folder.written_bytes
        pairs, segments = self._append_index(new_groups, flushed, layout)
        basis_blob = manifest.basis or self._write_blob(self.folder, BASIS, encode_arrays(basis or {}))
        checkpoint = Checkpoint(
            commit=manifest.commits,
            interim=interim,
            tokens=tokens,
            flushed=flushed,
            tail=self.write_tail(self.folder, manifest.commits, encode_arrays(tail)),
            segments=pairs,
        )
        earlier = manifest if layout == manifest.layout else replace(manifest, checkpoints=())
        written_bytes = data_bytes + self.folder.written_bytes - before_bytes
        self.publish(
            replace(
                earlier.with_checkpoint(checkpoint),
                written_bytes=manifest.written_bytes + written_bytes,
                rates=rates.better(manifest.rates) if manifest.rates else rates,
                model=model,
                layout=layout,
                basis=basis_blob,
                segments=segments,
            )
        )
        self._new_segment, self._cut = None, None
        _logger.debug("%s: committed %d tokens, %d bytes written", self.label, tokens, written_bytes)

    def commit_text(self, ids: Sequence[int], conversation: bytes, *, interim: bool) -> None:
        """Make other token ids and another conversation durable, for K, V that the base stores. Raises DiskError."""
        current, contents = self.base, self.load(tail_only=True)
        assert current is not None and contents is not None
        manifest, before_bytes = self.manifest, self.folder.written_bytes
        tail = encode_arrays(replace_text(contents, ids, conversation))
        blob = self.write_tail(self.folder, manifest.commits, tail)
        found = manifest.with_checkpoint(replace(current, interim=interim, commit=manifest.commits, tail=blob))
        written_bytes = self.folder.written_bytes - before_bytes
        self.publish(replace(found, written_bytes=manifest.written_bytes + written_bytes))
        self._cut = None

    def publish(self, manifest: Manifest, *, sealer: Sealer | None = None) -> None:
        """Replace the manifest, durably: from here on ``manifest`` is what is committed, sealed with ``sealer``."""
        sealer = sealer or self.sealer
        manifest = replace(manifest, used=int(time.time())).without_unused_segments(self._is_shared)
        self._committed.replace(manifest, sealer)
        self._remove_leftovers()

    def write_tail(self, folder: PrivateFolder, commit: int, data: bytes) -> Blob:
        """Write the tail of a commit durably, sealed with this session's key; ``folder`` may be another session's."""
        return self._write_blob(folder, f"tail-{commit}", data)

    # ---- going back

    def undo(self) -> None:
        """Go back to the checkpoint before the newest one. Raises SessionError when there is none."""
        if self._cut is not None:
            return self.rollback()
        if not self.manifest.checkpoints:
            raise SessionError(f"{self.label} has nothing to take back", hint="it contains no tokens")
        if len(self.manifest.checkpoints) == 1 and self.manifest.checkpoints[0].commit > 0:
            raise SessionError(
                f"{self.label}: turns further back are not kept",
                hint=f"only the newest {MAX_CHECKPOINTS} are; start a new session",
            )
        self.publish(self.manifest.without_newest())

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of the base, up to the last whole group.

        Nothing changes on disk before the next commit, which replaces what was taken back. Until then ``rollback`` and
        ``undo`` bring it back. A context with sliding-window layers cannot go back into its middle, so nothing of it is
        kept. Where nothing is kept, the next commit starts from nothing.
        """
        layout, current = self.manifest.layout, self.base
        groups = max(0, min(tokens, current.tokens)) // layout.group_tokens if layout and current else 0
        contents = self.load(tail_only=True) if groups else None
        if self._new_segment is not None:  # its file would be in the way of the next one with its number
            self._new_segment = None
            self._remove_leftovers()
        if layout is None or current is None or contents is None or contents.has_sliding_layers:
            self._cut = (None, {}) if self.manifest.checkpoints else None
            return
        flushed, tail = truncate_contents(layout, contents, groups)
        self._cut = replace(current, tokens=groups * layout.group_tokens, flushed=flushed), tail

    def rollback(self) -> None:
        """Forget everything since the last commit: groups that were written, and what was truncated."""
        self._cut, self._new_segment = None, None
        self._remove_leftovers()

    # ---- details

    def _append_index(
        self, new_groups: Sequence[LayerIndex], flushed: Counts, layout: Layout
    ) -> tuple[tuple[tuple[int, int], ...], tuple[Segment, ...]]:
        """Write the batch of new groups; the segments of the new checkpoint, and all segments of the manifest."""
        current = self.base
        pairs = list(current.segments) if current else []
        segments = {segment.number: segment for segment in self.manifest.segments}
        if any(len(layer.seals) for layer in new_groups):
            if self._new_segment is not None:
                pairs.append((self._new_segment.number, 0))
                segments[self._new_segment.number] = self._new_segment
            number, index_bytes = pairs[-1]
            start = current.flushed if current else (0,) * layout.layers
            batch = encode_batch(start, new_groups, self.sealer, batch_name(number, index_bytes))
            self.folder.append(f"index-{number}", index_bytes, batch)
            pairs[-1] = (number, index_bytes + len(batch))
            segments[number] = replace(segments[number], high=flushed, index_bytes=index_bytes + len(batch))
        return tuple(pairs), tuple(segments.values())

    def _is_shared(self, segment: Segment) -> bool:
        return self.folder.stat(f"index-{segment.number}").st_nlink > 1

    def _remove_leftovers(self) -> None:
        """Remove files that no manifest names: those of an interruption, and tails that are no longer needed."""
        new_data = self._new_segment.names() if self._new_segment else ()
        named = {MANIFEST, lock.NAME, *self.manifest.files(), *new_data}
        for name in self.folder.names():
            if name not in named:
                self.folder.remove(name)

    def _release_reserved_space(self) -> None:
        """Give back the disk space that was reserved behind the groups of owned segments."""
        layout = self.manifest.layout
        for segment in self.manifest.segments:
            if layout is not None and segment.owned and not self._is_shared(segment):
                for name, size_bytes in segment.files(layout).items():
                    self.folder.truncate(name, size_bytes)

    def _is_settled(self) -> bool:
        """Whether it is known what is committed. Where the disk cannot say, nothing of the session is touched."""
        try:
            return self.manifest is not None
        except (KVSwapError, OSError):
            return False

    def _read_blob(self, blob: Blob) -> bytes:
        return read_blob(self.folder, blob, self.sealer, self.label)

    def _write_blob(self, folder: PrivateFolder, name: str, data: bytes) -> Blob:
        return write_blob(folder, name, data, self.sealer)
