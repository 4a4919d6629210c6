"""Quest (arXiv 2406.10774): bounds of the keys of every page of 16 tokens, in every dimension, rank the pages.

The layer's true query is used. Every KV head selects for itself, by the bound added over its query heads. The bounds
take D/4 bytes a token, what kvswap's sketch takes. In the paper the pages are in memory; here they are read from disk.
"""

from __future__ import annotations

from functools import partial

import torch

from kvswap.config import Config
from kvswap.lab.rivals.parts.decoding import TrueQueryByHead
from kvswap.lab.rivals.parts.pages import ITEM_BYTES, BoundSketch, GroupRows
from kvswap.lab.rivals.parts.slots import NoReuse
from kvswap.lab.rivals.window import window_by_head, without_sinks
from kvswap.selection.method import KeyFacts, Method, SketchMaker

PAGE_TOKENS = 16


def method() -> Method:
    """As published, with pages on disk."""
    return Method(
        name="quest",
        paper="arXiv 2406.10774",
        makers=makers,
        score=score,
        decode=TrueQueryByHead,
        slots=NoReuse,
        window=window_by_head,
        calibrated=False,
        configure=partial(without_sinks, group_tokens=PAGE_TOKENS),
    )


def makers(facts: KeyFacts, config: Config) -> list[SketchMaker]:
    """Bounds of pages."""
    bytes_a_row = facts.elements * ITEM_BYTES
    maker = SketchMaker(
        label=f"bounds of {config.group_tokens} tokens, 16 bit",
        token_bytes=-(-2 * bytes_a_row // config.group_tokens),
        scratch_token_bytes=-(-2 * facts.elements * 4 // config.group_tokens) + 4 * facts.kv_heads,
        basis_bytes=0,
        make=partial(_make, facts, config.group_tokens),
    )
    return [maker] * facts.layers


def score(sketch: BoundSketch, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
    """Upper bounds: ``[B, H_kv, N]``."""
    return sketch.bounds(query)


def _make(facts: KeyFacts, group_tokens: int, batch: int, capacity_tokens: int) -> BoundSketch:
    low, high = (
        GroupRows(
            batch=batch,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            group_tokens=group_tokens,
            capacity_tokens=capacity_tokens,
            device=facts.device,
        )
        for _ in range(2)
    )
    return BoundSketch(low, high, group_tokens)
