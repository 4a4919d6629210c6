"""ShadowKV (arXiv 2410.21465): low-rank keys in memory, values read by landmarks of 8 tokens.

Keys before RoPE are a product of rank R from the prompt's own singular vectors; what is selected is rebuilt from it, so
that only values are read. Mean keys of groups of 8 rank the groups, by the true query, every KV head for itself; a
recent window of 32 tokens stays whole, and what the step before selected is not read again. The landmarks alone take
the D/4 bytes a token that kvswap's sketch has; R is D/16 by default, which takes half as much again.
"""

from __future__ import annotations

from functools import partial

import torch

from kvswap.config import Config
from kvswap.errors import UnsupportedError
from kvswap.lab.rivals.parts.decoding import RebuiltKeys
from kvswap.lab.rivals.parts.landmarks import LandmarkSketch
from kvswap.lab.rivals.parts.pages import ITEM_BYTES, GroupRows
from kvswap.lab.rivals.parts.slots import PreviousSlots
from kvswap.lab.rivals.window import window_by_head
from kvswap.selection.method import KeyFacts, Method, SketchMaker

GROUP_TOKENS = 8
RECENT_TOKENS = 32


def method() -> Method:
    """As published, with values on disk."""
    return Method(
        name="shadowkv",
        paper="arXiv 2410.21465",
        makers=makers,
        score=score,
        decode=RebuiltKeys,
        slots=PreviousSlots,
        window=window_by_head,
        calibrated=False,
        configure=configure,
    )


def configure(config: Config) -> Config:
    """Groups of 8, no sinks, the paper's recent window or less of it."""
    return config.replace(
        group_tokens=GROUP_TOKENS, sink_tokens=0, recent_tokens=min(RECENT_TOKENS, config.least_select_tokens // 2)
    )


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """Landmarks and low-rank keys. Raises UnsupportedError for a rank past D."""
    elements = facts.elements
    rank = config.sketch_rank or max(1, elements // 16)
    if rank > elements:
        raise UnsupportedError(f"sketch_rank {rank} is more than the {elements} elements of a key", hint="lower it")
    maker = SketchMaker(
        label=f"landmarks of {config.group_tokens} tokens, keys of rank {rank}, 16 bit",
        token_bytes=-(-elements * ITEM_BYTES // config.group_tokens) + rank * ITEM_BYTES,
        scratch_token_bytes=-(-(elements + 2 * facts.query_heads) * 4 // config.group_tokens),
        basis_bytes=0,
        sequence_bytes=elements * rank * 4,
        make=partial(_make, facts, config.group_tokens, rank),
    )
    return [maker] * facts.layers


def score(sketch: LandmarkSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Attention to landmarks: ``[B, H_kv, N]``."""
    return sketch.scores(query, scaling)


def _make(facts: KeyFacts, group_tokens: int, rank: int, batch: int, capacity_tokens: int) -> LandmarkSketch:
    shape = {"kv_heads": facts.kv_heads, "head_dim": facts.head_dim, "group_tokens": group_tokens}
    common = {**shape, "capacity_tokens": capacity_tokens}
    landmarks = GroupRows(batch=batch, device=facts.device, **common)
    return LandmarkSketch(landmarks=landmarks, rank=rank, rotate=facts.rotate, device=facts.device, **common)
