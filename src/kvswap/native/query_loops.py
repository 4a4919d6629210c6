"""Compiled loops from a layer's input to a query that can be scored: norm, RoPE, projection.

``models`` and ``selection`` call them, and use torch on other devices and where nothing was compiled; they ask
``computes_here`` first. Any thread. Shapes that do not fit raise ValueError.
"""

from __future__ import annotations

import torch

from kvswap.native.library import available
from kvswap.native.threads import threaded_library


def computes_here(*tensors: torch.Tensor) -> bool:
    """Whether these are float32 on the CPU, and there are compiled functions."""
    return available() and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last dimension of ``hidden``, times ``weight + offset``."""
    compiled = threaded_library()
    if hidden.shape[-1:] != weight.shape:
        raise ValueError(f"hidden states {tuple(hidden.shape)} and a weight {tuple(weight.shape)}")
    hidden, weight, found = hidden.contiguous(), weight.contiguous(), torch.empty(hidden.shape)
    rows = hidden.numel() // len(weight)
    compiled.kvswap_rms_norm(hidden.data_ptr(), weight.data_ptr(), rows, len(weight), offset, eps, found.data_ptr())
    return found


def rotate_halves(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of a query ``[B, H, d]``, halves of a head's elements paired; cos, sin ``[B or 1, 1, d]``."""
    batch, heads, elements = query.shape
    compiled = threaded_library()
    if elements % 2 or not cos.shape == sin.shape == (len(cos), 1, elements) or len(cos) not in (1, batch):
        raise ValueError(f"query {tuple(query.shape)} with cos {tuple(cos.shape)} and sin {tuple(sin.shape)}")
    query, cos, sin, found = query.contiguous(), cos.contiguous(), sin.contiguous(), torch.empty(query.shape)
    stride = elements if len(cos) > 1 else 0
    sizes = batch, heads, elements // 2, stride
    compiled.kvswap_rotate(query.data_ptr(), cos.data_ptr(), sin.data_ptr(), *sizes, found.data_ptr())
    return found


def project(query: torch.Tensor, matrix: torch.Tensor, scaling: float) -> torch.Tensor:
    """Queries times the matrix of their KV head and ``scaling``: ``[B, H_q, R]`` float32.

    ``query`` is ``[B, H_q, d]`` float32, ``matrix`` ``[H_kv, d, R]`` float16, both on the CPU.
    """
    batch, heads, elements = query.shape
    kv_heads, _, rank = matrix.shape
    if query.dtype != torch.float32 or matrix.dtype != torch.float16 or not matrix.is_contiguous():
        raise ValueError(f"query {query.dtype} and matrix {matrix.dtype}, which must be float32 and contiguous float16")
    if matrix.shape[1] != elements or heads % kv_heads:
        raise ValueError(f"query {tuple(query.shape)} and matrix {tuple(matrix.shape)}")
    query, found = query.contiguous(), torch.empty(batch, heads, rank)
    compiled = threaded_library()
    compiled.kvswap_project(
        query.data_ptr(),
        matrix.data_ptr(),
        batch,
        kv_heads,
        heads // kv_heads,
        elements,
        rank,
        scaling,
        found.data_ptr(),
    )
    return found
