"""Is a session what was written? And if not: what of it can be kept.

``check`` reads everything and changes nothing. ``repair`` goes back to the longest context that is whole; the damaged
files stay in a quarantine folder beside the sessions (as second names of the same files), and nothing is ever deleted.
Imports no torch.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kvswap.disk.private import PrivateFolder
from kvswap.errors import DamagedError, DiskReadError, StorageError
from kvswap.sessions.folder import SessionFolder
from kvswap.sessions.index import LayerIndex, decode_index, empty_index
from kvswap.sessions.manifest import Checkpoint, Manifest, Segment

QUARANTINE = ".damaged"
_PIECE_BYTES = 4 << 20
_READ_ERRORS = (DamagedError, DiskReadError, StorageError, FileNotFoundError)


@dataclass(slots=True)
class Report:
    """What ``check`` found. ``damaged`` holds ``(segment, layer, group)`` of groups that are not what was written."""

    groups: int = 0
    read_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: set[tuple[int, int, int]] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    """Commits whose tail or index cannot be used."""


def check(folder: SessionFolder) -> Report:
    """Read and compare everything that a session refers to."""
    report, manifest = Report(), folder.manifest
    _ = folder.sealer  # without the key nothing can be said, which is no damage
    for checkpoint in manifest.checkpoints:
        try:
            folder.load(checkpoint)
        except _READ_ERRORS as error:
            report.broken.add(checkpoint.commit)
            report.problems.append(f"commit {checkpoint.commit}: {_words(error)}")
    if manifest.checkpoints:
        try:
            folder.basis()
        except _READ_ERRORS as error:
            report.broken |= {checkpoint.commit for checkpoint in manifest.checkpoints}
            report.problems.append(f"basis: {_words(error)}")
    for segment in manifest.segments:
        _check_segment(folder, segment, report)
    return report


def repair(folder: SessionFolder) -> tuple[str, Path | None]:
    """Go back to what is whole; what was done, in words, and where the damaged files are (None: nothing was wrong).

    Raises DamagedError, after the whole session was moved to quarantine, where nothing can be kept.
    """
    report, manifest = check(folder), folder.manifest
    if not report.problems:
        return "nothing is wrong", None
    place = quarantine_path(folder.folder.path)
    _keep_copy(folder, place)
    whole = tuple(each for each in manifest.checkpoints if _intact(manifest, each, report))
    groups = _groups_before_damage(folder, report)
    best_tokens = whole[-1].tokens if whole else 0
    layout = manifest.layout
    if layout is not None and groups * layout.group_tokens > best_tokens:
        folder.cut(groups)
        kept = (*whole, folder.manifest.checkpoints[-1])
    elif whole:
        kept = whole
    else:
        folder.close()
        move_away(folder.folder.path, place)
        raise DamagedError(
            f"{folder.what} cannot be repaired; it was moved to {place}", hint="make it anew from its documents"
        )
    _adopt(folder, kept)
    return f"{kept[-1].tokens:,} of {manifest.checkpoints[-1].tokens:,} tokens are kept", place


def quarantine_path(path: Path) -> Path:
    """A new name in the quarantine folder for a session's files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return path.parent / QUARANTINE / f"{path.name}-{stamp}-{time.monotonic_ns() % 10**6:06d}"


def move_away(path: Path, place: Path) -> None:
    """Move a session's folder to quarantine, into what was copied there already if there is anything."""
    place.parent.mkdir(mode=0o700, exist_ok=True)
    if not place.exists():
        os.rename(path, place)
        return
    for name in os.listdir(path):  # second names of what is there already
        os.unlink(path / name)
    os.rmdir(path)


def _check_segment(folder: SessionFolder, segment: Segment, report: Report) -> None:
    layout = folder.manifest.layout
    assert layout is not None
    index = _index(folder, segment)
    for layer in range(layout.layers):
        first, end = segment.start[layer], segment.high[layer]
        seals = index[layer].seals
        report.groups += end - first
        name, slot_bytes = f"data-{segment.number}-{layer}", layout.slot_bytes
        piece = max(1, _PIECE_BYTES // slot_bytes)
        for start in range(0, end - first, piece):
            count = min(piece, end - first - start)
            found = np.zeros(count, np.bool_)
            try:
                data = folder.folder.read(name, count * slot_bytes, offset_bytes=start * slot_bytes)
                slots = np.frombuffer(data, np.uint8)[: len(data) // slot_bytes * slot_bytes].reshape(-1, slot_bytes)
                report.read_bytes += len(data)
                known = min(len(slots), max(0, len(seals) - start))
                used = slots[:known, : layout.geometry.group_bytes]
                found[:known] = folder.sealer.authentic(layer, first + start, used, seals[start : start + known])
            except _READ_ERRORS as error:
                report.problems.append(f"{name}: {_words(error)}")
            wrong = np.flatnonzero(~found)
            if len(wrong):
                shown = f"groups {first + start + wrong[0]} to {first + start + wrong[-1]}, {len(wrong)} of them"
                report.problems.append(f"{name}: layer {layer}: {shown} are not what was written")
                report.damaged |= {(segment.number, layer, first + start + int(each)) for each in wrong}


def _index(folder: SessionFolder, segment: Segment) -> list[LayerIndex]:
    """Seals of a segment as far as its index can be read; without any, all its groups count as damaged."""
    layout = folder.manifest.layout
    assert layout is not None
    try:
        data = folder.folder.read(f"index-{segment.number}", segment.index_bytes)
        return decode_index(data, layout, folder.sealer, segment.number, segment.start, segment.high, folder.what)
    except _READ_ERRORS:
        return empty_index(layout, folder.sealer)


def _intact(manifest: Manifest, checkpoint: Checkpoint, report: Report) -> bool:
    if checkpoint.commit in report.broken:
        return False
    ends = {segment.number: end for segment, end in manifest.ends(checkpoint)}
    return not any(number in ends and group < ends[number][layer] for number, layer, group in report.damaged)


def _groups_before_damage(folder: SessionFolder, report: Report) -> int:
    """Whole groups of the current context before its first damaged one; 0 where it cannot be cut."""
    manifest, current = folder.manifest, folder.manifest.current
    if current is None or manifest.layout is None or current.commit in report.broken:
        return 0
    stored = folder.load(current, tail_only=True)
    if stored is None or any(name.startswith("sliding-") for name in stored.tail):
        return 0
    ends = {segment.number: end for segment, end in manifest.ends(current)}
    hurt = [group for number, layer, group in report.damaged if number in ends and group < ends[number][layer]]
    return min(hurt, default=current.tokens // manifest.layout.group_tokens)


def _keep_copy(folder: SessionFolder, place: Path) -> None:
    place.parent.mkdir(mode=0o700, exist_ok=True)
    with_names = PrivateFolder.create(place)
    try:
        for name in folder.folder.names():
            if not with_names.link_from(folder.folder, name):
                with_names.copy_from(folder.folder, name)
        with_names.sync()
    finally:
        with_names.close()


def _adopt(folder: SessionFolder, kept: tuple[Checkpoint, ...]) -> None:
    """Commit those checkpoints alone; segments end with what they refer to, since what is behind may be damaged."""
    manifest = replace(folder.manifest, checkpoints=kept)
    segments = []
    for segment in manifest.segments:
        refers = [(each, pair) for each in kept for pair in each.segments if pair[0] == segment.number]
        if not refers:
            continue
        ends = [dict((s.number, end) for s, end in manifest.ends(each))[segment.number] for each, _ in refers]
        high = tuple(max(column) for column in zip(*ends, strict=True))
        index_bytes = max(pair[1] for _, pair in refers)
        segments.append(replace(segment, owned=False, high=high, index_bytes=index_bytes))
        for layer, count in enumerate(high):
            name = f"data-{segment.number}-{layer}"
            if count == segment.start[layer] and name not in folder.folder.names():
                folder.folder.write(name, b"")
    folder.put(replace(manifest, segments=tuple(segments)))


def _words(error: BaseException) -> str:
    return str(getattr(error, "message", "") or error)
