"""Fused norm and RoPE of a family, for predicting queries and for taking RoPE off keys.

The families' own code takes ten small operators for a norm and as many for RoPE. At one token these cost as much as the
projection between them. ``adapter`` asks for fused versions when it inspects a model. A fused version is used where a
trial shows that it computes the same. Elsewhere (other formulas, weights that are not in memory, hooks) the code of the
family runs. The model's own forward pass is never changed. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from kvswap.native import query_loops

Rope = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Norm = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class NormForm(NamedTuple):
    """A root-mean-square norm over the last dimension: times ``weight + offset``."""

    offset: float
    eps: float


@torch.no_grad()
def norm_form(norm: Any) -> NormForm | None:
    """How ``norm`` computes, found by a trial; None where that is something else than a root-mean-square norm."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    hooked = isinstance(norm, nn.Module) and (norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm))
    if (
        not isinstance(eps, float)
        or not isinstance(weight, torch.Tensor)
        or weight.dim() != 1
        or weight.device.type == "meta"
        or hooked
    ):
        return None
    trial = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    for offset in (0.0, 1.0):
        if _same(lambda: norm(trial), lambda offset=offset: rms_norm(trial, weight, offset, eps), weight.dtype):  # type: ignore[misc]
            return NormForm(offset, eps)
    return None


def fused_norm(norm: Any) -> Norm:
    """A fused root-mean-square norm with the weight of ``norm``, or one plus it, where that equals ``norm``."""
    form = norm_form(norm)
    if form is None:
        return norm  # type: ignore[no-any-return]

    def fused(hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, norm.weight, form.offset, form.eps)

    return fused


@torch.no_grad()
def fused_rope(
    rope: Rope, head_dim: int, rope_dim: int | None = None
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """RoPE of a query ``[B, H, d]`` with cos and sin ``[B or 1, 1, d]``, fused where that equals the family's own.

    ``rope_dim`` is the last dimension of cos and sin where that is not ``head_dim``.
    """

    def own(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        apart = query[:, :, None]
        return rope(apart, apart[:, :1], cos, sin)[0][:, :, 0]

    if rope_dim not in (None, head_dim):
        return own
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
    """RoPE that pairs the first half of a head's elements with the second, as in Llama and most families since."""
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
