"""What the methods share that keep a few directions of every head's keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kvswap.config import Config
from kvswap.errors import UnsupportedError
from kvswap.lab.rivals.parts.head_rows import ITEM_BYTES, HeadRowSketch
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.choose import best_of_groups
from kvswap.selection.method import KeyFacts, SketchMaker

Directions = Callable[[torch.Tensor], torch.Tensor]


def per_head_makers(
    name: str,
    facts: KeyFacts,
    config: Config,
    kind: str,
    directions: Callable[[KeyCovariance, int, torch.device], Directions],
) -> list[SketchMaker]:
    """Sketches of as many directions a head as fit the bytes of kvswap's sketch, at least one.

    ``directions(covariance, rank, device)`` gives what a sketch asks for its directions. Raises UnsupportedError.
    """
    if facts.statistics is None:
        raise UnsupportedError(f"{name} without a tokenizer to calibrate with", hint="pass the tokenizer")
    heads, head_dim = facts.kv_heads, facts.head_dim
    rank = config.sketch_rank or max(1, config.sketch_bytes(facts.elements) // ITEM_BYTES)
    each = min(head_dim, max(1, rank // heads))

    def maker(covariance: KeyCovariance) -> SketchMaker:
        return SketchMaker(
            label=f"{kind} rank {each} a head, 16 bit",
            token_bytes=heads * each * ITEM_BYTES,
            scratch_token_bytes=HeadRowSketch.scratch_bytes(heads, each),
            basis_bytes=heads * head_dim * head_dim * 4,
            sequence_bytes=heads * head_dim * each * 4,
            make=partial(_make, facts, each, directions(covariance, each, facts.device)),
        )

    return [maker(covariance) for covariance in facts.statistics]


def best_of_each(sketch: HeadRowSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Every KV head ranks for itself: ``[B, H_kv, N]``."""
    logits = sketch.logits(query)
    best = best_of_groups(logits.flatten(0, 1), group_tokens)
    return best.view(*logits.shape[:2], -1)


def best_of_sum(sketch: HeadRowSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Logits added over all heads: ``[B, N]``."""
    return best_of_groups(sketch.logits(query).sum(1), group_tokens)


def _make(facts: KeyFacts, rank: int, directions: Directions, batch: int, capacity_tokens: int) -> HeadRowSketch:
    return HeadRowSketch(
        batch=batch,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        rank=rank,
        directions=directions,
        capacity_tokens=capacity_tokens,
        device=facts.device,
    )
