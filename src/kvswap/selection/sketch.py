"""The sketch of one layer's keys for B sequences, and the logits estimated from it.

A token's key of D elements is projected to R elements, quantised to ``bits`` with its own float16 scale and minimum,
and packed (``packed_codes.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.selection.basis import SCALE_BYTES, Basis
from kvswap.selection.choose import group_mass
from kvswap.selection.packed_codes import PackedCodes
from kvswap.selection.score import float_products, integer_products, middle, prefers_integers
from kvswap.terms import round_up

STEP_TOKENS = 256


class LayerSketch:
    """Quantised keys of one layer. Grows by steps of 256 tokens. One thread."""

    scale_rows = 2

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
        self.bits, self.kv_heads, self.basis = bits, kv_heads, basis
        self.rank = basis.matrix.shape[1]
        self._matrix, query_matrix = (each.to(device) for each in self.matrices(basis))
        self._integer = prefers_integers(bits, device)
        self._by_head = query_matrix.view(kv_heads, head_dim, self.rank)
        capacity = round_up(capacity_tokens, STEP_TOKENS)
        self._codes = PackedCodes(batch, self.rank * bits // 8, capacity, device, step_tokens=STEP_TOKENS)
        self._scale = torch.zeros(batch, self.scale_rows, capacity, dtype=torch.float16, device=device)
        self.tokens: NDArray[np.int64] = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self._codes.tiles.nbytes + self._scale.nbytes

    @staticmethod
    def token_bytes(rank: int, bits: int) -> int:
        """Bytes of one token of one layer: codes, scale and minimum."""
        return rank * bits // 8 + SCALE_BYTES

    @staticmethod
    def scratch_bytes(rank: int, bits: int, heads: int, device: torch.device, group_tokens: int) -> int:
        """Temporary bytes to score one token: codes in rows and unpacked, products, logits and their softmax."""
        return rank * bits // 8 + rank * (1 if prefers_integers(bits, device) else 5) + 3 * heads * 4

    def append(self, sequence: int, keys: torch.Tensor) -> None:
        """Add keys ``[H_kv, n, d]`` of any float dtype to one sequence."""
        start = int(self.tokens[sequence])
        stop = start + keys.shape[1]
        self._grow(stop)
        rows = self.project(keys.transpose(0, 1).reshape(keys.shape[1], -1).float())
        codes, self._scale[sequence, :, start:stop] = self.encode(rows)
        packed = codes.T.unflatten(0, (8 // self.bits, -1))
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=codes.device)[:, None, None]
        self._codes.put(sequence, start, (packed << shifts).sum(0, dtype=torch.uint8))
        self.tokens[sequence] = stop

    def truncate(self, sequence: int, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of one sequence."""
        self.tokens[sequence] = tokens

    @staticmethod
    def matrices(basis: Basis) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices that project keys and queries, ``[D, R]`` each."""
        return basis.matrix, basis.matrix

    def project(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys ``[n, D]`` float32 to ``[n, R]``."""
        return keys @ self._matrix

    def low_rank(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Scaled queries ``[B, H_q, d]`` projected: ``[B, H_q, R]`` float32."""
        batch, heads, head_dim = query.shape
        by_head = (query.float() * scaling).view(batch, self.kv_heads, -1, head_dim)
        return (by_head @ self._by_head.float()).view(batch, heads, self.rank)

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[n, R]`` uint8 of projected keys ``[n, R]``, with scales and minima ``[2, n]`` float16."""
        low, high = rows.amin(1), rows.amax(1)
        levels = (1 << self.bits) - 1
        scale = ((high - low) / levels).clamp(min=1e-6).half()
        low = low.half()
        codes = ((rows - low.float()[:, None]) / scale.float()[:, None]).round_().clamp_(0, levels).to(torch.uint8)
        return codes, torch.stack((scale, low))

    def dump(self, sequence: int, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Codes ``[R * bits / 8, n]`` and the bits of scales and minima ``[2, n]``, if any, of tokens; copies."""
        codes = self._codes.rows(sequence, start, stop).cpu().contiguous().numpy()
        scales = self._scale[sequence, :, start:stop].cpu().contiguous().view(torch.int16).numpy()
        return codes, scales.view(np.uint16)

    def restore(self, sequence: int, codes: NDArray[np.uint8], scales: NDArray[np.uint16]) -> None:
        """Restore what ``dump`` gave for the first tokens of a sequence, which must be empty."""
        count = codes.shape[1]
        self._grow(count)
        self._codes.put(sequence, 0, torch.from_numpy(codes.copy()).to(self._scale.device))
        halves = torch.from_numpy(scales.view(np.int16).copy()).view(torch.float16)
        self._scale[sequence, :, :count] = halves.to(self._scale.device)
        self.tokens[sequence] = count

    def logits(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Estimated logits ``[B, H_q, W]`` float32 of ``query`` ``[B, H_q, d]``.

        W is the longest sequence rounded up to whole steps; entries past a sequence's end are -inf.
        """
        width = round_up(int(self.tokens.max()), STEP_TOKENS)  # few distinct widths: matrix libraries prepare for each
        logits = self.products(self.low_rank(query, scaling), width)
        for sequence, count in enumerate(self.tokens):
            logits[sequence, :, int(count) :] = float("-inf")
        return logits

    def group_mass(self, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
        """Estimated attention mass of each group, ``[B, N]`` float32, of ``query`` ``[B, H_q, d]``."""
        return group_mass(self.logits(query, scaling), group_tokens)

    def products(self, low_rank: torch.Tensor, width: int) -> torch.Tensor:
        """Multiply projected queries ``[B, H_q, R]`` with the first ``width`` quantised keys: ``[B, H_q, width]``."""
        batch, heads, _ = low_rank.shape
        multiply = integer_products if self._integer else float_products
        scale = self._scale[:, :, :width].float()
        scale[:, 1] += middle(self.bits) * scale[:, 0]  # from the minimum to the value of the middle code
        logits = low_rank.new_empty(batch, heads, width)
        for sequence in range(batch):
            products = multiply(low_rank[sequence], self._codes.rows(sequence, 0, width), self.bits)
            torch.mul(products, scale[sequence, :1], out=logits[sequence])
        return logits.addcmul_(scale[:, 1:], low_rank.sum(-1, keepdim=True))

    def _grow(self, tokens: int) -> None:
        self._codes.grow(tokens)
        extra = round_up(tokens, STEP_TOKENS) - self._scale.shape[2]
        if extra > 0:
            self._scale = torch.nn.functional.pad(self._scale, (0, extra))
