"""Exact attention of a chunk of prefill over the K, V of its layer so far."""

from __future__ import annotations

import torch
from torch.nn import functional


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
