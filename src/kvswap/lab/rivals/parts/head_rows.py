"""A few directions of every KV head's keys in 16 bits, each head for itself: ``[B, H_kv, r, capacity]`` float16.

Loki (arXiv 2406.02542) keeps the leading principal directions of a head, InfiniGen (arXiv 2406.19707) the strongest
columns of its keys in a basis turned by its queries; ``directions`` chooses them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.terms import FLOAT16_MAX, round_up

STEP_TOKENS = 256
ITEM_BYTES = 2


class HeadRowSketch:
    """Grows by whole steps of 256 tokens. One thread.

    ``directions(keys)`` is asked once a sequence, with its first keys ``[H_kv, n, d]`` float32, for ``[H_kv, d, r]``.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        rank: int,
        directions: Callable[[torch.Tensor], torch.Tensor],
        capacity_tokens: int,
        device: torch.device,
    ) -> None:
        self._directions = directions
        self._basis = torch.zeros(batch, kv_heads, head_dim, rank, device=device)
        capacity = round_up(capacity_tokens, STEP_TOKENS)
        self._rows = torch.zeros(batch, kv_heads, rank, capacity, dtype=torch.float16, device=device)
        self.tokens: NDArray[np.int64] = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._rows.nbytes

    @staticmethod
    def scratch_bytes(kv_heads: int, rank: int) -> int:
        """Temporary bytes to score one token: its rows in float32 and the logits."""
        return 4 * kv_heads * (rank + 3)

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` of any float dtype to one sequence."""
        start = int(self.tokens[sequence])
        stop = start + keys.shape[1]
        extra = round_up(stop, STEP_TOKENS) - self._rows.shape[3]
        if extra > 0:
            self._rows = torch.nn.functional.pad(self._rows, (0, extra))
        if start == 0:
            self._basis[sequence] = self._directions(keys.float())
        rows = keys.float() @ self._basis[sequence]
        self._rows[sequence, :, :, start:stop] = rows.clamp_(-FLOAT16_MAX, FLOAT16_MAX).transpose(1, 2)
        self.tokens[sequence] = stop

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """Logits of ``query`` ``[B, H_q, d]`` added over the query heads of each KV head: ``[B, H_kv, W]`` float32.

        Without the scale. W is the longest sequence rounded up to whole steps; entries past a sequence's end are -inf.
        """
        batch, kv_heads, head_dim, _ = self._basis.shape
        summed = query.float().view(batch, kv_heads, -1, head_dim).sum(2, keepdim=True)
        width = round_up(int(self.tokens.max()), STEP_TOKENS)
        logits = ((summed @ self._basis) @ self._rows[..., :width].float())[:, :, 0]
        for sequence, count in enumerate(self.tokens):
            logits[sequence, :, int(count) :] = float("-inf")
        return logits
