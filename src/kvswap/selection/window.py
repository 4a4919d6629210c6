"""Which groups a sequence attends to, and where the pinned ones live. Pure arithmetic.

A sequence of T tokens has its newest token in group ``current = (T - 1) // G``. Pinned in memory are the sink groups
``[0, S)`` and a ring of the newest groups; the ring has one place more than the recent window, for the group that
is being filled (the rolling tail). What lies between them is on disk and may be selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.terms import IntArray


@dataclass(frozen=True, slots=True)
class Window:
    """Sinks and recent window of one cache, in groups."""

    group_tokens: int
    sink_groups: int
    recent_groups: int
    select_groups: int
    votes: int = 1
    """Parties that select ``select_groups`` each: KV heads, where each selects for itself."""

    @property
    def fetch_groups(self) -> int:
        """Most groups that are selected, by all parties together."""
        return self.select_groups * self.votes

    @property
    def ring_groups(self) -> int:
        """Places of the ring: the recent window and the tail."""
        return self.recent_groups + 1

    @property
    def pinned_groups(self) -> int:
        """Places of one sequence and layer that are never given to another group."""
        return self.sink_groups + self.ring_groups

    @property
    def flush_groups(self) -> int:
        """Whole groups that may wait in the ring before they are written and sketched together."""
        return max(1, self.recent_groups // 2)

    @property
    def attended_groups(self) -> int:
        """Most groups that one sequence attends to in a step."""
        return self.pinned_groups + self.fetch_groups

    def home(self, groups: IntArray) -> IntArray:
        """Pinned place of each group, counted from the first place of its sequence and layer."""
        ring = self.sink_groups + (groups - self.sink_groups) % self.ring_groups
        return np.where(groups < self.sink_groups, groups, ring)

    def ring_start(self, current: int) -> int:
        """First group that the ring holds when ``current`` is the newest."""
        return max(self.sink_groups, current - self.recent_groups)

    def candidates(self, tokens: int) -> int:
        """End of the range ``[sink_groups, end)`` of groups that selection chooses from."""
        return self.ring_start((tokens - 1) // self.group_tokens)

    def selects_all(self, tokens: int) -> bool:
        """Whether every candidate fits the selection, so that nothing needs to be predicted."""
        return self.candidates(tokens) - self.sink_groups <= self.select_groups
