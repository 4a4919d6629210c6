"""Quick twins of a family's norm and RoPE, for predicting queries and for looking at keys without RoPE.

The families' own code takes ten small operators for a norm and as many for RoPE, which at one token cost as much as
the projection between them. A twin is used where a trial shows that it computes the same; elsewhere (other formulas,
weights that are not in memory, hooks) the family's own code runs. What the model itself computes is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kvswap.native import query_loops

Rope = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Norm = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@torch.no_grad()
def quick_norm(norm: Any) -> Norm:
    """``norm`` itself, or a root-mean-square norm with its weight (or one plus it) where that is the same."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    hooked = isinstance(norm, nn.Module) and (norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm))
    if (
        not isinstance(eps, float)
        or not isinstance(weight, torch.Tensor)
        or weight.dim() != 1
        or weight.device.type == "meta"
        or hooked
    ):
        return norm  # type: ignore[no-any-return]

    def plain(hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, norm.weight, 0.0, eps)

    def one_more(hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, norm.weight, 1.0, eps)

    trial = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    for twin in (plain, one_more):
        if _same(lambda: norm(trial), lambda twin=twin: twin(trial), weight.dtype):  # type: ignore[misc]
            return twin
    return norm  # type: ignore[no-any-return]


@torch.no_grad()
def quick_rope(rope: Rope, head_dim: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of query ``[B, H, d]`` and cos, sin ``[B or 1, 1, d]``: RoPE as the family's ``rope`` has it."""

    def own(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        apart = query[:, :, None]
        return rope(apart, apart[:, :1], cos, sin)[0][:, :, 0]

    trial = torch.linspace(-1, 2, 2 * 3 * head_dim).sin().view(2, 3, head_dim)
    cos, sin = torch.linspace(0, 3, 4 * head_dim).cos().view(2, 2, 1, head_dim)
    if _same(lambda: own(trial, cos, sin), lambda: rotate_halves(trial, cos, sin), torch.float32):
        return rotate_halves
    return own


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last dimension, times ``weight + offset``."""
    if query_loops.computes_here(hidden, weight):
        return query_loops.rms_norm(hidden, weight, offset, eps)
    return functional.rms_norm(hidden, weight.shape, weight + offset if offset else weight, eps)


def rotate_halves(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE with the first half of a head's elements paired with the second, as Llama and most after it have it."""
    if query_loops.computes_here(query, cos, sin):
        return query_loops.rotate_halves(query, cos, sin)
    half = query.shape[-1] // 2
    rotated = query * cos
    rotated[..., :half].addcmul_(query[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(query[..., :half], sin[..., half:])
    return rotated


def _same(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor], dtype: torch.dtype) -> bool:
    try:
        first, second = one(), other()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    tolerance = TOLERANCE.get(dtype, 0.0)
    return first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance)
