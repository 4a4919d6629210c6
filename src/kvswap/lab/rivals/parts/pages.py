"""What is kept of whole groups instead of tokens: bounds of their keys (Quest), or their mean (ShadowKV).

Both are rows of D elements a group in 16 bits, ``[B, H_kv, d, groups]`` float16.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.terms import FLOAT16_MAX, ceil_div, round_up

STEP_GROUPS = 64
ITEM_BYTES = 2


class GroupRows:
    """Rows of groups, appended group by group; grows by whole steps. One thread."""

    def __init__(
        self, *, batch: int, kv_heads: int, head_dim: int, group_tokens: int, capacity_tokens: int, device: torch.device
    ) -> None:
        capacity = round_up(ceil_div(capacity_tokens, group_tokens), STEP_GROUPS)
        self._rows = torch.zeros(batch, kv_heads, head_dim, capacity, dtype=torch.float16, device=device)
        self.groups: NDArray[np.int64] = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._rows.nbytes

    def append(self, sequence: int, rows: torch.Tensor) -> None:
        """Add ``[H_kv, n, d]``, one row a group, of any float dtype."""
        start = int(self.groups[sequence])
        stop = start + rows.shape[1]
        extra = round_up(stop, STEP_GROUPS) - self._rows.shape[3]
        if extra > 0:
            self._rows = torch.nn.functional.pad(self._rows, (0, extra))
        self._rows[sequence, :, :, start:stop] = rows.clamp(-FLOAT16_MAX, FLOAT16_MAX).transpose(1, 2)
        self.groups[sequence] = stop

    def products(self, query: torch.Tensor) -> torch.Tensor:
        """``query`` ``[B, H_kv, q, d]`` float32 times the rows: ``[B, H_kv, q, W]``, W groups, whole steps."""
        width = round_up(int(self.groups.max()), STEP_GROUPS)
        products: torch.Tensor = query @ self._rows[..., :width].float()
        return products

    def blank(self, scores: torch.Tensor) -> torch.Tensor:
        """Set scores ``[B, ..., W]`` past a sequence's end to -inf, in place."""
        for sequence, count in enumerate(self.groups):
            scores[sequence, ..., int(count) :] = float("-inf")
        return scores


class BoundSketch:
    """Smallest and largest element of each group's keys, in every dimension."""

    def __init__(self, low: GroupRows, high: GroupRows, group_tokens: int) -> None:
        self._low, self._high, self._group_tokens = low, high, group_tokens
        self.tokens: NDArray[np.int64] = np.zeros(len(low.groups), np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of both bounds."""
        return self._low.nbytes + self._high.nbytes

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` of whole groups to one sequence."""
        groups = keys.unflatten(1, (-1, self._group_tokens))
        self._low.append(sequence, groups.amin(2))
        self._high.append(sequence, groups.amax(2))
        self.tokens[sequence] += keys.shape[1]

    def bounds(self, query: torch.Tensor) -> torch.Tensor:
        """Upper bounds of the logits of a group's tokens, added over the query heads of a KV head: ``[B, H_kv, N]``.

        The largest product of an element with one between the bounds is that with the upper one where the query is
        positive and with the lower one elsewhere, so the sum over heads needs two products only.
        """
        batch, _, head_dim = query.shape
        by_head = query.float().view(batch, self._low._rows.shape[1], -1, head_dim)
        positive, negative = by_head.clamp(min=0).sum(2, keepdim=True), by_head.clamp(max=0).sum(2, keepdim=True)
        return self._low.blank((self._high.products(positive) + self._low.products(negative))[:, :, 0])
