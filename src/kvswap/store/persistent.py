"""The groups of one session on disk: files that outlive the store, and a seal for every group.

A seal is a checksum, or the tag of authenticated encryption. Groups are sealed as they are written and checked as they
are read. A row's groups may be spread over several files (``store/segments.py``), since forks share files. Threads are
as in ``store/groups.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvswap.errors import DamagedError, DiskError
from kvswap.store.group_seals import GroupSealer, Seals
from kvswap.store.groups import GroupStore
from kvswap.store.segments import Segments

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistentFiles:
    """The files of a session as a store takes them over. The store does not write back to it.

    Parameters
    ----------
    segments, stored_groups, seals
        Where groups are, how many there are of each row ``(rows,)``, and their seals ``(rows, groups)``.
    sealer, verify
        What seals groups, and whether they are checked when they are read.
    appendable
        Whether new groups may follow those of the last segment. Otherwise the first ``append`` begins another one.
    label
        Names the session in messages: ``session NAME``.
    begin_segment
        ``begin_segment(starts, stripe_groups)`` makes the file of one more segment, which holds groups from
        ``starts[row]`` on; returns the file.
    reserve
        ``reserve(bytes)`` is called before files take more space, and raises StorageError to refuse.
    """

    segments: Segments
    stored_groups: Int
    seals: Seals
    sealer: GroupSealer
    verify: bool
    appendable: bool
    label: str
    begin_segment: Callable[[Int, int], int]
    reserve: Callable[[int], None]


class PersistentGroupStore(GroupStore):
    """As ``GroupStore``, over the files of a session. One sequence."""

    def __init__(self, files: PersistentFiles, **common: Any) -> None:
        self._files, self._appendable = files, files.appendable
        self._stored_groups, self._seals = files.stored_groups.copy(), files.seals
        self._changed = False
        self._sync_error: DiskError | None = None
        self.checked = files.verify or files.sealer.encrypts
        files.sealer.begin()
        super().__init__(**common)

    def seals(self, layer: int, start: int, stop: int) -> Seals:
        """A copy of the seals of groups ``[start, stop)`` of a layer."""
        return self._seals[layer, start:stop].copy()

    def sync(self) -> None:
        """Make everything appended so far durable. After a failure the store takes nothing more.

        The system may have dropped what it could not write. So a second try would succeed without the bytes.
        """
        self._check_sync()
        self.writer.flush()
        if not self._changed:
            return
        try:
            self.backend.sync(int(self.segments.files[-1, 0]))
        except DiskError as error:
            self._sync_error = error
            raise
        self._changed = False

    def _check_sync(self) -> None:
        if self._sync_error is not None:
            raise self._sync_error

    def unseal(self, rows: Int, groups: Int, slots: NDArray[np.uint8], places: Int | None = None) -> None:
        """Check groups that were read, and decrypt them in place; see the base class."""
        if not self.checked or not len(rows):
            return
        used = slots[:, : self.layout.geometry.group_bytes]
        wrong = ~self._files.sealer.unseal(rows // self.batch, groups, used, self._seals[rows, groups], places)
        if wrong.any():
            row, group = int(rows[wrong][0]), int(groups[wrong][0])
            label = self._files.label
            raise DamagedError(
                f"{label} is damaged: group {group} of layer {row // self.batch} is not what was written",
                hint=f"kvswap sessions repair {label.split()[-1]} keeps the context before it",
            )

    def _open(self, rows: int, groups: int) -> tuple[Segments, int]:
        segments, stored = self._files.segments, self._files.stored_groups
        self._stripe_groups = self.layout.stripe_groups(groups - int(stored.min()))
        if not self._appendable:
            return segments, 0
        begun = np.flatnonzero(stored > segments.starts[-1]).tolist()
        used = max((segments.place(row, int(stored[row]) - 1)[1] + 1 for row in begun), default=0)
        return segments, used * self.layout.slot_bytes

    def _make_room(self, row: int, end: int) -> None:
        self._check_sync()
        if not self._appendable:
            starts = self._stored_groups.copy()
            self.segments.add(starts, self._files.begin_segment(starts, self._stripe_groups), self._stripe_groups)
            self._size_bytes, self._appendable = 0, True
        super()._make_room(row, end)

    def _before_growth(self, nbytes: int) -> None:
        self._files.reserve(nbytes)

    def _before_write(self, row: int, first: int, buffer: NDArray[np.uint8]) -> None:
        """Zero the padding of packed groups, which would be old bytes of somebody, and seal them."""
        slots = buffer.reshape(-1, self.layout.slot_bytes)
        used_bytes = self.layout.geometry.group_bytes
        slots[:, used_bytes:] = 0
        end = first + len(slots)
        if end > self._seals.shape[1]:
            wider = np.zeros((len(self._seals), max(end, self._seals.shape[1] * 5 // 4)), self._seals.dtype)
            wider[:, : self._seals.shape[1]] = self._seals
            self._seals = wider
        self._seals[row, first:end] = self._files.sealer.seal(row // self.batch, first, slots[:, :used_bytes])
        self._stored_groups[row] = end
        self._changed = True
