"""Compare a session with its checksums, and repair one that is damaged.

``check`` reads everything and changes nothing. ``repair`` goes back to the longest context that is undamaged. The
damaged files stay in a quarantine folder beside the sessions, as second names of the same files; nothing is deleted.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kvswap.disk.private_folder import (
    PrivateFolder,
    is_folder,
    remove_tree,
    translate_os_errors,
    translate_read_errors,
)
from kvswap.errors import DamagedError
from kvswap.sessions import lock
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.committed import MAX_READS, READ_ERRORS, changes_too_fast
from kvswap.sessions.index import LayerIndex, decode_index, empty_index
from kvswap.sessions.manifest import Checkpoint, Manifest, Segment

QUARANTINE = ".damaged"
_PIECE_BYTES = 4 << 20


@dataclass(slots=True)
class Report:
    """What ``check`` found; ``problems`` in words."""

    groups: int = 0
    read_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_groups: set[tuple[int, int, int]] = field(default_factory=set)
    """``(segment, layer, group)`` of groups that are not what was written."""
    damaged_commits: set[int] = field(default_factory=set)
    """Commits whose tail or index cannot be used."""


def check(store: SessionStore) -> Report:
    """Read everything that a session refers to and compare it with its checksums. Raises SessionError: no key.

    What is wrong because another process has committed in between is read again, as of that commit.
    """
    for _ in range(MAX_READS):
        manifest = store.manifest
        report = _check(store, manifest)
        if not report.problems or store.refresh() is manifest:
            return report
    raise changes_too_fast(store.label)


def _check(store: SessionStore, manifest: Manifest) -> Report:
    report = Report()
    _ = store.sealer  # a missing key is an error, not damage
    for checkpoint in manifest.checkpoints:
        try:
            store.load(checkpoint)
        except READ_ERRORS as error:
            report.damaged_commits.add(checkpoint.commit)
            report.problems.append(f"commit {checkpoint.commit}: {_words(error)}")
    if manifest.checkpoints:
        try:
            store.basis()
        except READ_ERRORS as error:
            report.damaged_commits |= {checkpoint.commit for checkpoint in manifest.checkpoints}
            report.problems.append(f"basis: {_words(error)}")
    for segment in manifest.segments:
        _check_segment(store, segment, report)
    return report


def repair(store: SessionStore) -> tuple[str, Path | None]:
    """Go back to what is undamaged. Returns what was done, in words, and where the damaged files are, if there are any.

    Where nothing can be kept, the whole session is moved to quarantine and DamagedError is raised.
    """
    report, manifest = check(store), store.manifest
    if not report.problems:
        return "nothing is wrong", None
    place = quarantine_path(store.folder.path)
    _copy_to_quarantine(store, place)
    kept = tuple(each for each in manifest.checkpoints if _is_intact(manifest, each, report))
    groups, layout = _groups_before_damage(store, report), manifest.layout
    if layout is not None and groups * layout.group_tokens > (kept[-1].tokens if kept else 0):
        whole = store.load(tail_only=True)
        store.truncate(groups * layout.group_tokens)
        contents = store.load(tail_only=True)
        assert whole is not None and contents is not None
        store.commit_text(contents.ids, b"{}" if whole.conversation else b"", interim=True)
        kept = (*kept, store.manifest.checkpoints[-1])
    elif not kept:
        store.close()
        move_away(store.folder.path, place)
        raise DamagedError(
            f"{store.label} cannot be repaired; it was moved to {place}", hint="create it again from its documents"
        )
    _keep_only(store, kept)
    return f"{kept[-1].tokens:,} of {manifest.checkpoints[-1].tokens:,} tokens are kept", place


def repair_session(path: Path) -> tuple[str, Path | None]:
    """As ``repair``, for a session that may not open: one without a sound manifest is moved to quarantine.

    Raises DamagedError where nothing can be kept.
    """
    store: SessionStore | None = None
    try:
        store = SessionStore.open(path, write=True, check_files=False)
        _ = store.sealer  # checks that the manifest is authentic
    except DamagedError as error:
        if store is not None:
            store.close()
        place = _quarantine(path)
        raise DamagedError(
            f"{error.message}; it was moved to {place}", hint="create it again from its documents"
        ) from error
    except BaseException:
        if store is not None:
            store.close()
        raise
    with store:
        return repair(store)


# ---- quarantine


def quarantine_path(path: Path) -> Path:
    """A new name in the quarantine folder for a session's files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return path.parent / QUARANTINE / f"{path.name}-{stamp}-{time.monotonic_ns() % 10**6:06d}"


def quarantined(root: Path) -> list[Path]:
    """All folders in quarantine."""
    place = root / QUARANTINE
    with translate_read_errors(f"folder {place} cannot be read"):
        return sorted(place.iterdir()) if place.is_dir() else []


def remove_quarantined(root: Path) -> list[str]:
    """Remove all folders in quarantine for good; what was removed, in words."""
    removed = []
    with lock.creation_lock(root, exclusive=True) if is_folder(root) else contextlib.nullcontext():
        for path in quarantined(root):
            remove_tree(path)
            removed.append(f"quarantined {path.name}")
    return removed


def move_away(path: Path, place: Path) -> None:
    """Move a session's folder to ``place`` in quarantine, which may have its files already."""
    with translate_os_errors(f"session {path.name} cannot be moved to {place}"):
        place.parent.mkdir(mode=0o700, exist_ok=True)
        if not place.exists():
            os.rename(path, place)
            return
    remove_tree(path)  # it has second names of the files in quarantine


def _quarantine(path: Path) -> Path:
    """Move a session that nobody has open to quarantine; its new place."""
    place, folder = quarantine_path(path), PrivateFolder(path)
    try:
        locked = lock.acquire(folder, f"session {path.name}")
        try:
            move_away(path, place)
        finally:
            os.close(locked)
    finally:
        folder.close()
    return place


def _copy_to_quarantine(store: SessionStore, place: Path) -> None:
    """Second names for all files of a session; copies where the file system has no hard links."""
    with translate_os_errors(f"folder {place.parent} cannot be made"):
        place.parent.mkdir(mode=0o700, exist_ok=True)
    target = PrivateFolder.create(place)
    try:
        for name in store.folder.names():
            if not target.link_from(store.folder, name):
                target.copy_from(store.folder, name)
        target.sync()
    finally:
        target.close()


# ---- details


def _check_segment(store: SessionStore, segment: Segment, report: Report) -> None:
    layout = store.manifest.layout
    assert layout is not None
    index = _index(store, segment)
    for layer in range(layout.layers):
        begin, end = segment.start[layer], segment.high[layer]
        report.groups += end - begin
        wrong: dict[str, list[int]] = {}  # by file
        for run in segment.runs(layout, layer, begin, end, _PIECE_BYTES):
            seals = index[layer].seals[run.first - begin :][: run.count]
            right = np.zeros(run.count, np.bool_)
            try:
                data = store.folder.read(run.file, run.count * layout.slot_bytes, offset_bytes=run.offset_bytes)
                known = min(len(data) // layout.slot_bytes, len(seals))
                slots = np.frombuffer(data, np.uint8)[: known * layout.slot_bytes].reshape(known, layout.slot_bytes)
                report.read_bytes += len(data)
                used = slots[:, : layout.geometry.group_bytes]
                right[:known] = store.sealer.authentic(layer, run.first, used, seals[:known])
            except READ_ERRORS as error:
                problem = f"{run.file}: {_words(error)}"
                report.problems += [problem] if problem not in report.problems else []
            wrong.setdefault(run.file, []).extend((run.first + np.flatnonzero(~right)).tolist())
        for name, groups in wrong.items():
            if groups:
                shown = f"groups {groups[0]} to {groups[-1]}, {len(groups)} of them"
                report.problems.append(f"{name}: layer {layer}: {shown} are not what was written")
                report.damaged_groups |= {(segment.number, layer, group) for group in groups}


def _index(store: SessionStore, segment: Segment) -> list[LayerIndex]:
    """The index of a segment. If it cannot be read it is empty, so that all groups count as damaged."""
    layout = store.manifest.layout
    assert layout is not None
    try:
        data = store.folder.read(f"index-{segment.number}", segment.index_bytes)
        return decode_index(data, layout, store.sealer, segment.number, segment.start, segment.high, store.label)
    except READ_ERRORS:
        return empty_index(layout, store.sealer)


def _is_intact(manifest: Manifest, checkpoint: Checkpoint, report: Report) -> bool:
    if checkpoint.commit in report.damaged_commits:
        return False
    ends = {segment.number: end for segment, end in manifest.ends(checkpoint)}
    return not any(number in ends and group < ends[number][layer] for number, layer, group in report.damaged_groups)


def _groups_before_damage(store: SessionStore, report: Report) -> int:
    """Whole groups of the current context before its first damaged one; 0 where it cannot be truncated."""
    manifest, current = store.manifest, store.manifest.current
    if current is None or manifest.layout is None or current.commit in report.damaged_commits:
        return 0
    contents = store.load(current, tail_only=True)
    if contents is None or contents.has_sliding_layers:
        return 0
    ends = {segment.number: end for segment, end in manifest.ends(current)}
    damaged = [
        group for number, layer, group in report.damaged_groups if number in ends and group < ends[number][layer]
    ]
    return min(damaged, default=current.tokens // manifest.layout.group_tokens)


def _keep_only(store: SessionStore, kept: tuple[Checkpoint, ...]) -> None:
    """Commit these checkpoints alone. Segments end with what they refer to, because the rest may be damaged."""
    manifest, segments = replace(store.manifest, checkpoints=kept), []
    for segment in manifest.segments:
        found = manifest.referenced(segment)
        if found is None:
            continue
        high, index_bytes = found
        segments.append(replace(segment, owned=False, high=high, index_bytes=index_bytes))
        for name, size_bytes in segments[-1].files(manifest.layout).items() if manifest.layout else ():
            if not size_bytes and name not in store.folder.names():
                store.folder.write(name, b"")
    store.publish(replace(manifest, segments=tuple(segments)))


def _words(error: BaseException) -> str:
    return str(getattr(error, "message", "") or error)
