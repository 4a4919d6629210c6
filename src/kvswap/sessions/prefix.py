"""What another session holds of a prompt's beginning, and how a new session takes it over without copying it.

Token ids are compared one by one, never anything fuzzier: K, V of a token depend on every token before it, so only a
common beginning can be shared, up to the last whole group of it, or all of a session that is a beginning of the
prompt. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvswap.errors import KVSwapError
from kvswap.sessions.folder import SessionFolder, cut_tail
from kvswap.sessions.index import encode_arrays
from kvswap.sessions.manifest import Checkpoint, Manifest, Segment
from kvswap.sessions.reader import Stored
from kvswap.sessions.shelf import others

WORTH_TOKENS = 256
"""What is shorter is computed sooner than it is worth sharing."""


def shared_tokens(ids: Sequence[int], stored: Stored, group_tokens: int) -> int:
    """Tokens of ``ids`` that a session holds and can give: all of its own, or whole groups of them.

    At least the last of ``ids`` stays to be computed. A context with sliding-window state is given as a whole only.
    """
    limit = min(len(ids) - 1, stored.tokens)
    differ = np.flatnonzero(np.array(ids[:limit]) != np.array(stored.ids[:limit]))
    same = int(differ[0]) if len(differ) else limit
    if same == stored.tokens:
        return same
    sliding = any(name.startswith("sliding-") for name in stored.tail)
    return 0 if sliding else same // group_tokens * group_tokens


def find_prefix(paths: Sequence[Path], ids: Sequence[int], fits: Callable[[Manifest], bool]) -> list[tuple[int, Path]]:
    """Tokens that the sessions of ``paths`` can give for a prompt, and where, most first; those worth it alone.

    A session that cannot be read, or whose key is another one, is passed over.
    """
    found = []
    for path in paths:
        try:
            with SessionFolder.open(path, write=False) as folder:
                layout = folder.manifest.layout
                if layout is None or not fits(folder.manifest):
                    continue
                stored = folder.load(tail_only=True)
                if stored is not None:
                    found.append((shared_tokens(ids, stored, layout.group_tokens), path))
        except (KVSwapError, OSError):
            continue
    return sorted((each for each in found if each[0] >= WORTH_TOKENS), reverse=True)


def borrow(target: SessionFolder, ids: Sequence[int], fits: Callable[[Manifest], bool]) -> tuple[str, int]:
    """Let an empty session begin with what a closed one beside it holds of ``ids``: its name, and bytes of new disk.

    No name where none that ``fits`` has enough. See ``take_over``.
    """
    encrypted = target.manifest.encryption is not None

    def usable(found: Manifest) -> bool:
        return (found.encryption is not None) == encrypted and fits(found)

    for tokens, path in find_prefix(others(target.folder.path), ids, usable):
        try:
            source = SessionFolder.open(path, write=True)  # nobody else has it open
        except KVSwapError:
            continue
        with source:
            return source.name, take_over(target, source, tokens)
    return "", 0


def take_over(target: SessionFolder, source: SessionFolder, tokens: int) -> int:
    """Let an empty session begin with the first ``tokens`` of ``source``, sharing files; bytes of new disk.

    Both locks are held by the caller, and both are encrypted or none is; the new session gets the key of the source.
    Turns and conversation of the source stay with it. An interruption leaves ``target`` empty. Raises DiskError.
    """
    manifest, stored = source.manifest, source.load()
    layout, current, basis = manifest.layout, manifest.current, manifest.basis
    assert stored is not None and layout is not None and current is not None and basis is not None
    assert not target.manifest.checkpoints and (target.manifest.encryption is None) == (manifest.encryption is None)
    before_bytes = target.folder.written_bytes
    segments = _segments(manifest, current)
    names = [basis.file]
    for segment in segments:
        names += [f"index-{segment.number}", *(f"data-{segment.number}-{layer}" for layer in range(layout.layers))]
    for name in names:
        if not target.folder.link_from(source.folder, name):
            target.folder.copy_from(source.folder, name)
    flushed, tail = current.flushed, {name: each for name, each in stored.tail.items() if name != "conversation"}
    tail["ids"] = np.array(stored.ids[:tokens], np.int64)
    if tokens < current.tokens:
        flushed, tail = cut_tail(layout, stored, current, tokens // layout.group_tokens)
    sealed = source.write_tail(target.folder, 0, encode_arrays(tail))
    checkpoint = replace(current, commit=0, interim=False, tokens=tokens, flushed=flushed, tail=sealed)
    target.become(
        replace(
            target.manifest,
            commits=1,
            written_bytes=target.manifest.written_bytes + target.folder.written_bytes - before_bytes,
            encryption=manifest.encryption,
            rates=manifest.rates,
            model=manifest.model,
            layout=layout,
            basis=basis,
            segments=segments,
            checkpoints=(checkpoint,),
        ),
        source.sealer,
    )
    return target.folder.written_bytes - before_bytes


def _segments(manifest: Manifest, checkpoint: Checkpoint) -> tuple[Segment, ...]:
    numbers = [number for number, _ in checkpoint.segments]
    return tuple(replace(manifest.segment(number), owned=False) for number in numbers)
