"""Reading a session's folder: its manifest, and what a checkpoint keeps (docs/file-format.md).

Everything is checked against checksums, shapes and limits before it is used. Raises DamagedError for whatever is not as
it was written. Imports no torch. One thread.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvswap.disk.private import PrivateFolder
from kvswap.errors import DamagedError
from kvswap.sessions.index import Arrays, LayerIndex, decode_arrays, decode_index, empty_index, join_indexes, take
from kvswap.sessions.keys import master_key
from kvswap.sessions.manifest import LIMIT_BYTES, Blob, Checkpoint, Counts, Layout, Manifest
from kvswap.sessions.parse import parse, signature
from kvswap.sessions.seal import Checksums, Cipher, Sealer
from kvswap.store.checksum import text_sum

MANIFEST = "manifest"
CONVERSATION_BYTES = 64 << 20


@dataclass(slots=True, kw_only=True)
class Stored:
    """What a checkpoint keeps beside whole groups, checked against checksums and shapes."""

    tokens: int
    flushed: Counts
    tail: Arrays
    groups: list[LayerIndex]
    """Empty layers where only the tail was asked for."""

    @property
    def ids(self) -> list[int]:
        """Token ids: as many as ``tokens``, or one more."""
        ids: list[int] = self.tail["ids"].tolist()
        return ids

    @property
    def conversation(self) -> bytes:
        """JSON of the turns; empty where there is none."""
        found = self.tail.get("conversation")
        return b"" if found is None else bytes(found.tobytes())


class SessionReader:
    """What a folder says. ``manifest`` is what is committed now."""

    manifest: Manifest

    def __init__(self, folder: PrivateFolder) -> None:
        self.folder = folder
        self.name = folder.path.name
        self.what = f"session {self.name}"
        self._sealer: Sealer | None = None
        self._signed = b"", ""

    @property
    def sealer(self) -> Sealer:
        """What seals and unseals this session. Raises SessionError without its key, DamagedError for a forged manifest.

        The key is asked for when it is first needed: to list or remove a session takes none.
        """
        if self._sealer is None:
            self._sealer = unlock(self.manifest, *self._signed, self.what)
        return self._sealer

    def load(self, checkpoint: Checkpoint | None = None, *, tail_only: bool = False) -> Stored | None:
        """What a checkpoint keeps, as a rule the base; None where that is nothing. Raises DamagedError."""
        manifest = self.manifest
        checkpoint = checkpoint or self.base
        if checkpoint is None or manifest.layout is None:
            return None
        layout, indexes = manifest.layout, []
        pairs = () if tail_only else checkpoint.segments
        for (segment, ends), (number, index_bytes) in zip(manifest.ends(checkpoint), pairs, strict=False):
            name = f"index-{number}"
            data = self._read(name, index_bytes)
            indexes.append(decode_index(data, layout, self.sealer, number, segment.start, ends, f"{self.what}: {name}"))
        tail = self._arrays(checkpoint.tail)
        self._check_tail(tail, layout, checkpoint)
        groups = join_indexes(indexes) if indexes else empty_index(layout, self.sealer)
        return Stored(tokens=checkpoint.tokens, flushed=checkpoint.flushed, tail=tail, groups=groups)

    def basis(self) -> list[NDArray[np.float32]]:
        """The basis of every layer's sketch, ``[basis_rows, rank]`` each; a transform of version 1 has two rows less.

        Raises DamagedError.
        """
        layout, blob = self.manifest.layout, self.manifest.basis
        assert layout is not None and blob is not None
        arrays, rows = self._arrays(blob), {layout.basis_rows, layout.basis_rows - 2 * (layout.scale_rows == 0)}
        found = [arrays.get(str(layer)) for layer in range(layout.layers)]
        shapes = {(each, layout.sketch_rank) for each in rows}
        if any(each is None or each.dtype != np.float32 or each.shape not in shapes for each in found):
            raise self._damaged("its basis has other shapes")
        return [each.astype(np.float32, copy=False) for each in found if each is not None]

    @property
    def base(self) -> Checkpoint | None:
        """What is loaded where no checkpoint is named."""
        return self.manifest.current

    def _read_manifest(self) -> Manifest:
        try:
            data = self.folder.read(MANIFEST, LIMIT_BYTES + 1)
        except FileNotFoundError as error:
            raise self._damaged("it has no manifest") from error
        if len(data) > LIMIT_BYTES:
            raise self._damaged("its manifest is too long")
        self._signed = signature(data)
        return parse(data, self.what)

    def _check_files(self) -> None:
        for name, size_bytes in self.manifest.files().items():
            try:
                os.close(self.folder.open(name))  # a plain file of ours
                found_bytes = self.folder.stat(name).st_size
            except FileNotFoundError as error:
                raise self._damaged(f"{name} is gone") from error
            if found_bytes < size_bytes:
                raise self._damaged(f"{name} has {found_bytes:,} bytes instead of {size_bytes:,}")

    def _read(self, name: str, size_bytes: int) -> bytes:
        try:
            data = self.folder.read(name, size_bytes)
        except FileNotFoundError as error:
            raise self._damaged(f"{name} is gone") from error
        if len(data) != size_bytes:
            raise self._damaged(f"{name} ends too early")
        return data

    def _arrays(self, blob: Blob) -> Arrays:
        data = self._read(blob.file, blob.bytes)
        if text_sum(data) != blob.xxh3:
            raise self._damaged(f"{blob.file} is not what was written")
        return decode_arrays(self.sealer.unwrap(data, blob.file, self.what), f"{self.what}: {blob.file}")

    def _check_tail(self, tail: Arrays, layout: Layout, checkpoint: Checkpoint) -> None:
        what = f"{self.what}: {checkpoint.tail.file}"
        ids = take(tail, "ids", np.int64, what)
        if ids.size not in (checkpoint.tokens, checkpoint.tokens + 1) or bool((ids.astype(np.int64) < 0).any()):
            raise self._damaged("its token ids do not fit its tokens")
        token_bytes = layout.geometry.token_bytes
        for layer, groups in enumerate(checkpoint.flushed):
            waiting_bytes = (checkpoint.tokens - groups * layout.group_tokens) * token_bytes
            take(tail, f"waiting-{layer}", np.uint8, what, waiting_bytes)
        if "conversation" in tail and take(tail, "conversation", np.uint8, what).size > CONVERSATION_BYTES:
            raise self._damaged("its conversation is too long")

    def _damaged(self, why: str) -> DamagedError:
        return DamagedError(f"{self.what} is damaged: {why}", hint=f"try: kvswap sessions repair {self.name}")


def unlock(manifest: Manifest, body: bytes, signed: str, what: str) -> Sealer:
    """The sealer of a session whose manifest was read with that signature; takes the key where it is encrypted.

    Raises SessionError for no key or another one, DamagedError for a manifest that is not authentic.
    """
    if manifest.encryption is None:
        return Checksums()
    sealer = Cipher(master_key(what), manifest.encryption, what)
    if not hmac.compare_digest(sealer.sign(body).encode(), signed.encode()):  # text must be ASCII, damage need not be
        raise DamagedError(
            f"{what} is damaged: its manifest is not authentic", hint=f"try: kvswap sessions repair {what.split()[-1]}"
        )
    return sealer
