"""Codes of one layer's keys for B sequences, and logits estimated from them.

A token's key of D elements is projected to R, quantised to ``bits`` with a float16 scale and minimum of its own, and
packed dimension-major: ``[B, R * bits / 8, capacity]`` bytes, so that scoring streams along tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.sketch.basis import SCALE_BYTES, Basis
from kvswap.terms import round_up

STEP_TOKENS = 256


class LayerSketch:
    """Grows by whole steps of 256 tokens. One thread."""

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        basis: Basis,
        bits: int,
        capacity_tokens: int,
        device: torch.device,
    ) -> None:
        self.bits, self.kv_heads = bits, kv_heads
        self.rank = basis.matrix.shape[1]
        self._matrix = basis.matrix.to(device)
        self._by_head = self._matrix.view(kv_heads, head_dim, self.rank)
        capacity = round_up(capacity_tokens, STEP_TOKENS)
        self._codes = torch.zeros(batch, self.rank * bits // 8, capacity, dtype=torch.uint8, device=device)
        self._scale = torch.zeros(batch, 2, capacity, dtype=torch.float16, device=device)
        self.tokens: NDArray[np.int64] = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self._codes.nbytes + self._scale.nbytes

    @staticmethod
    def token_bytes(rank: int, bits: int) -> int:
        """What one token of one layer takes: codes, scale and minimum."""
        return rank * bits // 8 + SCALE_BYTES

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` of any float dtype to one sequence."""
        start = int(self.tokens[sequence])
        stop = start + keys.shape[1]
        self._grow(stop)
        rows = keys.transpose(0, 1).reshape(keys.shape[1], -1).float() @ self._matrix
        low, high = rows.amin(1), rows.amax(1)
        levels = (1 << self.bits) - 1
        scale = ((high - low) / levels).clamp(min=1e-6).half()
        low = low.half()
        codes = ((rows - low.float()[:, None]) / scale.float()[:, None]).round_().clamp_(0, levels).to(torch.uint8)
        packed = codes.T.unflatten(0, (-1, 8 // self.bits))
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=codes.device)[None, :, None]
        self._codes[sequence, :, start:stop] = (packed << shifts).sum(1, dtype=torch.uint8)
        self._scale[sequence, 0, start:stop] = scale
        self._scale[sequence, 1, start:stop] = low
        self.tokens[sequence] = stop

    def logits(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Estimated logits ``[B, H_q, T]`` float32 of ``query`` ``[B, H_q, d]``; -inf past a sequence's end."""
        batch, heads, head_dim = query.shape
        longest = int(self.tokens.max())
        by_head = (query.float() * scaling).view(batch, self.kv_heads, -1, head_dim)
        low_rank = torch.einsum("bkgd,kdr->bkgr", by_head, self._by_head).reshape(batch, heads, self.rank)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=query.device)[None, None, :, None]
        codes = ((self._codes[:, :, None, :longest] >> shifts) & ((1 << self.bits) - 1)).flatten(1, 2).float()
        scale, low = self._scale[:, 0, None, :longest].float(), self._scale[:, 1, None, :longest].float()
        logits = torch.bmm(low_rank, codes).mul_(scale).add_(low * low_rank.sum(-1, keepdim=True))
        for sequence, count in enumerate(self.tokens):
            if count < longest:
                logits[sequence, :, int(count) :] = float("-inf")
        return logits

    def _grow(self, tokens: int) -> None:
        extra = round_up(tokens, STEP_TOKENS) - self._codes.shape[2]
        if extra > 0:
            self._codes = torch.nn.functional.pad(self._codes, (0, extra))
            self._scale = torch.nn.functional.pad(self._scale, (0, extra))
