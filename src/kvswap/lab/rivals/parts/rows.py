"""Low-rank rows of one layer's keys in 16 bits, as KVSwap (arXiv 2511.11907) publishes them.

A token's key of D elements, all heads joined, is projected to R and kept as float16, dimension-major:
``[B, R, capacity]``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.selection.basis import Basis
from kvswap.terms import FLOAT16_MAX, round_up

STEP_TOKENS = 256
ITEM_BYTES = 2


class RowSketch:
    """Grows by whole steps of 256 tokens. One thread."""

    def __init__(self, *, batch: int, kv_heads: int, basis: Basis, capacity_tokens: int, device: torch.device) -> None:
        self._matrix = basis.matrix.to(device)
        self._by_head = self._matrix.unflatten(0, (kv_heads, -1))
        capacity = round_up(capacity_tokens, STEP_TOKENS)
        self._rows = torch.zeros(batch, basis.matrix.shape[1], capacity, dtype=torch.float16, device=device)
        self.tokens: NDArray[np.int64] = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._rows.nbytes

    @staticmethod
    def scratch_bytes(rank: int) -> int:
        """Temporary bytes to score one token: its row in float32 and one sum."""
        return 4 * rank + 8

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` of any float dtype to one sequence."""
        start = int(self.tokens[sequence])
        stop = start + keys.shape[1]
        extra = round_up(stop, STEP_TOKENS) - self._rows.shape[2]
        if extra > 0:
            self._rows = torch.nn.functional.pad(self._rows, (0, extra))
        rows = keys.transpose(0, 1).reshape(keys.shape[1], -1).float() @ self._matrix
        self._rows[sequence, :, start:stop] = rows.clamp_(-FLOAT16_MAX, FLOAT16_MAX).T
        self.tokens[sequence] = stop

    def summed_logits(self, query: torch.Tensor) -> torch.Tensor:
        """Logits of ``query`` ``[B, H_q, d]`` added over heads, ``[B, W]`` float32, without the scale.

        A sum over heads needs one product only: that of the sum of the low-rank queries. W is the longest sequence
        rounded up to whole steps; entries past a sequence's end are -inf.
        """
        batch, _, head_dim = query.shape
        heads = self._by_head.shape[0]
        low_rank = (query.float().view(batch, heads, -1, head_dim).sum(2)[:, :, None] @ self._by_head).sum(1)
        width = round_up(int(self.tokens.max()), STEP_TOKENS)
        logits: torch.Tensor = (low_rank @ self._rows[:, :, :width].float())[:, 0]
        for sequence, count in enumerate(self.tokens):
            logits[sequence, int(count) :] = float("-inf")
        return logits
