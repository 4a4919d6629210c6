"""How published methods reuse groups: those of the step before, or none.

``PreviousSlots`` is the reuse buffer of KVSwap (arXiv 2511.11907, section 3.4). Every layer has its own slots, as many
as groups are selected. What a step selects and does not find there replaces what the step did not select. Under a limit
that pays for fewer slots, what does not fit is read again.
"""

from __future__ import annotations

import numpy as np

from kvswap.memory.slots import SlotPool
from kvswap.native.arrays import IntArray
from kvswap.selection.window import Window


class NoReuse(SlotPool):
    """Every selected group is read at every step."""

    @staticmethod
    def reuse_slots_for(affordable: int, window: Window, rows: int) -> int:
        """None."""
        return 0


class PreviousSlots(SlotPool):
    """``worth`` is 1 for what this step selected, 0 for the rest of the layer."""

    compiled_lookup = False
    keeps_written = False

    @staticmethod
    def reuse_slots_for(affordable: int, window: Window, rows: int) -> int:
        """As many as one step selects."""
        return min(affordable, rows * window.select_groups * window.selections)

    def lookup(self, layer: int, sequences: IntArray, groups: IntArray) -> IntArray:
        """Slot of each group, or -1 where it must be read."""
        found = self.table[layer * self.batch + sequences, groups].astype(np.int64)
        self.worth[self._part(layer)] = 0
        self.worth[found[found >= 0] - self.reuse_start] = 1
        return found

    def admit(self, layer: int, sequences: IntArray, groups: IntArray, staged: IntArray) -> None:
        """Keep groups that were just read into slots ``staged`` in place of what this step did not select."""
        part = self._part(layer)
        victims = part.start + np.flatnonzero(self.worth[part] == 0)[: len(groups)]
        count = len(victims)
        self._replace(victims, layer, self._keys(layer, sequences[:count], groups[:count]), staged)

    def _part(self, layer: int) -> slice:
        """This layer's share of the reuse slots."""
        share = self.reuse_slots // self.layers
        return slice(layer * share, (layer + 1) * share)
