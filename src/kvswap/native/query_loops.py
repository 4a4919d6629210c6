"""What callers see of the compiled loops from a layer's input to a query that can be scored: norm, RoPE, projection.

Each has a twin in plain torch, which is used on other devices and where nothing was compiled; callers ask first
(``computes_here``).
"""

from __future__ import annotations

import torch

from kvswap.native.library import available
from kvswap.native.threads import threaded_library


def computes_here(*tensors: torch.Tensor) -> bool:
    """Whether these are float32 on the CPU, and the compiled functions are there."""
    return available() and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last dimension of ``hidden``, times ``weight + offset``."""
    compiled = threaded_library()
    assert compiled is not None and hidden.shape[-1:] == weight.shape
    hidden, weight, found = hidden.contiguous(), weight.contiguous(), torch.empty(hidden.shape)
    rows = hidden.numel() // len(weight)
    compiled.kvswap_rms_norm(hidden.data_ptr(), weight.data_ptr(), rows, len(weight), offset, eps, found.data_ptr())
    return found


def rotate_halves(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of a query ``[B, H, d]``, halves of a head's elements paired; cos, sin ``[B or 1, 1, d]``."""
    batch, heads, elements = query.shape
    compiled = threaded_library()
    assert compiled is not None and elements % 2 == 0
    assert cos.shape == sin.shape == (len(cos), 1, elements) and len(cos) in (1, batch)
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
    assert query.dtype == torch.float32 and matrix.dtype == torch.float16 and matrix.is_contiguous()
    assert matrix.shape[1] == elements and heads % kv_heads == 0
    query, found = query.contiguous(), torch.empty(batch, heads, rank)
    compiled = threaded_library()
    assert compiled is not None
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
