"""Two sessions over the same files: forks and shared prefixes.

Both give the files of one session a second name in another (hard links; copies where the file system has none). A fork
is a new session with the whole history of its source. A shared prefix lets an empty session begin with the tokens that
another session has in common with its prompt.

Prefixes are compared token by token. K, V of a token depend on every token before it, so what can be shared is a common
beginning: up to its last whole group, or the whole source if all of it is a prefix of the prompt. Imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvswap.disk.private_folder import PrivateFolder
from kvswap.errors import KVSwapError
from kvswap.sessions.arrays import encode_arrays
from kvswap.sessions.catalog import sibling_paths
from kvswap.sessions.checkpoint_contents import CheckpointContents, replace_text, truncate_contents
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.committed import MANIFEST
from kvswap.sessions.lock import new_session_folder
from kvswap.sessions.manifest import Checkpoint, Manifest, Segment
from kvswap.sessions.manifest_json import encode
from kvswap.sessions.quota import counted

MIN_SHARED_TOKENS = 256
"""A shorter prefix is computed sooner than it is shared."""

_logger = logging.getLogger("kvswap")


# ---- forks


def fork(source: SessionStore, path: Path) -> int:
    """Create the session ``path`` from what is committed in ``source``, which is open for writing; bytes of new disk.

    The fork appears complete or not at all. Raises SessionError where the name is taken, DiskWriteError, DiskFullError.
    """
    sign = source.sealer.sign
    encrypted = source.manifest.encryption is not None
    with new_session_folder(path, encrypted=encrypted) as target, counted(target):
        _share_files(source.folder, target, list(source.manifest.files()))
        now = int(time.time())
        manifest = replace(
            source.manifest,
            created=now,
            used=now,
            written_bytes=target.written_bytes,
            segments=tuple(replace(segment, owned=False) for segment in source.manifest.segments),
        )
        target.sync()
        target.replace(MANIFEST, encode(manifest, sign))
    return target.written_bytes


# ---- shared prefixes


def common_tokens(ids: Sequence[int], stored_ids: Sequence[int]) -> int:
    """How many tokens both begin with. The last of ``ids`` never counts, because something has to be computed."""
    limit = min(len(ids) - 1, len(stored_ids))
    different = np.flatnonzero(np.array(ids[:limit]) != np.array(stored_ids[:limit]))
    return int(different[0]) if len(different) else limit


def shareable_tokens(ids: Sequence[int], contents: CheckpointContents, group_tokens: int) -> int:
    """Tokens of ``ids`` that a session can share: all that it stores, or whole groups of it.

    A context with sliding-window layers is shared as a whole or not at all.
    """
    common = common_tokens(ids, contents.ids[: contents.tokens])
    if common == contents.tokens:
        return common
    return 0 if contents.has_sliding_layers else common // group_tokens * group_tokens


def find_prefix(paths: Sequence[Path], ids: Sequence[int], fits: Callable[[Manifest], bool]) -> list[tuple[int, Path]]:
    """Sessions that can share a prefix of ``ids``: how many tokens, and the path; the longest prefix first.

    Sessions that cannot be read, do not fit, or share fewer than ``MIN_SHARED_TOKENS`` are left out.
    """
    found = []
    for path in paths:
        try:
            with SessionStore.open(path, write=False) as store:
                found.append((_common_now(store, ids, fits), path))
        except (KVSwapError, OSError):
            continue
    return sorted((each for each in found if each[0] >= MIN_SHARED_TOKENS), reverse=True)


def share_prefix(
    target: SessionStore, ids: Sequence[int], fits: Callable[[Manifest], bool], conversation: bytes = b""
) -> str | None:
    """Let an empty session begin with the longest prefix of ``ids`` that a closed session beside it stores.

    Returns the name of that session; None where no session ``fits`` and shares enough. Raises DiskError.
    """
    encrypted = target.manifest.encryption is not None

    def usable(found: Manifest) -> bool:
        return (found.encryption is not None) == encrypted and fits(found)

    for _, path in find_prefix(sibling_paths(target.folder.path), ids, usable):
        try:
            source = SessionStore.open(path, write=True)  # fails while another process has it open
        except KVSwapError:
            continue
        with source:
            tokens = _common_now(source, ids, usable)  # another process may have changed or replaced it meanwhile
            if tokens >= MIN_SHARED_TOKENS:
                _copy_prefix(target, source, tokens, conversation)
                _logger.debug("%s: shares %d tokens with %s", target.label, tokens, source.label)
                return source.name
    return None


def _common_now(source: SessionStore, ids: Sequence[int], fits: Callable[[Manifest], bool]) -> int:
    """Tokens of ``ids`` that a session can share as it is now; 0 where it does not fit or cannot be read."""
    layout = source.manifest.layout
    if layout is None or not fits(source.manifest):
        return 0
    try:
        contents = source.load(tail_only=True)
    except KVSwapError:
        return 0
    return shareable_tokens(ids, contents, layout.group_tokens) if contents is not None else 0


def _copy_prefix(target: SessionStore, source: SessionStore, tokens: int, conversation: bytes) -> None:
    """Let an empty session begin with the first ``tokens`` of ``source``.

    Both are open for writing, and both are encrypted or none is. The target gets the key of the source, but neither its
    earlier checkpoints nor its conversation, but ``conversation``. An interruption leaves the target empty.
    """
    manifest, contents = source.manifest, source.load()
    layout, current, basis = manifest.layout, manifest.current, manifest.basis
    assert contents is not None and layout is not None and current is not None and basis is not None
    if target.manifest.checkpoints or (target.manifest.encryption is None) != (manifest.encryption is None):
        raise ValueError(f"{target.label} is not empty, or only one of the two sessions is encrypted")
    before_bytes = target.folder.written_bytes
    segments = _shared_segments(manifest, current)
    names = [basis.file]
    for segment in segments:
        names += [f"index-{segment.number}", *segment.names()]
    _share_files(source.folder, target.folder, names)
    flushed, tail = current.flushed, replace_text(contents, contents.ids[: current.tokens], conversation)
    if tokens < current.tokens:
        flushed, tail = truncate_contents(layout, contents, tokens // layout.group_tokens, conversation)
    blob = source.write_tail(target.folder, 0, encode_arrays(tail))
    checkpoint = replace(current, commit=0, interim=False, tokens=tokens, flushed=flushed, tail=blob)
    written_bytes = target.folder.written_bytes - before_bytes
    target.publish(
        replace(
            target.manifest,
            commits=1,
            written_bytes=target.manifest.written_bytes + written_bytes,
            encryption=manifest.encryption,
            rates=manifest.rates,
            model=manifest.model,
            layout=layout,
            basis=basis,
            segments=segments,
            checkpoints=(checkpoint,),
        ),
        sealer=source.sealer,
    )


def _shared_segments(manifest: Manifest, checkpoint: Checkpoint) -> tuple[Segment, ...]:
    numbers = [number for number, _ in checkpoint.segments]
    return tuple(replace(manifest.segment(number), owned=False) for number in numbers)


def _share_files(source: PrivateFolder, target: PrivateFolder, names: Sequence[str]) -> None:
    for name in names:
        if not target.link_from(source, name):
            target.copy_from(source, name)
