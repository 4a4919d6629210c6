"""Which groups a sequence attends to, and which slots the pinned ones have. Pure arithmetic.

A sequence of T tokens has its newest token in group ``current = (T - 1) // G``. Two kinds of groups are pinned in
memory: the sink groups ``[0, S)`` and a ring of the newest groups. The ring has one slot more than the recent window,
for the group that is being filled (the rolling tail). Groups between sinks and ring are on disk and may be selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.native.arrays import BoolArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is the same for all layers of one decode step. Slots are counted from a layer's first pinned slot."""

    current: IntArray  # [B] group of the newest token
    offset: IntArray  # [B] its place in that group
    ends: IntArray  # [B] end of the groups to select from
    most_candidates: int  # groups to select from, in the sequence that has most
    fewest_candidates: int  # and in the one that has fewest
    tail: IntArray  # [B] slot of the newest group
    sinks: IntArray  # [B, S] slots of the sink groups
    ring: IntArray  # [B, ring] slots of the newest groups, in order of position
    sinks_valid: BoolArray  # which of them hold a group already
    ring_valid: BoolArray
    new_group: list[int]  # sequences whose newest token begins a group
    all_pinned: bool  # whether every sink and ring slot holds a group
    same_offset: bool  # whether the newest group has as many tokens in every sequence

    def attended(
        self, first_pinned: IntArray, chosen: IntArray, valid: BoolArray | None
    ) -> tuple[IntArray, BoolArray | None]:
        """All slots to attend to, ``[B, W]`` in order of position, and which entries are real, None: all.

        ``first_pinned`` ``[B]`` are a layer's first pinned slots. ``chosen`` ``[B, n]`` are the slots of its selected
        groups, of which those in ``valid`` are real, None: all.
        """
        base = first_pinned[:, None]
        slots = np.concatenate((base + self.sinks, chosen, base + self.ring), axis=1)
        if valid is None and self.all_pinned:
            return slots, None
        real = np.ones(chosen.shape, np.bool_) if valid is None else valid
        valid = np.concatenate((self.sinks_valid, real, self.ring_valid), axis=1)
        if len(slots) == 1:
            return slots[valid][None], None
        return np.where(valid, slots, base), None if valid.all() else valid

    def token_mask(self, valid: BoolArray | None, width: int, group_tokens: int) -> BoolArray:
        """Which tokens of ``width`` groups a step attends to, ``[B, width * G]``; the last real group is the newest."""
        batch = len(self.offset)
        groups = np.ones((batch, width), np.bool_) if valid is None else valid
        counts = np.where(groups, group_tokens, 0)
        newest = width - 1 - groups[:, ::-1].argmax(axis=1)  # a sink, in a sequence that is shorter than its sinks
        counts[np.arange(batch), newest] = self.offset + 1
        tokens: BoolArray = np.arange(group_tokens) < counts[:, :, None]
        return tokens.reshape(batch, -1)


@dataclass(frozen=True, slots=True)
class Window:
    """Sinks and recent window of one cache, in groups."""

    group_tokens: int
    sink_groups: int
    recent_groups: int
    select_groups: int
    selections: int = 1
    """How many selections of ``select_groups`` one layer makes: one for all heads, or one for each KV head."""
    share: int = 0
    """Of a longer context more is attended to: one token in ``share``; 0: never more than ``select_groups``."""
    most_select_groups: int = 0
    """The most that are selected of any context where ``share`` is given."""

    def wanted_groups(self, tokens: int) -> int:
        """Groups to select from a context of ``tokens``, where memory allows."""
        if not self.share:
            return self.select_groups
        attended = tokens // self.share // self.group_tokens - self.sink_groups - self.recent_groups
        return max(self.select_groups, min(attended, self.most_select_groups))

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

    def pinned_slot(self, groups: IntArray) -> IntArray:
        """The pinned slot of each group, counted from the first one of its sequence and layer."""
        ring = self.sink_groups + (groups - self.sink_groups) % self.ring_groups
        return np.where(groups < self.sink_groups, groups, ring)

    def step(self, tokens: IntArray) -> Step:
        """One decode step of sequences that have ``tokens`` ``[B]`` with the newest one."""
        batch = len(tokens)
        current, offset = np.divmod(tokens - 1, self.group_tokens)
        ring_start = np.maximum(self.sink_groups, current - self.recent_groups)
        sinks = np.broadcast_to(np.arange(self.sink_groups), (batch, self.sink_groups))
        ring = current[:, None] + np.arange(-self.recent_groups, 1)
        sinks_valid, ring_valid = sinks <= current[:, None], ring >= ring_start[:, None]
        return Step(
            current=current,
            offset=offset,
            ends=ring_start,
            most_candidates=int(ring_start.max()) - self.sink_groups,
            fewest_candidates=int(ring_start.min()) - self.sink_groups,
            tail=self.pinned_slot(current),
            sinks=sinks,
            ring=self.pinned_slot(ring),
            sinks_valid=sinks_valid,
            ring_valid=ring_valid,
            new_group=np.flatnonzero(offset == 0).tolist(),
            all_pinned=bool(sinks_valid.all() and ring_valid.all()),
            same_offset=bool((offset == offset[0]).all()),
        )

    def ring_start(self, current: int) -> int:
        """First group that the ring holds when ``current`` is the newest."""
        return max(self.sink_groups, current - self.recent_groups)

    def candidates(self, tokens: int) -> int:
        """End of the range ``[sink_groups, end)`` of groups that selection chooses from."""
        return self.ring_start((tokens - 1) // self.group_tokens)

    def selects_all(self, tokens: int) -> bool:
        """Whether every candidate fits the smallest selection, so that nothing needs to be predicted."""
        return self.candidates(tokens) - self.sink_groups <= self.select_groups
