"""Attention in tiles equals attention in one piece."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvswap.core.attention import TiledAttention

D = 16


def tensors(heads: int, kv_heads: int, queries: int, tokens: int, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(tokens)
    shapes = ((heads, queries), (kv_heads, tokens), (kv_heads, tokens))
    q, k, v = (torch.randn(*shape, D, generator=random) for shape in shapes)
    return q * spread, k, v


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``[q, H_q, d]`` in float64, in one piece."""
    repeat = q.shape[0] // k.shape[0]
    k, v = (part.double().repeat_interleave(repeat, 0) for part in (k, v))
    logits = q.double() @ k.transpose(1, 2) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(0, 1)


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, cuts: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    attention = TiledAttention(q, k.shape[0], scaling)
    edges = [0, *cuts, k.shape[1]]
    for start, stop in itertools.pairwise(edges):
        part = None if mask is None else mask[:, start:stop]
        attention.add(k[:, start:stop], v[:, start:stop], part)
    return attention.result()


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("cuts", [[], [1], [50, 100, 129], [64, 65, 66]])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_tiles_equal_one_piece(heads: int, kv_heads: int, cuts: list[int], spread: float) -> None:
    q, k, v = tensors(heads, kv_heads, 5, 130, spread)
    assert largest_error(tiled(q, k, v, 0.25, cuts), reference(q, k, v, 0.25)) < 1e-5


@pytest.mark.parametrize("cuts", [[], [3], [40, 90], [113]])
def test_a_causal_end_after_a_visible_past(cuts: list[int]) -> None:
    q, k, v = tensors(6, 2, 17, 130)
    mask = torch.ones(17, 130, dtype=torch.bool).tril(130 - 17)
    assert largest_error(tiled(q, k, v, 0.25, cuts, mask), reference(q, k, v, 0.25, mask)) < 1e-5


def test_a_masked_tile_changes_nothing() -> None:
    q, k, v = tensors(4, 2, 3, 60)
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[:, 20:40] = False
    assert largest_error(tiled(q, k, v, 0.25, [20, 40], mask), reference(q, k, v, 0.25, mask)) < 1e-5


def test_a_masked_first_tile_changes_nothing() -> None:
    q, k, v = tensors(4, 2, 3, 60)
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[1, :20] = False
    assert largest_error(tiled(q, k, v, 0.25, [20], mask), reference(q, k, v, 0.25, mask)) < 1e-5


def test_order_of_tiles_does_not_matter() -> None:
    q, k, v = tensors(4, 2, 3, 60)
    backwards = TiledAttention(q, 2, 0.25)
    for start in (40, 0, 20):
        backwards.add(k[:, start : start + 20], v[:, start : start + 20])
    assert largest_error(backwards.result(), reference(q, k, v, 0.25)) < 1e-5


def test_half_precision_tiles_are_merged_in_float32() -> None:
    q, k, v = (part.bfloat16() for part in tensors(4, 2, 3, 60))
    assert largest_error(tiled(q, k, v, 0.25, [20, 40]), reference(q, k, v, 0.25)) < 1e-5


def test_inputs_stay_as_they_are() -> None:
    q, k, v = tensors(4, 2, 3, 60)
    before = [part.clone() for part in (q, k, v)]
    tiled(q, k, v, 0.25, [20], torch.ones(3, 60, dtype=torch.bool))
    assert all(torch.equal(now, then) for now, then in zip((q, k, v), before, strict=True))
