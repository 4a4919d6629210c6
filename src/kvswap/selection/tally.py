"""What decode steps attended to, by the estimate that they chose groups by.

A method that scores groups by their attention mass estimates with every choice how much of the attention it keeps, and
where that attention is. ``Tally`` adds this up over layers and steps. Compiled steps write into it themselves
(``native/choose.c``). One thread.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from kvswap.native import step_loops
from kvswap.native.arrays import IntArray


class Tally:
    """Sums over the choices that were made since ``reset``: one for each layer, sequence and step that left groups out.

    The newest tokens are not in a sketch yet, so nothing here knows of them.

    Attributes
    ----------
    groups : float32 ``[B, N]``
        Share of each group in the estimated attention, mean over heads, where the group was selected. Sinks and recent
        window are not selected, so they have none.
    squares : float32 ``[B, N]``
        Square of each group's share of what its choice selected, summed over choices. Choices that go to few groups
        count for more here: layers that look something up attend sharply, others to what is always there.
    group_tokens
        G.
    fields
        What compiled steps write to.
    """

    def __init__(self, batch: int, capacity_groups: int, group_tokens: int, device: torch.device) -> None:
        self.group_tokens = group_tokens
        self.groups = torch.zeros(batch, capacity_groups, device=device)
        self.squares = torch.zeros_like(self.groups)
        self._kept = torch.zeros((), dtype=torch.float64, device=device)  # of choices in Python, left on the device
        self.fields = step_loops.Tally()
        self._describe()

    def add(self, mass: torch.Tensor, groups: IntArray, first: int, ends: IntArray) -> None:
        """Count a choice of ``groups`` ``[B, n]`` in ``[first, ends[b])``, by the ``mass`` ``[B, N]`` of all groups."""
        for sequence, end in enumerate(ends.tolist()):
            picked = groups[sequence][groups[sequence] < end]
            if end <= first:
                continue
            index = torch.from_numpy(np.ascontiguousarray(picked)).to(mass.device)
            row = mass[sequence] / mass[sequence].sum()
            self.groups[sequence].index_add_(0, index, row[index])
            self.squares[sequence].index_add_(0, index, (row[index] / row[index].sum().clamp(min=1e-30)) ** 2)
            self._kept += row[:first].sum() + row[index].sum() + row[end:].sum()
            self.fields.choices += 1

    @property
    def choices(self) -> int:
        """How many choices are in the sums."""
        return int(self.fields.choices)

    @property
    def mass_kept(self) -> float:
        """Estimated share of attention that the choices keep, as their mean; 1 before any."""
        kept = float(self.fields.kept) + float(self._kept)
        return kept / self.choices if self.choices else 1.0

    def grow(self, capacity_groups: int) -> None:
        """Make room for ``capacity_groups`` groups of each sequence; less is no change."""
        if more := max(0, capacity_groups - self.groups.shape[1]):
            self.groups, self.squares = (
                torch.nn.functional.pad(each, (0, more)) for each in (self.groups, self.squares)
            )
            self._describe()

    def reset(self) -> None:
        """Forget the shares of groups; the other sums go on."""
        self.groups.zero_()
        self.squares.zero_()

    @property
    def address(self) -> int:
        """Where compiled steps find the fields."""
        return ctypes.addressof(self.fields)

    def _describe(self) -> None:
        self.fields.groups, self.fields.squares = self.groups.data_ptr(), self.squares.data_ptr()
        self.fields.columns = self.groups.shape[1]
