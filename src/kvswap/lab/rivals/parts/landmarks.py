"""ShadowKV (arXiv 2410.21465): keys before RoPE as a low-rank product in memory, and the mean key of every group.

The basis is that of the sequence's own first keys (the whole prompt, up to what is appended at once). Rows are float16,
``[B, capacity, r]``. The few outlier groups that the paper keeps whole are left out.
"""

from __future__ import annotations

import numpy as np
import torch

from kvswap.lab.rivals.parts.pages import GroupRows
from kvswap.native.arrays import IntArray
from kvswap.selection.method import Rotate
from kvswap.terms import FLOAT16_MAX, round_up

STEP_TOKENS = 256


class LandmarkSketch:
    """Selects by the mean keys, gives keys back from the product. One thread.

    ``rotate(keys, positions, inverse)`` applies RoPE to keys ``[H_kv, n, d]``, or its inverse.
    """

    def __init__(
        self,
        *,
        landmarks: GroupRows,
        kv_heads: int,
        head_dim: int,
        group_tokens: int,
        rank: int,
        rotate: Rotate,
        capacity_tokens: int,
        device: torch.device,
    ) -> None:
        batch, elements = len(landmarks.groups), kv_heads * head_dim
        self._landmarks, self._rotate = landmarks, rotate
        self._shape, self._group_tokens = (kv_heads, head_dim), group_tokens
        self._basis = torch.zeros(batch, elements, rank, device=device)
        capacity = round_up(capacity_tokens, STEP_TOKENS)
        self._rows = torch.zeros(batch, capacity, rank, dtype=torch.float16, device=device)
        self.tokens: IntArray = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """ByteArray of landmarks and rows."""
        return self._landmarks.nbytes + self._rows.nbytes

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` of whole groups to one sequence."""
        start = int(self.tokens[sequence])
        stop = start + keys.shape[1]
        extra = round_up(stop, STEP_TOKENS) - self._rows.shape[1]
        if extra > 0:
            self._rows = torch.nn.functional.pad(self._rows, (0, 0, 0, extra))
        self._landmarks.append(sequence, keys.unflatten(1, (-1, self._group_tokens)).float().mean(2))
        positions = torch.arange(start, stop, device=keys.device)
        flat = self._rotate(keys.float(), positions, True).transpose(0, 1).flatten(1)
        if start == 0:
            _, vectors = torch.linalg.eigh((flat.T @ flat).double())
            self._basis[sequence] = vectors.flip(1)[:, : self._basis.shape[2]].float()
        self._rows[sequence, start:stop] = (flat @ self._basis[sequence]).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
        self.tokens[sequence] = stop

    def scores(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of every KV head's likeliest query head to the landmarks: ``[B, H_kv, N]``."""
        batch, _, head_dim = query.shape
        by_head = query.float().view(batch, self._shape[0], -1, head_dim) * scaling
        logits = self._landmarks.blank(self._landmarks.products(by_head))
        scores: torch.Tensor = logits.softmax(-1).amax(2)
        return scores

    def keys(self, groups: torch.Tensor) -> torch.Tensor:
        """Keys of groups ``[B, n]``, from the product: ``[B, H_kv, n * G, d]`` float32."""
        positions = (groups[:, :, None] * self._group_tokens + torch.arange(self._group_tokens)).flatten(1)
        positions = positions.to(self._rows.device)
        return torch.stack([self._keys(sequence, row) for sequence, row in enumerate(positions)])

    def _keys(self, sequence: int, positions: torch.Tensor) -> torch.Tensor:
        flat = self._rows[sequence, positions].float() @ self._basis[sequence].T
        return self._rotate(flat.unflatten(1, self._shape).transpose(0, 1), positions, False)
