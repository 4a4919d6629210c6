"""Exact attention over K, V that arrive in tiles: partial results merged by log-sum-exp.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867), as flash attention uses it: memory grows with the tile, not
with the context.
"""

from __future__ import annotations

import torch


class TiledAttention:
    """Attention of one query block, tile by tile, in float32.

    Parameters
    ----------
    query
        ``[H_q, q, d]`` of one sequence.
    kv_heads
        H_kv; query head h uses head ``h // (H_q / H_kv)``.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, scaling: float) -> None:
        heads, tokens, head_dim = query.shape
        self._shape = (heads, tokens)
        self._query = (query.float() * scaling).reshape(kv_heads, -1, head_dim)
        rows = self._query.shape[1]
        self._peak = query.new_full((kv_heads, rows, 1), float("-inf"), dtype=torch.float32)
        self._total = query.new_zeros((kv_heads, rows, 1), dtype=torch.float32)
        self._output: torch.Tensor | None = None

    def add(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Attend to one tile: K, V ``[H_kv, n, d]``; ``mask`` is boolean ``[q, n]``, False where not to attend."""
        logits = self._query @ keys.float().transpose(1, 2)
        if mask is not None:
            logits = logits.unflatten(1, (-1, self._shape[1])).masked_fill(~mask, float("-inf")).flatten(1, 2)
        peak = torch.maximum(self._peak, logits.amax(dim=-1, keepdim=True))
        shift = peak.clamp(min=torch.finfo(peak.dtype).min)  # a row that has seen no token yet: no inf - inf
        weights = logits.sub_(shift).exp_()
        keep = (self._peak - shift).exp()
        self._total = self._total * keep + weights.sum(dim=-1, keepdim=True)
        fresh = weights @ values.float()
        self._output = fresh if self._output is None else self._output * keep + fresh
        self._peak = peak

    @property
    def log_total(self) -> torch.Tensor:
        """Logarithm of the sum of exponentials of all logits so far, ``[H_q, q]`` float32."""
        return (self._peak + self._total.log()).reshape(self._shape)

    def result(self) -> torch.Tensor:
        """Attention output ``[q, H_q, d]`` float32."""
        assert self._output is not None, "no tile was added"
        return (self._output / self._total).reshape(*self._shape, -1).transpose(0, 1)
