"""Exact attention in a prompt: a chunk over the K, V of its layer so far, or K, V that arrive in tiles.

Tiles are merged by log-sum-exp, the online softmax of Milakov and Gimelshein (arXiv 1805.02867), so that memory grows
with the tile and not with the context.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kvswap.native import loops


def chunk_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads, never repeating K and V.

    With chunks of 512 or 1,024 tokens the result is bit-equal to the one-piece causal call on a CPU; with 256 it is
    not.

    Parameters
    ----------
    query
        ``[B, H_q, q, d]``.
    keys, values
        ``[B, H_kv, k, d]``, any strides.
    mask
        Boolean or additive ``[B or 1, 1, q, k]``; None is causal and needs ``q == k``.

    Returns
    -------
    ``[B, q, H_q, d]``, contiguous.
    """
    if mask is not None and query.shape[1] != keys.shape[1] and query.device.type != "cpu":
        return _folded(query, keys, values, mask, scaling)
    output = functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        scale=scaling,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def _folded(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``chunk_attention`` with the heads of a group as further queries of one head.

    The fast kernels of CUDA take a mask or grouped heads, not both. What is left makes all logits, in float32.
    """
    heads, tokens = query.shape[1:3]
    repeats = heads // keys.shape[1]
    rows = query.unflatten(1, (-1, repeats)).flatten(2, 3)
    output = functional.scaled_dot_product_attention(
        rows, keys, values, attn_mask=mask.repeat(1, 1, repeats, 1), scale=scaling
    )
    apart: torch.Tensor = output.unflatten(2, (repeats, tokens)).flatten(1, 2)
    return apart.transpose(1, 2).contiguous()


class TiledAttention:
    """Attention of one query block, tile by tile, in float32.

    Parameters
    ----------
    query
        ``[H_q, q, d]`` of one sequence.
    kv_heads
        H_kv; query head h uses head ``h // (H_q / H_kv)``.
    softcap
        Logits are held within this by a tangent, as in Gemma 2; 0: they are not.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, scaling: float, softcap: float = 0.0) -> None:
        heads, tokens, head_dim = query.shape
        self._shape, self._softcap = (heads, tokens), softcap
        self._query = (query.float() * scaling).reshape(kv_heads, -1, head_dim)
        rows = self._query.shape[1]
        self._peak = query.new_full((kv_heads, rows, 1), float("-inf"), dtype=torch.float32)
        self._total = query.new_zeros((kv_heads, rows, 1), dtype=torch.float32)
        self._output: torch.Tensor | None = None

    def add(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Attend to one tile: K, V ``[H_kv, n, d]``; ``mask`` is boolean ``[q, n]``, False where not to attend."""
        logits = self._query @ keys.float().transpose(1, 2)
        if self._softcap:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
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

    def add_groups(self, slots: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
        """Attend to a tile as it is stored: ``slots`` ``[n, slot_elements]`` are groups of ``shape`` with padding.

        For few queries, where ``loops.attends_here``, and without a softcap.
        """
        if self._softcap:
            raise ValueError("compiled attention has no softcap")
        if self._output is None:
            self._output = torch.zeros_like(self._query)
        query = self._query = self._query.contiguous()
        loops.attend_groups(slots, None, shape, query, self._peak, self._total, self._output)

    @property
    def log_total(self) -> torch.Tensor:
        """Logarithm of the sum of exponentials of all logits so far, ``[H_q, q]`` float32."""
        return (self._peak + self._total.log()).reshape(self._shape)

    def result(self, sink_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Attention output ``[q, H_q, d]`` float32.

        ``sink_logits`` ``[H_q]`` are logits that take a share of the attention and add nothing, as in gpt-oss.
        """
        if self._output is None:
            raise ValueError("no tile was added")
        total = self._total
        if sink_logits is not None:
            logits = sink_logits.float()[:, None].expand(self._shape).reshape(self._peak.shape)
            total = total + (logits - self._peak).exp()
        return (self._output / total).reshape(*self._shape, -1).transpose(0, 1)
