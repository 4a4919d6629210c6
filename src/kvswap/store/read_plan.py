"""Plans the reads for groups that are not in memory. Pure arithmetic on arrays.

Groups that are neighbours on disk become one extent. Two extents are joined over a gap of other groups where reading
the gap costs less than another request, and staging has room for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.native import array_loops
from kvswap.native.arrays import IntArray


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Extents in units of groups.

    ``files``, ``first``, ``count`` and ``staging`` have one entry for each extent: its file, first group, number of
    groups, and first place in staging. ``place`` has the place in staging of each requested group, in the order given.
    """

    files: IntArray
    first: IntArray
    count: IntArray
    staging: IntArray
    place: IntArray


def plan_reads(files: IntArray, groups: IntArray, *, gap_groups: int, places: int) -> ReadPlan:
    """Plan reads for ``groups`` of ``files``, sorted by (file, group) and without repeats.

    Gaps of up to ``gap_groups`` are read through; with -1, neighbours are not joined either. Staging has ``places`` for
    groups, at least ``len(groups)``.
    """
    if len(groups) == 0:
        none = np.zeros(0, np.int64)
        return ReadPlan(none, none, none, none, none)
    if array_loops.available():
        extents, place = array_loops.plan_reads(files, groups, gap_groups, places - len(groups))
        return ReadPlan(extents[0], extents[1], extents[2], extents[3], place)
    return _plan_reads(files, groups, gap_groups, places)


def _plan_reads(files: IntArray, groups: IntArray, gap_groups: int, places: int) -> ReadPlan:
    step = np.diff(groups)
    same_file = files[1:] == files[:-1]
    joined = same_file & (step <= 1 + gap_groups)
    extra = np.where(joined, step - 1, 0)
    spare = places - len(groups)
    if extra.sum() > spare:  # bridge the narrowest gaps first
        order = np.argsort(extra, kind="stable")
        fits = np.zeros(len(extra), bool)
        fits[order] = np.cumsum(extra[order]) <= spare
        joined &= fits
    begin = np.concatenate(([True], ~joined))
    starts = np.flatnonzero(begin)
    ends = np.concatenate((starts[1:], [len(groups)])) - 1
    first = groups[starts]
    count = groups[ends] - first + 1
    staging = np.cumsum(count) - count
    extent = np.cumsum(begin) - 1
    return ReadPlan(files[starts], first, count, staging, staging[extent] + groups - first[extent])
